"""Log-probabilities of target tokens with products in 8-bit floating point, for training that is compiled for CUDA.

As `anarcho_model.logprobs.torch`, a chunk of tokens at a time in forward and in backward. Notable:

* no number of the logits' gradient is larger than the largest of the incoming one, so it needs no pass of its own for its scale; the kernel
  that computes it from the logits writes it in 8 bits, in both orders in which products read it;
* what is compiled keeps the logits for backward, in bfloat16, in place of a product that is the same there: 2 bytes a token and id.

Shapes as in `anarcho_model.torch`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anarcho_model.layers import torch_cuda
from anarcho_model.layers.torch_float8 import (
    ALIGNMENT,
    E5M2,
    Limit,
    Narrow,
    narrow,
    narrow_weights,
    product,
    turned_inputs,
    turned_weights,
    unit_of,
    wide_enough,
)

__all__ = ["logprobs", "suits"]


def suits(hidden: Float[Tensor, "tokens dim"], weight: Float[Tensor, "vocab dim"], *, dtype: torch.dtype) -> bool:
    """Whether this is training, compiled for CUDA, of sizes that the GPU's products take and that gain."""
    fits = dtype == torch.bfloat16 and not any(size % ALIGNMENT for size in (len(hidden), *weight.shape))
    return fits and wide_enough(*weight.shape) and weight.requires_grad and torch_cuda.suits(hidden, dtype=dtype)


def logprobs(
    hidden: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "vocab dim"],
    targets: Int[Tensor, " tokens"],
    *,
    size: int,
    limit: Limit,
) -> Float[Tensor, " tokens"]:
    """`log_softmax(hidden @ weight.T)` at `targets`, about ``size`` tokens at a time; no number of ``hidden`` is larger than ``limit``."""
    inputs, own = narrow(hidden.detach(), limit.detach()), narrow_weights([weight.detach()])
    size = -(-size // ALIGNMENT) * ALIGNMENT
    return _Logprobs.apply(hidden, weight, *inputs, *own, targets, size)  # pyright: ignore[reportReturnType]


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        hidden8: Tensor,
        hidden_unit: Tensor,
        weight8: Tensor,
        weight_unit: Tensor,
        targets: Tensor,
        size: int,
    ) -> Tensor:
        found, normalisers = [], []
        for start in range(0, len(hidden8), size):
            rows = slice(start, start + size)
            logits = product(Narrow(hidden8[rows], hidden_unit), Narrow(weight8, weight_unit), fast=True).float()
            normalisers.append(logits.logsumexp(1))
            found.append(logits.gather(1, targets[rows, None])[:, 0] - normalisers[-1])
        ctx.save_for_backward(hidden8, hidden_unit, weight8, weight_unit, targets, torch.cat(normalisers))
        ctx.size, ctx.dtypes = size, (hidden.dtype, weight.dtype)
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden8, hidden_unit, weight8, weight_unit, targets, normalisers = ctx.saved_tensors
        grad_output = grad_outputs[0].contiguous()
        unit = unit_of(grad_output.abs().amax().float(), E5M2)
        weights = Narrow(weight8, weight_unit)
        turned = turned_weights(weights)
        grad_hidden = []
        grad_weight = torch.zeros(weight8.shape, dtype=torch.float32, device=weight8.device)
        for start in range(0, len(hidden8), ctx.size):
            rows = slice(start, start + ctx.size)
            part = Narrow(hidden8[rows], hidden_unit)
            logits = product(part, weights, fast=True)
            by_rows, by_columns = logit_gradients(
                logits, normalisers[rows], targets[rows], grad_output[rows], unit.reciprocal()
            )
            grad_hidden.append(product(Narrow(by_rows, unit), turned).to(ctx.dtypes[0]))
            columns = Narrow(by_columns, unit)
            grad_weight += product(columns, turned_inputs(part, columns))
        return torch.cat(grad_hidden), grad_weight.to(ctx.dtypes[1]), *(None,) * 6


@torch.library.custom_op(
    "anarcho_model::float8_logit_gradients",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor logits, Tensor normalisers, Tensor targets, Tensor grad_output, Tensor scale) -> (Tensor, Tensor)",
)
def logit_gradients(
    logits: Tensor, normalisers: Tensor, targets: Tensor, grad_output: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """See `torch_float8_kernels.logit_gradients`; Triton is imported where it is used."""
    from anarcho_model.layers import torch_float8_kernels

    return torch_float8_kernels.logit_gradients(logits, normalisers, targets, grad_output, scale)


@logit_gradients.register_fake
def _(
    logits: Tensor, normalisers: Tensor, targets: Tensor, grad_output: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    del normalisers, targets, grad_output, scale
    return logits.new_empty(logits.shape, dtype=E5M2), logits.new_empty(logits.shape[::-1], dtype=E5M2)
