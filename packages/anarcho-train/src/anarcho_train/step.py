"""The seam between the loop and a framework: one optimizer step, with batches as NumPy arrays on one side and a few numbers on the other.

Notable: losses cross the seam as sums with their weights, never as means, so that any split of a batch into micro-batches adds up to the
same step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np


class Batch(Protocol):
    """Token sequences of one shape; every array is (sequences, length)."""

    @property
    def tokens(self) -> np.ndarray:
        """Input token ids, int32."""
        ...

    @property
    def targets(self) -> np.ndarray:
        """The id that follows each input token, int32."""
        ...

    @property
    def weights(self) -> np.ndarray:
        """How much each target counts, float32; 0 for padding."""
        ...

    @property
    def positions(self) -> np.ndarray | None:
        """Position of each token in its document, int32; None where it is the column."""
        ...

    @property
    def segments(self) -> np.ndarray | None:
        """Number of the document that each token belongs to, int32; None where tokens may attend to the whole row."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepSchedule:
    """What the schedules say for one step."""

    lr_scale: float
    """Factor of every group's top learning rate."""
    momentum: float | None = None
    """Muon's momentum; None leaves the optimizer's own."""
    number: int = 0
    """Steps made before this one; random draws of the step follow from it."""
    measure_update: bool = False
    """Whether the step is to report how large its update is beside the weights."""
    max_loss: float | None = None
    """A larger mean loss changes nothing; None takes every finite one."""


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What one optimizer step reports."""

    loss: float
    """Mean loss per unit of weight before the update, in nats."""
    weight: float
    """Sum of the weights: of all targets, or the number of pairs."""
    grad_norm: float
    """Global norm of the gradient before clipping."""
    learning_rates: dict[str, float] = field(default_factory=dict)
    """Learning rate by parameter group."""
    update_ratios: dict[str, float] = field(default_factory=dict)
    """Norm of the update over the norm of the weights, by parameter group, where it was asked for."""
    skipped: bool = False
    """Whether the update was left out, since loss or gradient were not finite or the loss beyond `StepSchedule.max_loss`."""
    measures: dict[str, float] = field(default_factory=dict)
    """Means per unit of weight of what the stage measures besides its loss, by name."""


@dataclass(frozen=True, kw_only=True)
class LossSum:
    """A loss in nats with the weight that it is a sum over; sums add up."""

    loss: float = 0.0
    """Sum of weight times loss over all targets or pairs, in nats."""
    weight: float = 0.0
    """Sum of the weights."""
    measures: dict[str, float] = field(default_factory=dict)
    """Sums of what the stage measures besides its loss, by name; a stage that has any has no loss in nats per token."""

    def __add__(self, other: LossSum) -> LossSum:
        names = self.measures | other.measures
        measures = {name: self.measures.get(name, 0.0) + other.measures.get(name, 0.0) for name in names}
        return LossSum(loss=self.loss + other.loss, weight=self.weight + other.weight, measures=measures)

    def means(self) -> dict[str, float]:
        """The measures per unit of weight."""
        return {name: total / self.weight for name, total in self.measures.items()}


class Step(Protocol):
    """One framework's model, optimizer and random state behind six verbs.

    Where memory runs out, they raise `anarcho_train.OutOfMemory`, and may be called again with less.
    """

    @property
    def in_parts(self) -> bool:
        """Whether `save` writes a part of the state, and every rank has to; its files then have names that no other rank's have."""
        ...

    def train(self, micro_batches: Sequence[Batch], *, schedule: StepSchedule) -> StepMetrics:
        """One optimizer update from the micro-batches of one global batch."""
        ...

    def evaluate(self, batch: Batch) -> LossSum:
        """The loss of a batch, without an update."""
        ...

    def save(self, directory: Path) -> None:
        """Writes model, optimizer and random state into an existing directory."""
        ...

    def snapshot(self) -> Callable[[Path], None]:
        """A copy of what `save` would write now; what is returned writes it, from another thread and while training goes on."""
        ...

    def load(self, directory: Path) -> None:
        """Restores what `save` wrote; raises ValueError where it does not fit."""
        ...

    def restart(self) -> None:
        """Restores the state before the first step; raises ValueError where it is not known."""
        ...
