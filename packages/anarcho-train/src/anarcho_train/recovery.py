"""What a run does about losses that are not numbers, losses that jump, and checkpoints that find no room: by policy, and exactly.

Notable: all that is decided here follows from numbers that are part of a checkpoint (the window of losses, the updates left out in a
row, where the samples go on), so a run that is killed and resumed decides alike. A spike is judged before the update: the step is told
the largest loss that it may learn from. After a roll-back, the same steps are made from the samples that follow those at fault: which
sample a step begins with is a list of (step, sample), of which the newest entry is written to disk before the older state is restored.

A spike is a loss beyond mean + 6 sigma of the last 128 steps, as in OLMo-core's skip-step optimizer. Spikes enter the window, too, so a
level that stays (another source of a mixture) is taken for the new one after at most a handful of steps.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from anarcho_train.durable import replace_json
from anarcho_train.step import StepMetrics

NonFinitePolicy = Literal["skip", "rollback", "stop"]
SpikePolicy = Literal["report", "skip", "rollback", "stop"]

ROLLBACKS_FILE = "rollbacks.json"
"""Beside the checkpoints: with which sample each step goes on that a run was rolled back to."""

LEAST_SIGMA = 1e-3
"""Of the mean: what losses that are all but equal are taken to scatter by, or rounding would be a spike."""


class TrainingDiverged(ValueError):
    """A fault in the loss or the gradient ends the run: the policy says so, or skipping and rolling back have not helped."""


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """What is done about faults, and how often; every one leaves a line in the metrics file."""

    non_finite: NonFinitePolicy = "skip"
    """A loss or gradient that is not finite: `skip` its update, `rollback` to the newest checkpoint, or `stop`."""
    max_skips: int = 10
    """So many updates left out in a row make `skip` a `rollback`; with float16, a few are usual at the beginning."""
    spikes: SpikePolicy = "report"
    """A loss beyond the window's mean + `spike_sigma` sigma: `report` it and learn from it, `skip` its update, `rollback`, or `stop`.

    On small batches a large loss is often a rare but sound sample, so by default nothing is left out."""
    spike_sigma: float = 6.0
    """How many standard deviations above the mean make a spike."""
    spike_window: int = 128
    """Steps whose losses make mean and deviation; there is no spike before there are so many."""
    max_rollbacks: int = 3
    """So many roll-backs of the whole run; where one more would be needed, it stops."""
    max_failed_saves: int = 3
    """So many checkpoints in a row that cannot be written end the run; the last one is tried so often, with growing pauses."""
    max_restarts: int = 5
    """So many times in a row `--supervise` starts a killed run again that gets no further."""

    def __post_init__(self) -> None:
        for name, allowed in (("non_finite", get_args(NonFinitePolicy)), ("spikes", get_args(SpikePolicy))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"recovery.{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}")
        for name, least in (("max_skips", 1), ("spike_window", 2), ("max_failed_saves", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"recovery.{name} is {getattr(self, name)}; expected a whole number of at least {least}"
                )
        for name in ("max_rollbacks", "max_restarts"):
            if getattr(self, name) < 0:
                raise ValueError(f"recovery.{name} is {getattr(self, name)}; expected zero or a positive whole number")
        if not 0 < self.spike_sigma < math.inf:
            raise ValueError(f"recovery.spike_sigma is {self.spike_sigma}; expected a positive number")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is wrong with a step, and what is done about it."""

    kind: Literal["non_finite", "spike", "empty"]
    """`empty`: none of its targets counts."""
    action: Literal["report", "skip", "rollback", "stop"]
    """What is done."""
    escalated: bool
    """Whether the policy was less, and has been of no avail."""
    step: int
    """The step at fault, counted from 1."""
    first_sample: int
    last_sample: int
    loss: float
    grad_norm: float
    limit: float | None
    """The largest loss that was expected, where there is a full window."""
    skips: int
    """Updates left out in a row."""
    rollbacks: int
    """Roll-backs of the run before this one."""

    @property
    def what(self) -> str:
        """The fault in words."""
        samples = f"of samples {self.first_sample} to {self.last_sample}"
        if self.kind == "empty":
            return f"no target {samples} counts"
        if self.kind == "spike":
            return f"loss {self.loss:.4f} {samples}, where at most {self.limit:.4f} was expected"
        return f"loss {self.loss} and gradient norm {self.grad_norm} {samples}"

    @property
    def message(self) -> str:
        """What happened and what was done, for a run that goes on from here."""
        done = "a spike, and an update all the same," if self.action == "report" else "no update"
        return f"{done} at step {self.step}: {self.what}"

    @property
    def fields(self) -> dict[str, Any]:
        """The same for programs."""
        names = ("action", "loss", "grad_norm", "first_sample", "last_sample", "skips")
        limit = {} if self.limit is None else {"limit": self.limit}
        return {"fault": self.kind} | {name: getattr(self, name) for name in names} | limit

    @property
    def ending(self) -> str:
        """Why the run ends, and what to do."""
        if not self.escalated:
            policy = "spikes" if self.kind == "spike" else "non_finite"
            return (
                f"step {self.step} stopped the run, as recovery.{policy} = 'stop' asks for: {self.what}; the state without its update "
                "is saved, and --resume goes on with the samples after these"
            )
        times = f"{self.skips} steps in a row up to step {self.step}" if self.skips > 1 else f"step {self.step}"
        after = f" after {self.rollbacks} roll-backs" if self.rollbacks else ""
        return (
            f"there was no update in {times}{after} ({self.what}); the run has diverged: go on from its last checkpoint, or start "
            "a new run, with a lower optim.lr, a longer optim.warmup_steps or train.precision = 'float32'"
        )


