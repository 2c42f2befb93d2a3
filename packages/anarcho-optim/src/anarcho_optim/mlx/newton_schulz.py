"""The approximate polar factor of a stack of matrices by Newton-Schulz iteration: the mathematics of Muon, as pure functions.

Notable: a matrix is divided by its largest entry before its norm is taken, all in float32, so that neither a huge nor a tiny update is
lost; the iteration itself may then run in half precision. What is reduced over a matrix is reduced over its rows first, because MLX gives
one result of a reduction to one block of threads: a few large matrices would leave most of a GPU idle.

Sources: Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon/); Amsel et al., "The Polar Express", arXiv:2505.16932.
"""

from __future__ import annotations

import mlx.core as mx

from anarcho_optim.coefficients import Variant

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def resolve_ns_dtype(name: str) -> mx.Dtype:
    """The arithmetic of the iteration: ``auto`` is float16 on a CUDA GPU, whose products are many times faster in it, else float32."""
    if name == "auto":
        name = "float16" if on_cuda() else "float32"
    return DTYPES[name]


def on_cuda() -> bool:
    """Whether MLX computes on a CUDA GPU."""
    return mx.default_device() == mx.gpu and mx.cuda.is_available()


def reciprocal(x: mx.array) -> mx.array:
    """1 / x where x is positive and 0 where it is zero; what is not a number stays so."""
    return mx.where(x == 0, 0.0, 1.0 / mx.where(x == 0, 1.0, x))


def frobenius_norm(matrices: mx.array) -> mx.array:
    """||X||_F of each matrix of (matrices, rows, columns), as (matrices, 1, 1)."""
    return mx.sqrt(mx.square(matrices).sum(axis=-1, keepdims=True).sum(axis=-2, keepdims=True))


def _normalize(matrices: mx.array, safety: float) -> mx.array:
    largest = mx.abs(matrices).max(axis=-1, keepdims=True).max(axis=-2, keepdims=True)
    scaled = matrices / mx.where(largest == 0, 1.0, largest)
    return scaled * reciprocal(safety * frobenius_norm(scaled))


def orthogonalize(updates: mx.array, *, variant: Variant, dtype: mx.Dtype = mx.float32) -> mx.array:
    """The approximate polar factors U V' of a stack of matrices.

    ``updates`` is float32 (matrices, rows, columns); the result has its shape and the arithmetic ``dtype``. Each matrix is normalised by
    itself in float32, so its scale does not matter; a matrix of zeros gives zeros, an empty one stays empty.
    Source: see `anarcho_optim.coefficients`.
    """
    if updates.size == 0:
        return updates.astype(dtype)
    return iterate(_normalize(updates, variant.safety).astype(dtype), variant=variant)


def iterate(x: mx.array, *, variant: Variant) -> mx.array:
    """The iteration of `orthogonalize` on normalised matrices, in their type."""
    tall = x.shape[-2] > x.shape[-1]
    for a, b, c in variant.coefficients:
        transposed = x.swapaxes(-1, -2)
        gram = transposed @ x if tall else x @ transposed
        polynomial = mx.addmm(gram, gram, gram, alpha=c, beta=b)
        x = mx.addmm(x, x, polynomial, beta=a) if tall else mx.addmm(x, polynomial, x, beta=a)
    return x
