"""Log-probabilities of target tokens, computed a chunk of tokens at a time in forward and in backward.

Every loss is a function of these numbers, and the logits behind them are the largest tensor of a small model (16
sequences of 4096 tokens and 32000 ids: 8 GB in float32). Notable:

* forward keeps one float32 normaliser a token and drops the logits, backward computes them again, so that never more
  than one chunk exists; only where all of them in half precision are no larger than that, they are kept, and where a compiler finds both
  products in one graph: it makes one of them and keeps its result in the compute dtype;
* matrix products run in the compute dtype that autocast asks for, normalisers and probabilities are float32 (float64
  for float64 inputs);
* backward casts by itself, because autocast is over by then;
* all products are of two-dimensional contiguous tensors under 2**31 elements, which Apple's back-end computes right.

Source: the recomputed, chunked cross-entropy of Cut Your Losses (Wijmans et al. 2024, arXiv:2411.09009) and Liger
    Kernel (arXiv:2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anarcho_model.layers.torch_cpu import transposed_product
from anarcho_model.logprobs import torch_float8
from anarcho_model.logprobs.chunks import chunk_tokens, keeps_logits

__all__ = ["chunked_logprobs"]


def chunked_logprobs(
    hidden: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "vocab dim"],
    targets: Int[Tensor, " tokens"],
    *,
    compute_dtype: torch.dtype,
    chunk_bytes: int,
    limit: torch_float8.Limit | None = None,
) -> Float[Tensor, " tokens"]:
    """`log_softmax(hidden @ weight.T)` at `targets`, in float32 (float64 for float64 weights), differentiable once.

    `chunk_bytes` bounds the float32 logits of one chunk; `compute_dtype` is the element type of the matrix products. With a ``limit``,
    above all numbers of ``hidden``, products are in 8-bit floats where that gains.
    """
    shape = {"vocab_size": weight.shape[0], "chunk_bytes": chunk_bytes}
    size = chunk_tokens(hidden.shape[0], **shape)
    if limit is not None and torch_float8.suits(hidden, weight, dtype=compute_dtype):
        return torch_float8.logprobs(hidden, weight, targets.long(), size=size, limit=limit)
    keeps = torch.is_grad_enabled() and keeps_logits(hidden.shape[0], dtype_bytes=compute_dtype.itemsize, **shape)
    return _ChunkedLogprobs.apply(hidden, weight, targets.long(), size, compute_dtype, keeps)  # pyright: ignore[reportReturnType]


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, size: int, dtype: torch.dtype, keeps: bool
    ) -> Tensor:
        hidden_cast, weight_cast = hidden.to(dtype), weight.to(dtype)
        logprobs, normalisers, kept = [], [], []
        for start in range(0, hidden.shape[0], size):
            narrow = hidden_cast[start : start + size] @ weight_cast.t()
            logits = _wide(narrow)
            if keeps:
                kept.append(narrow)
            del narrow
            target_logits = logits.gather(1, targets[start : start + size, None])[:, 0]
            normaliser = _logsumexp(logits)
            normalisers.append(normaliser)
            logprobs.append(target_logits - normaliser)
            del logits  # or it would live on beside the next chunk's
        ctx.save_for_backward(hidden, weight, targets, torch.cat(normalisers), *kept)
        ctx.size, ctx.dtype = size, dtype
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        hidden, weight, targets, normalisers, *kept = ctx.saved_tensors
        hidden_cast, weight_cast = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        grad_output = grad_outputs[0]
        grad_hidden = []
        wide = torch.promote_types(weight.dtype, torch.float32)  # what is summed over chunks
        # an adapter's base is frozen
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], ctx.size):
            rows = slice(start, start + ctx.size)
            part = hidden_cast[rows]
            logits = _wide(kept[start // ctx.size] if kept else part @ weight_cast.t())
            grad_logits = _grad_logits(logits, normalisers[rows], targets[rows], grad_output[rows]).to(ctx.dtype)
            del logits
            grad_hidden.append((grad_logits @ weight_cast).to(hidden.dtype))
            if grad_weight is None:
                pass
            elif wide == ctx.dtype:
                grad_weight.addmm_(grad_logits.t(), part)
            elif grad_logits.device.type == "cpu" and torch.compiler.is_compiling():
                grad_weight += transposed_product(grad_logits, part)
            else:
                grad_weight += grad_logits.t() @ part
            del grad_logits
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return torch.cat(grad_hidden), grad_weight, None, None, None, None


def _wide(logits: Tensor) -> Tensor:
    """Logits in the type in which they are exponentiated."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _logsumexp(logits: Tensor) -> Tensor:
    """Log of the sum of exponentials of each row; `logits` is overwritten, which saves two tensors of its size."""
    largest = logits.amax(1, keepdim=True)
    return logits.sub_(largest).exp_().sum(1).log_().add_(largest[:, 0])


def _grad_logits(logits: Tensor, normalisers: Tensor, targets: Tensor, grad_output: Tensor) -> Tensor:
    """(one-hot(targets) - softmax) * grad_output, over the storage of `logits`.

    A comparison fuses with the rest into one pass when compiled; executed op by op, a scatter touches one element a row
    instead.
    """
    probabilities = logits.sub_(normalisers[:, None]).exp_()
    if torch.compiler.is_compiling():
        ids = torch.arange(logits.shape[1], device=logits.device, dtype=torch.int32)  # as wide as the logits
        probabilities = torch.where(ids == targets[:, None].int(), probabilities - 1, probabilities)
    else:
        probabilities.scatter_add_(1, targets[:, None], torch.full_like(targets[:, None], -1, dtype=logits.dtype))
    return probabilities.mul_(-grad_output[:, None])
