"""Linear layers and causal attention for models that are compiled for a CPU, where gradients are slow as PyTorch writes them.

Notable:

* the gradient of a weight is a product over tokens, of whose left operand oneDNN wants the tokens side by side. It puts them there
  itself, a block at a time, which costs less than a transposed copy made before: on two cores with AVX512-BF16 the products run at 0.87 to
  0.9 of the speed of those of forward where the left operand is the one named in `transposed_product`, and at 0.8 the other way round;
* attention is products of blocks of queries with the keys that they see, around a softmax that is compiled: about twice as fast, forward
  and backward together, as PyTorch's kernel, whose backward does without oneDNN's products. Nothing is kept for backward but what that
  kernel keeps: inputs, result and one normaliser a query;
* backward makes weights that lie key by key, so that of its five products one alone has its operand the wrong way round.

Both round products to the compute dtype, as autocast does everywhere. Shapes as in `anarcho_model.torch`. Source of the attention:
FlashAttention (arXiv:2205.14135).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["MAX_LENGTH", "causal_attention", "linear", "transposed_product"]

MAX_LENGTH = 2048
"""Up to this many tokens attention is made of whole products; beyond, what a block of them takes is much more than the kernel's."""
MUCH_WIDER = 4
"""From this ratio of widths on, the wider operand of a product over tokens is the left one, else the narrower."""
BLOCK_TOKENS, MAX_BLOCKS = 128, 8
"""The least tokens of a block, and the most blocks: a quarter to almost half of the products are left out, and few are compiled."""


def linear(
    x: Float[Tensor, "tokens inputs"], *weights: Float[Tensor, "_ inputs"], dtype: torch.dtype
) -> Float[Tensor, "tokens outputs"]:
    """`x` by all weights, one beside the other, as one product in `dtype`."""
    return _Linear.apply(x, dtype, *weights)  # pyright: ignore[reportReturnType]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, *weights: Tensor) -> Tensor:
        together = torch.cat([weight.to(dtype) for weight in weights])
        narrow = x.to(dtype)
        ctx.save_for_backward(narrow, together)
        ctx.types, ctx.rows = (x.dtype, weights[0].dtype), [len(weight) for weight in weights]
        return narrow @ together.t()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, (x_type, weight_type) = grad_outputs[0], ctx.types
        grad_x = (grad @ weight).to(x_type) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[2:]):
            return grad_x, None, *(None for _ in ctx.rows)
        grad_weight = transposed_product(grad, x).to(weight_type).contiguous()
        return grad_x, None, *grad_weight.split(ctx.rows)


def transposed_product(a: Float[Tensor, "tokens m"], b: Float[Tensor, "tokens n"]) -> Float[Tensor, "m n"]:
    """`a.t() @ b`, for many tokens."""
    if a.shape[1] < b.shape[1]:
        return transposed_product(b, a).t()
    return a.t() @ b if a.shape[1] >= MUCH_WIDER * b.shape[1] else (b.t() @ a).t()


def causal_attention(
    q: Float[Tensor, "batch heads length head"],
    k: Float[Tensor, "batch heads length head"],
    v: Float[Tensor, "batch heads length head"],
) -> Float[Tensor, "batch heads length head"]:
    """Softmax attention scaled by 1/sqrt(head) of each query to the keys up to it; differentiable once."""
    batch, heads, length, _ = q.shape
    blocks = min(-(-length // BLOCK_TOKENS), MAX_BLOCKS)
    bounds = [(length * index // blocks, length * (index + 1) // blocks) for index in range(blocks)]
    flat = (x.reshape(batch * heads, length, -1) for x in (q, k, v))
    return _CausalAttention.apply(*flat, bounds).view(batch, heads, length, -1)  # pyright: ignore[reportOptionalMemberAccess]


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
        results, normalisers = [], []
        for start, stop in bounds:
            seen = k[:, :stop].contiguous(), v[:, :stop].contiguous()
            scores = _scores(q[:, start:stop].contiguous(), seen[0]) + _hidden_keys(start, stop, keys=(0, stop))
            largest = scores.amax(-1, keepdim=True)
            weights = (scores - largest).exp()
            total = weights.sum(-1, keepdim=True)
            results.append((torch.bmm(weights.to(v.dtype), seen[1]) / total).to(v.dtype))
            normalisers.append((largest + total.log())[..., 0])
        result = torch.cat(results, 1)
        ctx.save_for_backward(q, k, v, result, torch.cat(normalisers, 1))
        ctx.bounds = bounds
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, result, normaliser = ctx.saved_tensors
        grad, scale = grad_outputs[0], q.shape[-1] ** -0.5
        inner = (_wide(grad) * _wide(result)).sum(-1)
        grad_q: list[list[Tensor]] = [[] for _ in ctx.bounds]
        grad_k, grad_v = [], []
        for index, (start, stop) in enumerate(ctx.bounds):
            keys, values = k[:, start:stop].contiguous(), v[:, start:stop].contiguous()
            queries, grads = q[:, start:].contiguous(), grad[:, start:].contiguous()
            hidden = _hidden_keys(start, q.shape[1], keys=(start, stop)).t()
            weights = (_scores(keys, queries) + hidden - normaliser[:, None, start:]).exp()
            grad_weights = _wide(torch.bmm(values, grads.mT))
            grad_scores = (weights * (grad_weights - inner[:, None, start:]) * scale).to(q.dtype)
            grad_v.append(torch.bmm(weights.to(v.dtype), grads))
            grad_k.append(torch.bmm(grad_scores, queries))
            part = torch.bmm(grad_scores.mT, keys)
            for later, (first, last) in list(enumerate(ctx.bounds))[index:]:
                grad_q[later].append(_wide(part[:, first - start : last - start]))
        sums = [sum(parts[1:], parts[0]) for parts in grad_q]
        return torch.cat(sums, 1).to(q.dtype), torch.cat(grad_k, 1), torch.cat(grad_v, 1), None


def _scores(a: Float[Tensor, "stack m head"], b: Float[Tensor, "stack n head"]) -> Float[Tensor, "stack m n"]:
    return _wide(torch.bmm(a, b.mT)) * a.shape[-1] ** -0.5


def _hidden_keys(start: int, stop: int, *, keys: tuple[int, int]) -> Float[Tensor, "queries keys"]:
    """0 where a query from `start` to `stop` sees a key, else minus infinity; numbers are floats, which are compared faster."""
    queries = torch.arange(start, stop, dtype=torch.float32)
    return torch.where(torch.arange(*keys, dtype=torch.float32) <= queries[:, None], 0.0, -torch.inf)


def _wide(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return x.to(torch.promote_types(x.dtype, torch.float32))
