"""Causal attention in MLX, whose backward holds no scores of a long sequence whole, with a fused gradient or without.

Notable: MLX has a kernel for the gradient on CUDA alone. Elsewhere queries go in chunks, each of which sees only the keys
    up to its end, and backward computes a chunk's scores again. Chunks depend on each other (`mx.depends`), because MLX
    evaluates in breadth and would have the scores of all at once.

Shapes as in `anarcho_model.mlx`. Source: attention without stored scores (Rabe and Staats 2021, arXiv:2112.05682).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
from jaxtyping import Float

from anarcho_model.layers.mlx_cuda import on_cuda

__all__ = ["attend", "attend_in_training"]

KEPT_SCORES_BYTES = 8 * 2**20
"""Up to this size, the attention scores of a layer are kept for backward where its gradient is not a fused kernel."""
SCORES_CHUNK_BYTES = 256 * 2**20
"""Otherwise at most about this many bytes of float32 scores exist at a time, in forward and in backward."""
MIN_CHUNK_QUERIES = 64
"""But a chunk has at least so many queries, or the graph of a very long sequence had too many operations."""


def attend(
    q: Float[mx.array, "batch heads length head"],
    k: Float[mx.array, "batch kv keys head"],
    v: Float[mx.array, "batch kv keys head"],
    *,
    mask: Float[mx.array, "rows 1 length keys"] | None,
) -> Float[mx.array, "batch heads length head"]:
    """Softmax attention scaled by 1/sqrt(head), with `mask` added to the scores, or without one to all keys up to the query."""
    return mx.fast.scaled_dot_product_attention(
        q, k, v, scale=1 / math.sqrt(q.shape[-1]), mask="causal" if mask is None else mask
    )


def attend_in_training(
    q: Float[mx.array, "batch heads length head"],
    k: Float[mx.array, "batch kv length head"],
    v: Float[mx.array, "batch kv length head"],
    *,
    mask: Float[mx.array, "rows 1 length length"] | None,
) -> Float[mx.array, "batch heads length head"]:
    """`attend` for queries and keys of the same tokens, whose backward never holds the scores of a long sequence whole.

    MLX has a fused gradient on CUDA alone; elsewhere it would keep the scores of every layer. There the queries go in
    chunks that see only the keys before them, half of the work, and backward computes each chunk's scores again.
    """
    batch, heads, length, _ = q.shape
    if has_fused_gradient(q) or batch * heads * length**2 * q.dtype.size <= KEPT_SCORES_BYTES:
        return attend(q, k, v, mask=mask)
    size = min(length, max(MIN_CHUNK_QUERIES, SCORES_CHUNK_BYTES // (4 * batch * heads * length)))
    return attend_in_chunks(q, k, v, mask=mask, size=-(-length // -(-length // size)))


def has_fused_gradient(q: Float[mx.array, "batch heads length head"]) -> bool:
    """Whether MLX's attention has a kernel for its gradient (MLX 0.32: cuDNN's conditions)."""
    head = q.shape[-1]
    return head % 8 == 0 and head <= 128 and q.shape[2] % 128 == 0 and on_cuda(q.dtype)


def attend_in_chunks(
    q: Float[mx.array, "batch heads length head"],
    k: Float[mx.array, "batch kv length head"],
    v: Float[mx.array, "batch kv length head"],
    *,
    mask: Float[mx.array, "rows 1 length length"] | None,
    size: int,
) -> Float[mx.array, "batch heads length head"]:
    """`attend`, `size` queries at a time, in forward and in backward."""

    def part(start: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        stop = start + q.shape[2]
        rows = None if mask is None else mask[:, :, start:stop, :stop]
        return attend(q, k, v, mask=rows)

    starts = range(0, q.shape[2], size)

    @mx.custom_function
    def whole(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        parts: list[mx.array] = []
        for start in starts:
            queries = q[:, :, start : start + size]
            if parts:  # one after the other, or the scores of all would exist at once
                queries = mx.depends(queries, parts[-1])
            stop = start + queries.shape[2]
            parts.append(part(start, queries, k[:, :, :stop], v[:, :, :stop]))
        return mx.concatenate(parts, axis=2)

    @whole.vjp
    def _(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        q, k, v = primals
        grad_k, grad_v = mx.zeros(k.shape, mx.float32), mx.zeros(v.shape, mx.float32)
        grads_q: list[mx.array] = []
        before: list[mx.array] = [cotangent]
        for start in starts:
            queries, upstream = mx.depends(
                [q[:, :, start : start + size], cotangent[:, :, start : start + size]], before
            )
            stop = start + queries.shape[2]
            inputs = [queries, k[:, :, :stop], v[:, :, :stop]]
            dq, dk, dv = mx.vjp(lambda q, k, v, start=start: part(start, q, k, v), inputs, [upstream])[1]
            grad_k, grad_v = grad_k.at[:, :, :stop].add(dk), grad_v.at[:, :, :stop].add(dv)
            grads_q.append(dq)
            before = [dq, grad_k, grad_v]
        return mx.concatenate(grads_q, axis=2), grad_k.astype(k.dtype), grad_v.astype(v.dtype)

    return whole(q, k, v)  # pyright: ignore[reportReturnType]
