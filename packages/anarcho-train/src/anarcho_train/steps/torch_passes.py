"""A forward pass of the training step in PyTorch: from the arrays of a batch to its loss, in the compute type.

Notable: arrays, the random ones included, reach a pass as tensors of the same names, so that it can be recorded and done again with others
(`steps.torch_graphs`). Everything measured is a sum over the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from anarcho_train.interfaces import Draws
from anarcho_train.losses.torch import answer_logprobs
from anarcho_train.step import Batch, LossSum
from anarcho_train.steps.torch_graphs import Arrays, Tensors, host_tensor

INDICES = ("tokens", "targets", "positions", "segments")
"""The model's arguments that are whole numbers."""
LOSS = "loss."
"""Before the names of arrays that the loss reads."""


class LanguageModel(Protocol):
    """What the step asks of a model besides being an `nn.Module`."""

    def token_logprobs(
        self, tokens: Tensor, targets: Tensor, *, positions: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """Log-probabilities of ``targets``, float32 (batch, length), in nats; with `Draws`, it takes them as well."""
        ...


class StageLoss(Protocol):
    """The loss of a training stage; everything that it returns is a sum, which the step divides once by the weight of all its batches."""

    def weight(self, batch: Batch) -> float:
        """What the loss of the batch is a sum over: the targets' weights, or pairs."""
        ...

    def arrays(self, batch: Batch) -> dict[str, np.ndarray]:
        """The arrays of the batch that the loss reads besides log-probabilities; they reach it as tensors on the model's device."""
        ...

    def __call__(self, logprobs: Tensor, arrays: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """From ``logprobs`` float32 (batch, length) the loss, a scalar with a gradient, and further measures, scalars without one."""
        ...


@dataclass(frozen=True)
class Sums:
    """What was measured on each micro-batch, summed over it, on the device."""

    names: tuple[str, ...]
    """Of the measures besides the loss."""
    values: Tensor
    """(micro-batches, 1 + measures), the loss first."""


class Passes:
    """Passes of a model over batches; ``logprobs`` is its function, compiled or not, and ``loss`` that of the stage."""

    def __init__(self, model: nn.Module, loss: StageLoss, *, precision: torch.dtype, draws: Draws | None) -> None:
        self.logprobs: Callable[..., Tensor] = model.token_logprobs  # type: ignore[assignment]
        self.loss = loss
        self._device = next(model.parameters()).device
        self._precision, self._draws = precision, draws

    def arrays(self, batch: Batch, draws: Mapping[str, np.ndarray]) -> Arrays:
        """What a pass over the batch reads: the model's arguments, and what the loss reads, named so that they differ."""
        # What the batch lacks is to be found before the model has worked on it.
        of_loss = {LOSS + name: array for name, array in self.loss.arrays(batch).items()}
        return _arguments(batch, draws) | of_loss

    def drawn(self, batch: Batch, *, step: int, first_row: int) -> Arrays:
        """The same in the training step of this number, of which the batch begins with this row."""
        return self.arrays(batch, self._draws(batch, step=step, first_row=first_row) if self._draws else {})

    def neutral(self, batch: Batch) -> Mapping[str, np.ndarray]:
        """Arrays like those drawn in training that change nothing."""
        return self._draws.neutral(batch) if self._draws else {}

    def tensors(self, arrays: Arrays) -> Tensors:
        """The arrays on the model's device."""
        return {name: self._tensor(array) for name, array in arrays.items()}

    def loss_of(
        self, tensors: Tensors, *, logprobs: Callable[..., Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, a scalar with a gradient, and what else is measured; by other ``logprobs`` where some are given."""
        of_loss = {name.removeprefix(LOSS): tensor for name, tensor in tensors.items() if name.startswith(LOSS)}
        of_model = {name: tensor for name, tensor in tensors.items() if not name.startswith(LOSS)}
        return self.loss(self._forward(of_model, logprobs or self.logprobs), of_loss)

    def measured(self, tensors: Tensors) -> Sums:
        """The loss of a batch and what else is measured, without a gradient."""
        return sums_of([self.loss_of(tensors)])

    def answers(self, batch: Batch, draws: Mapping[str, np.ndarray]) -> Tensor:
        """The log-probability of each row's counted targets together, float32 (rows,), in nats; the loss is not asked."""
        logprobs = self._forward(self.tensors(_arguments(batch, draws)), self.logprobs)
        return answer_logprobs(logprobs.detach(), self._tensor(batch.weights))

    def _forward(self, tensors: Tensors, logprobs: Callable[..., Tensor]) -> Tensor:
        arguments = {name: tensor.long() if name in INDICES else tensor for name, tensor in tensors.items()}
        with self._autocast():
            return logprobs(arguments.pop("tokens"), arguments.pop("targets"), **arguments)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return host_tensor(array, self._device).to(self._device, non_blocking=self._device.type == "cuda")

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._precision == torch.float32:
            return nullcontext()
        # What is cast is read once; cached, it would stay to the end of a forward pass that keeps nothing else.
        return torch.autocast(self._device.type, dtype=self._precision, cache_enabled=False)


def sums_of(found: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> Sums:
    """From the loss and the measures of each micro-batch."""
    rows = [torch.stack([loss.detach(), *measures.values()]) for loss, measures in found]
    return Sums(tuple(found[0][1]), torch.stack(rows))


def total_of(names: Sequence[str], measured: Sequence[Sequence[float]], *, weight: float) -> LossSum:
    """The sum of losses, first in each row, and of the measures of these names, which are over ``weight`` together."""
    loss, *others = (sum(column) for column in zip(*measured, strict=True))
    return LossSum(loss=loss, weight=weight, measures=dict(zip(names, others, strict=True)))


def _arguments(batch: Batch, draws: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the model reads."""
    arrays = {name: getattr(batch, name) for name in INDICES}
    return {name: array for name, array in arrays.items() if array is not None} | dict(draws)
