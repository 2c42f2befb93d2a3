"""The approximate polar factor of a stack of matrices by Newton-Schulz iteration: the mathematics of Muon, as pure functions.

Notable:

* One step is ``X <- P X`` with the symmetric ``P = aI + bA + cA^2``, ``A = XX'``: the identity is folded into P, so that a step is three
  plain products, which batched matrix multiplication does faster than products with an addend.
* For matrices much longer than wide, several steps are composed on the small Gram matrix before the long matrix is touched again: with
  R = A, each step needs P(R), the next R is P R P, and the product of the Ps is applied once (`segments`). Rounding in R is amplified by
  the coefficients, so a segment is two steps at most, three in float16 after the first two, whose coefficients are the largest.
* Products of polynomials in one matrix are symmetric: where a kernel computes half of such a product, it is passed in as `Products`.

Sources: Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon/); Amsel et al., "The Polar Express", arXiv:2505.16932, which also
describes the iteration on the Gram matrix (algorithm 4) and its restarts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from anarcho_optim.coefficients import Coefficients, Variant

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

LONG = 2
"""Matrices with more than this many columns per row are iterated on their Gram matrix."""


def native_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 matrices in hardware: CUDA from compute capability 8.0, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def resolve_ns_dtype(name: str, device: torch.device) -> torch.dtype:
    """The arithmetic of the iteration on ``device``.

    ``auto`` is float16 on CUDA from compute capability 7.0: as fast as bfloat16 there, with three bits more, and in no need of its range,
    because the input is normalised in float32 and no entry exceeds the coefficients; bfloat16 on CPUs that have it natively (float16 is
    slow there); float32 elsewhere, MPS included.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else torch.float32
    return torch.bfloat16 if native_bfloat16(device) else torch.float32


def _symmetric_product(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b.mT)


def _polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    # Added in float32: on the CPU, a scalar is rounded to bfloat16 before it meets a bfloat16 tensor, which would bias every step.
    diagonal = polynomial.diagonal(dim1=-2, dim2=-1)
    diagonal.copy_(diagonal.float() + a)
    return polynomial


@dataclass(frozen=True, kw_only=True)
class Products:
    """The two symmetric products of the iteration on (matrices, n, k) stacks."""

    symmetric: Callable[[Tensor, Tensor], Tensor] = _symmetric_product
    """A B' for stacks whose product is known to be symmetric."""
    polynomial: Callable[[Tensor, float, float, float], Tensor] = _polynomial
    """aI + bA + cA^2 of a symmetric stack A."""


PLAIN = Products()


def segments(steps: int, *, rows: int, columns: int, dtype: torch.dtype) -> list[int]:
    """Lengths of the runs of steps that are composed on the Gram matrix of a (rows <= columns) matrix; 1 is a direct step."""
    if columns <= LONG * rows:
        return [1] * steps
    if dtype != torch.float16:
        # The odd step goes where its error is smaller: in bfloat16 last, in float32 first, where the coefficients are largest.
        odd, pairs = [1] * (steps % 2), [2] * (steps // 2)
        return odd + pairs if dtype == torch.float32 else pairs + odd
    lengths = [min(2, steps)]
    while sum(lengths) < steps:
        lengths.append(min(3, steps - sum(lengths)))
    return lengths


def _composed(x: Tensor, coefficients: Coefficients, products: Products) -> Tensor:
    """The product of the polynomials of one segment's steps, (matrices, rows, rows)."""
    gram = products.symmetric(x, x)
    composed: Tensor | None = None
    # At most four square stacks are there at a time, see `stack_bytes`: what is not needed any more is let go before the next is made.
    for index, (a, b, c) in enumerate(coefficients):
        polynomial = products.polynomial(gram, a, b, c)
        if index + 1 < len(coefficients):
            gram = products.symmetric(polynomial, gram)
            gram = products.symmetric(polynomial, gram)
        else:
            gram = polynomial
        composed = polynomial if composed is None else products.symmetric(polynomial, composed)
    assert composed is not None
    return composed


def stack_bytes(rows: int, columns: int, *, element_bytes: int) -> int:
    """The most that `iterate` holds for each (rows <= columns) matrix: the iterate before and after a segment, and four square stacks."""
    return element_bytes * (2 * rows * columns + 4 * rows * rows)


def iterate(x: Tensor, variant: Variant, *, products: Products = PLAIN) -> Tensor:
    """All steps on a normalised stack (matrices, rows, columns), in its dtype; ``x``, contiguous, is overwritten.

    Matrices with more rows than columns are iterated as they lie: X P with P of X'X is the transpose of P X' with P of (X')(X')'.
    """
    rows, columns = x.shape[-2:]
    tall = rows > columns
    short, long = (columns, rows) if tall else (rows, columns)
    spare, start = torch.empty_like(x), 0
    for length in segments(len(variant.coefficients), rows=short, columns=long, dtype=x.dtype):
        composed = _composed(x.mT if tall else x, variant.coefficients[start : start + length], products)
        # Written to a contiguous tensor: to a transposed one, the CPU takes a path that is thousands of times slower.
        torch.bmm(*((x, composed) if tall else (composed, x)), out=spare)
        del composed
        x, spare = spare, x
        start += length
    return x


SAFE_NORMS = (1e-12, 1e12)
"""Frobenius norms between which a sum of squares in float32 neither overflows nor loses small entries."""


def _frobenius_norm(x: Tensor, *, exact: bool) -> Tensor:
    """||x||_F per matrix, (matrices, 1, 1), of a float32 stack of any scale; not ``exact`` is faster on CPUs, to float32 rounding."""
    if x.device.type == "mps":  # which has no double precision
        largest = x.abs().amax(dim=(-2, -1), keepdim=True)
        scaled = torch.where(largest > 0, x / largest, 0.0)
        return torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True) * largest
    if x.device.type == "cpu" and not exact:
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        if ((norm > SAFE_NORMS[0]) & (norm < SAFE_NORMS[1])).all():
            return norm
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64)


def orthogonalize(updates: Tensor, *, variant: Variant, dtype: torch.dtype = torch.float32) -> Tensor:
    """The approximate polar factors U V' of a stack of matrices.

    ``updates`` is float32 (matrices, rows, columns); the result has its shape and the arithmetic ``dtype``. Each matrix is normalised by
    itself in float32, so its scale does not matter, however small or large; a matrix of zeros gives zeros, an empty one stays empty.
    Source: see `anarcho_optim.coefficients`.
    """
    return orthogonalize_(updates.clone(), variant=variant, dtype=dtype)


def orthogonalize_(updates: Tensor, *, variant: Variant, dtype: torch.dtype) -> Tensor:
    """`orthogonalize`, with ``updates`` as its scratch memory."""
    if updates.numel() == 0:
        return updates.to(dtype)
    norm = _frobenius_norm(updates, exact=dtype == torch.float32)
    inverse = torch.where(norm > 0, 1.0 / (norm * variant.safety), 0.0).clamp(max=1e38)
    x = updates.mul_(inverse.to(updates.dtype))
    return iterate(x.to(dtype).contiguous(), variant)
