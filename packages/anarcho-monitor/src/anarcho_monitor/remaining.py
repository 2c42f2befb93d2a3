"""When a run will end, from the records that a sink receives and the moments at which they arrive.

For a loop that does not keep a `Throughput` itself. Notable: a "train" record tells what a step took; whatever else passes between
two of them went into evaluations and checkpoints, and is expected again with each evaluation to come. The stretch up to the first
"train" record holds the compilation and is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class _Mark(NamedTuple):
    step: int
    training_seconds: float


class RemainingTime:
    """Estimates the seconds left of a run of `total_steps` steps."""

    def __init__(self, total_steps: int, *, clock: Callable[[], float]) -> None:
        self._total_steps = total_steps
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Forgets what was measured: an attempt begins, and it will compile again."""
        self._marks: list[_Mark] = []
        self._validations: list[int] = []
        self._began = self._now = 0.0

    def validated(self, step: int) -> None:
        """Takes note of an evaluation after `step`."""
        if self._marks:
            self._validations.append(step)

    def trained(self, step: int, step_seconds: float) -> None:
        """Takes note of a record after `step`, with the mean seconds of a step since the record before."""
        self._now = self._clock()
        if not self._marks:
            self._began = self._now
            self._marks.append(_Mark(step, 0.0))
        elif step > self._marks[-1].step:
            last = self._marks[-1]
            self._marks.append(_Mark(step, last.training_seconds + (step - last.step) * step_seconds))

    @property
    def seconds(self) -> float | None:
        """Seconds left, evaluations and checkpoints included; None before the second "train" record."""
        if len(self._marks) < 2:
            return None
        # The newer half follows a run that got slower or faster.
        first, last = self._marks[len(self._marks) // 2 - 1], self._marks[-1]
        per_step = (last.training_seconds - first.training_seconds) / (last.step - first.step)
        steps = max(0, self._total_steps - last.step)
        return steps * per_step + self._pauses_left(steps)

    def _pauses_left(self, steps: int) -> float:
        last = self._marks[-1]
        paused = max(0.0, self._now - self._began - last.training_seconds)
        if len(self._validations) < 2:
            return paused / (last.step - self._marks[0].step) * steps
        period = (self._validations[-1] - self._validations[0]) / (len(self._validations) - 1)
        # The small amount keeps a period such as 100/3 from losing its last evaluation to rounding.
        to_come = int((self._total_steps - self._validations[-1]) / period + 1e-6) if period else 0
        return paused / len(self._validations) * to_come