class Recovery:
    """The policies' memory: the window of losses, the updates left out in a row, and where the samples go on after roll-backs."""

    def __init__(self, config: RecoveryConfig, *, samples_per_step: int, directory: Path | None = None) -> None:
        """``directory`` has the checkpoints."""
        self.config = config
        self.skips = 0
        """Updates left out in a row."""
        self.rollbacks = 0
        """Roll-backs of the whole run."""
        self._per_step = samples_per_step
        self._file = None if directory is None else directory / ROLLBACKS_FILE
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._starts: list[tuple[int, int]] = []

    def first_sample(self, step: int) -> int:
        """The sample that the step after ``step`` steps begins with."""
        number = bisect_right(self._starts, step, key=lambda start: start[0])
        start, sample = self._starts[number - 1] if number else (0, 0)
        return sample + (step - start) * self._per_step

    @property
    def limit(self) -> float | None:
        """The largest loss that is no spike; None before the window is full."""
        if len(self._losses) < self.config.spike_window:
            return None
        losses = np.array(self._losses)
        mean = float(losses.mean())
        return mean + self.config.spike_sigma * max(float(losses.std()), LEAST_SIGMA * abs(mean))

    @property
    def max_loss(self) -> float | None:
        """The largest loss that a step may learn from."""
        return None if self.config.spikes == "report" else self.limit

    def judge(self, metrics: StepMetrics, *, step: int, can_roll_back: Callable[[], bool]) -> Fault | None:
        """What is wrong with the step that was made after ``step`` steps, and what is to be done; None where all is well."""
        limit = self.limit
        finite = math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)
        if metrics.weight == 0:
            return self._fault("empty", "skip", metrics, step=step, limit=limit)
        if finite:
            self._losses.append(metrics.loss)
            if limit is None or metrics.loss <= limit:
                self.skips = 0
                return None
        policy = self.config.spikes if finite else self.config.non_finite
        self.skips = 0 if policy == "report" else self.skips + 1
        action = self._action(policy, can_roll_back)
        escalated = action == "stop" != policy
        return self._fault(
            "spike" if finite else "non_finite", action, metrics, step=step, limit=limit, escalated=escalated
        )

    def _action(self, policy: SpikePolicy, can_roll_back: Callable[[], bool]) -> SpikePolicy:
        """What the policy comes to after all that was skipped and rolled back already."""
        of_no_avail = self.skips >= self.config.max_skips
        if policy not in ("skip", "rollback") or (policy == "skip" and not of_no_avail):
            return policy
        if not can_roll_back():  # Before the first checkpoint there is nothing else to do.
            return "stop" if of_no_avail else "skip"
        return "stop" if self.rollbacks >= self.config.max_rollbacks else "rollback"

    def _fault(
        self,
        kind: Any,
        action: SpikePolicy,
        metrics: StepMetrics,
        *,
        step: int,
        limit: float | None,
        escalated: bool = False,
    ) -> Fault:
        return Fault(
            kind=kind,
            action=action,
            escalated=escalated,
            step=step + 1,
            first_sample=self.first_sample(step),
            last_sample=self.first_sample(step + 1) - 1,
            loss=metrics.loss,
            grad_norm=metrics.grad_norm,
            limit=limit,
            skips=self.skips,
            rollbacks=self.rollbacks,
        )

    def roll_back(self, *, to: int, failed: int) -> None:
        """Notes, on disk, that the run goes on after ``to`` steps with the samples that follow those of step ``failed``."""
        self._starts = [*(start for start in self._starts if start[0] < to), (to, self.first_sample(failed))]
        self.rollbacks += 1
        self.skips = 0
        if self._file is not None:
            replace_json(self._file, {"samples_per_step": self._per_step, **self._order()})

    def state_dict(self) -> dict[str, Any]:
        """Everything that decisions follow from, as JSON values."""
        return {"skips": self.skips, "losses": list(self._losses), **self._order()}

    def load_state_dict(self, state: dict[str, Any], *, step: int, samples: int) -> None:
        """Takes up the state of a checkpoint after ``step`` steps and ``samples`` samples, and what was rolled back to it since."""
        self.skips = int(state.get("skips", 0))
        self.rollbacks = int(state.get("rollbacks", 0))
        self._losses = deque(map(float, state.get("losses", [])), maxlen=self.config.spike_window)
        self._starts = [(int(start), int(sample)) for start, sample in state.get("starts", []) if start <= step]
        if self.first_sample(step) != samples:  # A step has another number of samples now.
            self._starts = [*(start for start in self._starts if start[0] < step), (step, samples)]
        self._take_rollbacks(step)

    def _take_rollbacks(self, step: int) -> None:
        """Adds what was noted after this checkpoint was written."""
        if self._file is None or not self._file.is_file():
            return
        try:
            noted = json.loads(self._file.read_text(encoding="utf-8"))
            starts = [(int(start), int(sample)) for start, sample in noted["starts"]]
            same_steps, rollbacks = noted["samples_per_step"] == self._per_step, int(noted["rollbacks"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self._file} cannot be read ({error}); put it back, or remove it to go through the faults of the run again"
            ) from error
        later = [start for start in starts if start[0] == step or (same_steps and start[0] > step)]
        if later:
            self._starts = [*(start for start in self._starts if start[0] < later[0][0]), *later]
        self.rollbacks = max(self.rollbacks, rollbacks)

    def _order(self) -> dict[str, Any]:
        return {"rollbacks": self.rollbacks, "starts": [list(start) for start in self._starts]}
