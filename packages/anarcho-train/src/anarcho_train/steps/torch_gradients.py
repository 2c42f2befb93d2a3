"""Gradients in the compute type where that loses nothing, their norm, and their clipping.

Notable: autocast computes the gradient of a weight that one matrix product reads in the compute type, and widens it only to store it. Where
nothing is added to it, that is where a step has one micro-batch, it may as well be stored as it is: half the memory, the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class GradientTypes:
    """The element types in which a model's gradients are stored, from one step to the next.

    Only the weights that the model names in ``product_weights()``, and those that are themselves of the type ``compute``, may have
    gradients of it, and only if ``optimizer`` takes a ``grad_scale``: clipped in place, they would be rounded. Without ``saves_memory``,
    the former stay wide on a CPU, where an optimizer takes longer to widen than to read them.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, compute: torch.dtype, saves_memory: bool
    ) -> None:
        named: Any = getattr(model, "product_weights", list)
        products = {id(weight) for weight in named() if saves_memory or weight.device.type != "cpu"}
        takes_scale = getattr(optimizer, "_step_supports_amp_scaling", False)
        usable = [p for p in model.parameters() if p.requires_grad and takes_scale and compute == torch.bfloat16]
        self._weights: list[Any] = [p for p in usable if p.dtype == compute or id(p) in products]
        self._compute = compute
        self.narrow: bool | None = None
        """Whether gradients of this step are of the compute type where they may be."""

    def begin(self, *, accumulated: bool) -> None:
        """Sets the types for a step whose gradients are, or are not, sums over micro-batches; there are none at this moment."""
        narrow = bool(self._weights) and not accumulated
        if narrow == self.narrow:
            return
        self.narrow = narrow
        for weight in self._weights:
            weight.grad_dtype = self._compute if narrow else torch.float32


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together in float32, of all ranks where they hold shards."""
    if any(hasattr(gradient, "full_tensor") for gradient in gradients):
        norm: Any = torch.nn.utils.get_total_norm(gradients)
        return norm.full_tensor()
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    # Tensors of one type are few kernels together, those of several one for each tensor.
    types = {gradient.dtype for gradient in gradients}
    together = [[g for g in gradients if g.dtype == dtype] for dtype in sorted(types, key=str)]
    norms = [norm for group in together for norm in torch._foreach_norm(group, 2.0, dtype=torch.float32)]
    return torch.linalg.vector_norm(torch.stack(norms))


@contextmanager
def clipped(optimizer: torch.optim.Optimizer, norm: Tensor, bound: float) -> Iterator[None]:
    """Within the block the optimizer divides gradients, which stay as they are, so that their norm is at most ``bound`` (0: any)."""
    scaling: Any = optimizer
    scaling.grad_scale = (norm + 1e-6) / bound if bound and bool(norm > bound) else None
    try:
        yield
    finally:
        scaling.grad_scale = None
