"""How fast a run is and when it will end, from a monotonic clock.

Notable:

* tokens/s is the median over the last steps, so that one stall does not show as a slow run;
* the first step, which compiles and fills caches, enters neither tokens/s nor the remaining time;
* the remaining time is the mean over the newer half of all steps, which follows a run that got slower or faster, plus the
  evaluations and checkpoints still to come, each at its own median. It is within 10 % of the truth once a fifth is done;
* model FLOP utilisation is (FLOPs the model needs per token) x tokens/s / peak, as in the PaLM paper (arXiv 2204.02311, B).
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from anarcho_monitor.errors import MonitorError

# Peak dense FLOP/s in bfloat16 with float32 sums, from the makers' data sheets; Apple's are the published float32 figures, which
# its GPUs do not exceed in half precision. Later Apple GPUs have no published figure and stay unknown.
_PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "Apple M1": 2.6e12,
    "Apple M1 Pro": 5.2e12,
    "Apple M1 Max": 10.4e12,
    "Apple M1 Ultra": 21e12,
    "Apple M2": 3.6e12,
}
_APPLE_VARIANTS = {"Pro", "Max", "Ultra"}


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s of a device by its full name, such as "NVIDIA H100 80GB HBM3" or "Apple M1 Pro"; None where unknown."""
    words = device_name.replace("-", " ").split()
    for length in range(len(words), 0, -1):
        peak = _PEAK_FLOPS.get(" ".join(words[:length]))
        # "Apple M2 Max" must not pass for an "Apple M2": a variant that is not listed has no published figure.
        if peak is not None and not _APPLE_VARIANTS.intersection(words[length:]):
            return peak
    return None


class _Step(NamedTuple):
    tokens: int
    seconds: float
    waited: float


@dataclass
class _Pause:
    every: int | None
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=16))
    total_seconds: float = 0.0

    def typical_seconds(self) -> float:
        # The first evaluation compiles, too: it counts only until there is another.
        seconds = list(self.seconds)
        return median(seconds[1:] or seconds)


class Throughput:
    """Measures a run of `total_steps` optimizer steps of which `first_step` were done before it began (or resumed).

    The loop marks what it does: `with throughput.waiting()` around fetching data, `with throughput.pause("validation",
    every=100)` around what is no training step, and `finish_step(tokens)` at the end of each step.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        first_step: int = 0,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        window: int = 50,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if window < 1:
            raise MonitorError(f"The throughput window is {window}, but it must be at least 1 step: raise it.")
        self.total_steps = total_steps
        self.step = first_step
        self._first_step = first_step
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._clock = clock
        self._recent: deque[_Step] = deque(maxlen=window)
        self._elapsed = array("d", [0.0])  # after each measured step; 8 bytes a step buy an exact mean over any stretch
        self._pauses: dict[str, _Pause] = {}
        self._waited = self._paused = 0.0
        self._mark = clock()

    def begin(self, first_step: int) -> None:
        """The run begins now, or goes on, after `first_step` steps; what was measured before is forgotten."""
        self.step = self._first_step = first_step
        self._recent.clear()
        self._elapsed = array("d", [0.0])
        self._pauses.clear()
        self._waited = self._paused = 0.0
        self._mark = self._clock()

    def finish_step(self, tokens: int) -> None:
        """Ends an optimizer step that trained on `tokens` tokens."""
        now = self._clock()
        step = _Step(tokens, max(now - self._mark - self._paused, 1e-9), self._waited)
        self.step += 1
        if self.step == self._first_step + 2:
            self._recent.clear()  # only now is there a step to stand in for the first one
        self._recent.append(step)
        if self.step > self._first_step + 1:
            self._elapsed.append(self._elapsed[-1] + step.seconds)
        self._mark, self._waited, self._paused = now, 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Marks a stretch of a step that waits for data."""
        begin = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - begin

    @contextmanager
    def pause(self, name: str, *, every: int | None = None) -> Iterator[None]:
        """Marks a stretch outside any training step, such as an evaluation; `every` is its period in steps, where it has one."""
        begin = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - begin
            self._paused += seconds
            pause = self._pauses.setdefault(name, _Pause(every))
            pause.every = every
            pause.seconds.append(seconds)
            pause.total_seconds += seconds

    @property
    def tokens_per_second(self) -> float:
        """Median over the last steps; 0 before the first one."""
        return median(step.tokens / step.seconds for step in self._recent) if self._recent else 0.0

    @property
    def step_seconds(self) -> float:
        """Median seconds of the last steps; 0 before the first one."""
        return median(step.seconds for step in self._recent) if self._recent else 0.0

    @property
    def data_wait_share(self) -> float:
        """Share of the last steps' time that was spent waiting for data, from 0 to 1."""
        seconds = sum(step.seconds for step in self._recent)
        return sum(step.waited for step in self._recent) / seconds if seconds else 0.0

    @property
    def flop_utilisation(self) -> float | None:
        """Share of the device's peak that the model's own FLOPs take; None where either is unknown."""
        if self._flops_per_token is None or self._peak_flops is None:
            return None
        return self._flops_per_token * self.tokens_per_second / self._peak_flops

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the last step is done, pauses included; None until a step besides the first one was measured."""
        measured = len(self._elapsed) - 1
        if measured == 0:
            return None
        newer_half = min(measured, max(20, measured // 2))
        per_step = (self._elapsed[-1] - self._elapsed[-1 - newer_half]) / newer_half
        remaining = max(0, self.total_steps - self.step)
        return remaining * per_step + sum(self._remaining_pause(pause) for pause in self._pauses.values())

    def metrics(self) -> dict[str, float]:
        """What is known, by the names under which a training loop logs it."""
        values = {
            "tokens_per_second": self.tokens_per_second,
            "step_seconds": self.step_seconds,
            "data_wait_share": self.data_wait_share,
            "flop_utilisation": self.flop_utilisation,
            "eta_seconds": self.eta_seconds,
        }
        return {name: value for name, value in values.items() if value is not None}

    def _remaining_pause(self, pause: _Pause) -> float:
        if pause.every:
            return (self.total_steps // pause.every - self.step // pause.every) * pause.typical_seconds()
        done = self.step - self._first_step
        return pause.total_seconds / max(done, 1) * max(0, self.total_steps - self.step)
