"""Times of a step and of an update from steps of one and of two micro-batches, and medians of all that is repeated.

Notable: a run's step has many micro-batches and one update. Two kinds of steps are timed in turns, so that a busy machine
slows both, and give the time of either part; the step of the run is put together from them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds of the parts of a training step."""

    micro_batch: float
    """Forward and backward of one micro-batch."""
    update: float
    """What a step takes besides: clipping and the optimizer."""
    first: float
    """The first step, which compiles and fills caches."""

    def step(self, micro_batches: int) -> float:
        """Seconds of a step of so many micro-batches."""
        return micro_batches * self.micro_batch + self.update


def time_steps(run: Callable[[int], object], *, repetitions: int, accumulated: bool, warm: int = 1) -> StepTimes:
    """Times ``run(n)``, a step of n micro-batches that ends when its work is done, after ``warm`` of either kind.

    Where steps are not ``accumulated``, they have one micro-batch, and the update is not told apart from it.
    """
    first = seconds(lambda: run(1))
    for _ in range(warm - 1):
        run(1)
    if not accumulated:
        run(1)
        return StepTimes(
            micro_batch=median(seconds(lambda: run(1)) for _ in range(repetitions)), update=0.0, first=first
        )
    for _ in range(warm):
        run(2)
    single, double = [], []
    for _ in range(repetitions):
        single.append(seconds(lambda: run(1)))
        double.append(seconds(lambda: run(2)))
    one, two = median(single), median(double)
    # Noise must make neither part negative.
    micro_batch = min(max(two - one, one / 100), one)
    return StepTimes(micro_batch=micro_batch, update=one - micro_batch, first=first)


def seconds(run: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def best_rate(product: Callable[[int, int], float], *, sizes: tuple[int, ...]) -> float:
    """The highest rate of square matrix products, in FLOP/s: the ceiling that a training step is held against.

    ``product(size, count)`` multiplies so many times and returns the seconds. Sizes grow until one product takes a tenth
    of a second; each size is timed three times over at least 30 ms.
    """
    best = 0.0
    for size in sizes:
        product(size, 1)
        once = product(size, 1)
        count = max(1, min(1000, round(0.03 / max(once, 1e-7))))
        best = max(best, 2 * size**3 * count / median(product(size, count) for _ in range(3)))
        if once > 0.1:
            break
    return best
