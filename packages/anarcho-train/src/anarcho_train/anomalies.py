"""Where a loss or gradient that is not finite comes from: the step at fault is done again, and looked at.

Notable: a step whose numbers are not finite has changed nothing, and what is random in it follows from its number. So nothing has to be
watched beforehand, and training under `AnomalyDetection` is as fast as without it until there is something to look for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from anarcho_train.step import Batch, LossSum, Step, StepMetrics, StepSchedule


class NonFiniteNumbers(ValueError):
    """A step's loss or gradient was not finite; the message says where the first such number was found."""


class ExplainingStep(Step, Protocol):
    """A step that can say where numbers that are not finite come from."""

    def explain(self, micro_batches: Sequence[Batch], *, schedule: StepSchedule) -> str | None:
        """Does the arithmetic of a step again, without an update, and names the first number that is not finite; None if all are."""
        ...


class AnomalyDetection:
    """A step that ends the run at the first loss or gradient that is not finite, with a sentence that says where it comes from.

    Everything else is the ``step``'s own. With float16 an overflow of the scaled gradient is no fault, and the run goes on.
    """

    def __init__(self, step: ExplainingStep) -> None:
        self._step = step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)

    @property
    def in_parts(self) -> bool:
        """As the step's."""
        return self._step.in_parts

    def train(self, micro_batches: Sequence[Batch], *, schedule: StepSchedule) -> StepMetrics:
        """As the step's; raises `NonFiniteNumbers`."""
        metrics = self._step.train(micro_batches, schedule=schedule)
        if math.isfinite(metrics.loss) and (math.isfinite(metrics.grad_norm) or _scales(self._step)):
            return metrics
        found = self._step.explain(micro_batches, schedule=schedule)
        what = f"step {schedule.number + 1} has loss {metrics.loss} and gradient norm {metrics.grad_norm}"
        if found is None:
            raise NonFiniteNumbers(
                f"{what}, but done again all its numbers were finite; expected the same numbers: suspect the machine's memory or heat, or "
                "an operation that is not deterministic"
            )
        raise NonFiniteNumbers(f"{what}; {found}")

    def evaluate(self, batch: Batch) -> LossSum:
        """As the step's."""
        return self._step.evaluate(batch)

    def save(self, directory: Path) -> None:
        """As the step's."""
        self._step.save(directory)

    def snapshot(self) -> Callable[[Path], None]:
        """As the step's."""
        return self._step.snapshot()

    def load(self, directory: Path) -> None:
        """As the step's."""
        self._step.load(directory)

    def restart(self) -> None:
        """As the step's."""
        self._step.restart()


def _scales(step: Any) -> bool:
    """Whether the step multiplies its loss to keep float16's gradients from vanishing, at the price of overflows."""
    return str(step.precision).rpartition(".")[2] == "float16"
