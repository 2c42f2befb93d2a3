"""Triton kernels of the CUDA path: what torch has no single launch for.

Notable:

* `symmetric_product` computes only the tiles on and below the diagonal of a product known to be symmetric, and mirrors them: the Gram
  matrix, its square and the polynomials of it are all symmetric. The polynomial ``a I + b A + c A^2`` needs no second pass.
* The elementwise kernels take tables of addresses, so one launch serves any number of parameters wherever their memory lies; no stack of
  gradients is built, and a captured CUDA graph stays valid when gradients move.
* Hyper-parameters are read from device memory: nothing is compiled again when a schedule changes them.

torch's own multi-tensor kernels launch once per 320 chunks or 30 to 110 tensors, so that their number grows with the layers.
"""

# Triton's compiler gives the parameters of a kernel their types; a checker of Python's cannot know them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

TILE = 64
"""Rows and columns of the tile that one program of the elementwise matrix kernels works on."""

VECTOR_BLOCK = 4096
"""Elements that one program of the AdamW kernel works on."""

NORMALIZE_BLOCK = 8192
"""Elements that one program of the normalisation works on."""


@triton.jit
def _pointer(table, index, kind: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(table + index)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address.to(tl.pointer_type(kind))


@triton.jit
def _rounded(value, kind: tl.constexpr, noise, STOCHASTIC: tl.constexpr):
    """The number in another type; to bfloat16, if that is stochastic, rounded up with the probability of what the type cuts off."""
    if STOCHASTIC and kind == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True) + (noise.to(tl.int32, bitcast=True) & 0xFFFF)
        value = (bits & -65536).to(tl.float32, bitcast=True)
    return value.to(kind)


@triton.jit
def _load_strip(pointers, rows, depth, start, n, k, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=(rows[:, None] < n) & (start + depth[None, :] < k), other=0.0)


@triton.jit
def _symmetric_product_kernel(
    a,
    b,
    addend,
    out,
    n,
    k,
    alpha,
    beta,
    diagonal,
    ADD: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile on or below the diagonal of alpha A B' + beta C + diagonal I, and its mirror image."""
    tile = tl.program_id(0)
    matrix = tl.program_id(1).to(tl.int64)
    row = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    column = tile - row * (row + 1) // 2
    rows = row * BLOCK + tl.arange(0, BLOCK)
    columns = column * BLOCK + tl.arange(0, BLOCK)
    depth = tl.arange(0, BLOCK_K)
    lefts = a + matrix * n * k + rows[:, None] * k + depth[None, :]
    rights = b + matrix * n * k + columns[:, None] * k + depth[None, :]
    accumulator = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        left = _load_strip(lefts + start, rows, depth, start, n, k, EVEN)
        right = _load_strip(rights + start, columns, depth, start, n, k, EVEN)
        accumulator = tl.dot(left, right.T, accumulator)
    accumulator = accumulator * alpha
    mask = (rows[:, None] < n) & (columns[None, :] < n)
    offsets = rows[:, None] * n + columns[None, :]
    start_of_matrix = matrix * n * n
    if ADD:
        accumulator += beta * tl.load(addend + start_of_matrix + offsets, mask=mask, other=0.0).to(tl.float32)
        accumulator = tl.where(rows[:, None] == columns[None, :], accumulator + diagonal, accumulator)
    result = accumulator.to(out.dtype.element_ty)
    tl.store(out + start_of_matrix + offsets, result, mask=mask)
    if row != column:
        mirrored = columns[:, None] * n + rows[None, :]
        mask = (columns[:, None] < n) & (rows[None, :] < n)
        tl.store(out + start_of_matrix + mirrored, result.T, mask=mask)


@triton.jit
def _symmetric_product_tma_kernel(
    a,
    b,
    addend,
    out,
    k,
    alpha,
    beta,
    diagonal,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same with the tensor memory accelerator of Hopper and later chips: the operands are tensor descriptors, which also mask."""
    tile = tl.program_id(0)
    matrix = tl.program_id(1)
    row = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    column = tile - row * (row + 1) // 2
    row_start = row * BLOCK
    column_start = column * BLOCK
    accumulator = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        left = a.load([matrix, row_start, start]).reshape(BLOCK, BLOCK_K)
        right = b.load([matrix, column_start, start]).reshape(BLOCK, BLOCK_K)
        accumulator = tl.dot(left, right.T, accumulator)
    accumulator = accumulator * alpha
    if ADD:
        accumulator += beta * addend.load([matrix, row_start, column_start]).reshape(BLOCK, BLOCK).to(tl.float32)
        rows = row_start + tl.arange(0, BLOCK)
        columns = column_start + tl.arange(0, BLOCK)
        accumulator = tl.where(rows[:, None] == columns[None, :], accumulator + diagonal, accumulator)
    result = accumulator.to(out.dtype)
    out.store([matrix, row_start, column_start], result.reshape(1, BLOCK, BLOCK))
    if row != column:
        out.store([matrix, column_start, row_start], result.T.reshape(1, BLOCK, BLOCK))


BLOCK, BLOCK_K = 128, 64


@functools.cache
def _has_tma(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _describe(stack: Tensor, columns: int) -> TensorDescriptor:
    return TensorDescriptor(stack, list(stack.shape), list(stack.stride()), [1, BLOCK, columns])


def _launch_product(a: Tensor, b: Tensor, addend: Tensor | None, alpha: float, beta: float, diagonal: float) -> Tensor:
    matrices, n, k = a.shape
    out = torch.empty((matrices, n, n), dtype=a.dtype, device=a.device)
    blocks = triton.cdiv(n, BLOCK)
    grid = (blocks * (blocks + 1) // 2, matrices)
    shape: dict[str, Any] = {"ADD": addend is not None, "BLOCK": BLOCK, "BLOCK_K": BLOCK_K}
    shape |= {"num_stages": 3, "num_warps": 4}
    # The accelerator wants rows that start at multiples of 16 bytes.
    if _has_tma(a.device) and n % 8 == 0 and k % 8 == 0:
        left, result = _describe(a, BLOCK_K), _describe(out, BLOCK)
        right = left if b is a else _describe(b, BLOCK_K)
        added = result if addend is None else _describe(addend, BLOCK)
        _symmetric_product_tma_kernel[grid](left, right, added, result, k, alpha, beta, diagonal, **shape)
    else:
        added = a if addend is None else addend
        even = n % BLOCK == 0 and k % BLOCK_K == 0
        _symmetric_product_kernel[grid](a, b, added, out, n, k, alpha, beta, diagonal, EVEN=even, **shape)
    return out


def symmetric_product(a: Tensor, b: Tensor) -> Tensor:
    """A B' for half-precision contiguous (matrices, n, k) stacks whose product is known to be symmetric."""
    return _launch_product(a, b, None, 1.0, 0.0, 0.0)


def polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """aI + bA + cA^2 of a symmetric contiguous stack A (matrices, n, n)."""
    return _launch_product(gram, gram, gram, c, b, a)


@triton.jit
def _momentum_kernel(
    table,
    settings,
    x,
    maxima,
    squares,
    seed,
    rows,
    columns,
    first,
    NESTEROV: tl.constexpr,
    TALL: tl.constexpr,
    GRADIENT: tl.constexpr,
    STATE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """m <- mu m + (1 - mu) g; writes the update, rows <= columns, in bfloat16, and each tile's largest entry and scaled sum of squares."""
    if tl.load(settings + 5) != 0:
        return
    mu = tl.load(settings + 2)
    matrix = first + tl.program_id(1)
    tile = tl.program_id(0)
    # Neighbouring programs read neighbouring memory of the parameter.
    if TALL:
        tile_rows = tl.cdiv(rows, TILE)
        row = tile % tile_rows * TILE + tl.arange(0, TILE)
        column = tile // tile_rows * TILE + tl.arange(0, TILE)
    else:
        tile_columns = tl.cdiv(columns, TILE)
        row = tile // tile_columns * TILE + tl.arange(0, TILE)
        column = tile % tile_columns * TILE + tl.arange(0, TILE)
    gradients = _pointer(table, matrix * 5, GRADIENT, ALIGNED)
    momenta = _pointer(table, matrix * 5 + 1, STATE, ALIGNED)
    stride = tl.load(table + matrix * 5 + 3)
    if ALIGNED:
        stride = tl.multiple_of(stride, 8)
    if TALL:
        offsets = column[:, None].to(tl.int64) * stride + row[None, :]
        mask = (column[:, None] < columns) & (row[None, :] < rows)
    else:
        offsets = row[:, None].to(tl.int64) * stride + column[None, :]
        mask = (row[:, None] < rows) & (column[None, :] < columns)
    g = tl.load(gradients + offsets, mask=mask, other=0.0).to(tl.float32) * tl.load(settings + 6)
    m = tl.load(momenta + offsets, mask=mask, other=0.0).to(tl.float32)
    m = m + (1.0 - mu) * (g - m)
    noise = tl.randint(tl.load(seed) + 2 * matrix, offsets.to(tl.int32)) if STOCHASTIC else 0
    tl.store(momenta + offsets, _rounded(m, STATE, noise, STOCHASTIC), mask=mask)
    u = m
    if NESTEROV:
        u = g + mu * (m - g)
    largest = tl.max(tl.max(tl.abs(u), axis=1), axis=0)
    scaled = u / tl.where(largest > 0, largest, 1.0)
    position = matrix * tl.num_programs(0) + tile
    tl.store(maxima + position, largest)
    tl.store(squares + position, tl.sum(tl.sum(scaled * scaled, axis=1), axis=0))
    half = u.to(tl.bfloat16)
    if TALL:
        half = tl.trans(half)
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    target = matrix.to(tl.int64) * rows * columns + row[:, None] * columns + column[None, :]
    tl.store(x + target, half, mask=mask)


@triton.jit
def _normalize_kernel(x, out, maxima, squares, tiles, elements, safety, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """x / (safety ||x||_F) per matrix, from the largest entries and the scaled sums of squares of its tiles; zeros stay zeros."""
    matrix = tl.program_id(1)
    tile = tl.arange(0, TILES)
    largest = tl.load(maxima + matrix * tiles + tile, mask=tile < tiles, other=0.0)
    total = tl.load(squares + matrix * tiles + tile, mask=tile < tiles, other=0.0)
    top = tl.max(largest, axis=0)
    ratio = largest / tl.where(top > 0, top, 1.0)
    norm = tl.sqrt(tl.sum(total * ratio * ratio, axis=0))
    inverse = tl.where(top > 0, 1.0 / (tl.where(top > 0, norm * top, 1.0) * safety), 0.0)
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < elements
    start = matrix.to(tl.int64) * elements
    value = tl.load(x + start + offsets, mask=mask).to(tl.float32) * inverse
    tl.store(out + start + offsets, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _apply_kernel(
    table,
    settings,
    scales,
    factors,
    o,
    seed,
    rows,
    columns,
    first,
    TALL: tl.constexpr,
    PARAMETER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    FACTORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """W <- (1 - lr wd) W - lr S O, where O is stored with rows <= columns; FACTORS is the dimension of O that `factors` multiply, or -1."""
    if tl.load(settings + 5) != 0:
        return
    lr = tl.load(settings)
    decay = lr * tl.load(settings + 1)
    matrix = first + tl.program_id(1)
    tile = tl.program_id(0)
    tile_columns = tl.cdiv(columns, TILE)
    row = tile // tile_columns * TILE + tl.arange(0, TILE)
    column = tile % tile_columns * TILE + tl.arange(0, TILE)
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    source = matrix.to(tl.int64) * rows * columns + row[:, None] * columns + column[None, :]
    update = tl.load(o + source, mask=mask, other=0.0).to(tl.float32) * tl.load(scales + matrix)
    if FACTORS == 0:
        update *= tl.load(factors + (matrix - first) * rows + row, mask=row < rows, other=0.0)[:, None]
    if FACTORS == 1:
        update *= tl.load(factors + (matrix - first) * columns + column, mask=column < columns, other=0.0)[None, :]
    parameters = _pointer(table, matrix * 5 + 2, PARAMETER, ALIGNED)
    stride = tl.load(table + matrix * 5 + 3)
    if ALIGNED:
        stride = tl.multiple_of(stride, 8)
    if TALL:
        update = tl.trans(update)
        offsets = column[:, None].to(tl.int64) * stride + row[None, :]
        mask = tl.trans(mask)
    else:
        offsets = row[:, None].to(tl.int64) * stride + column[None, :]
    w = tl.load(parameters + offsets, mask=mask, other=0.0).to(tl.float32)
    decayed = w - decay * w
    if CAUTIOUS:
        decayed = tl.where(update * w >= 0, decayed, w)
    noise = tl.randint(tl.load(seed) + 2 * matrix + 1, offsets.to(tl.int32)) if STOCHASTIC else 0
    tl.store(parameters + offsets, _rounded(decayed - lr * update, PARAMETER, noise, STOCHASTIC), mask=mask)


@triton.jit
def _adamw_kernel(
    table,
    owners,
    settings,
    corrections,
    seed,
    MASKED: tl.constexpr,
    GRADIENT: tl.constexpr,
    PARAMETER: tl.constexpr,
    STATE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """AdamW on one chunk of one parameter; `owners` holds the parameter and the chunk's start of every program."""
    if tl.load(settings + 5) != 0:
        return
    lr = tl.load(settings)
    decay = tl.load(settings + 1)
    beta1 = tl.load(settings + 2)
    beta2 = tl.load(settings + 3)
    eps = tl.load(settings + 4)
    program = tl.program_id(0)
    owner = tl.load(owners + program * 2)
    start = tl.multiple_of(tl.load(owners + program * 2 + 1), BLOCK)
    row = table + owner * 6
    offsets = start + tl.arange(0, BLOCK)
    gradients = _pointer(row, 0, GRADIENT, ALIGNED) + offsets
    parameters = _pointer(row, 1, PARAMETER, ALIGNED) + offsets
    first_moments = _pointer(row, 2, STATE, ALIGNED) + offsets
    second_moments = _pointer(row, 3, STATE, ALIGNED) + offsets
    correction1 = tl.load(corrections + owner * 2)
    correction2 = tl.load(corrections + owner * 2 + 1)
    # A mask of a length that is only known here forbids wide loads, so whole chunks have none.
    mask = offsets < tl.load(row + 5) if MASKED else None
    g = tl.load(gradients, mask=mask).to(tl.float32) * tl.load(settings + 6)
    w = tl.load(parameters, mask=mask).to(tl.float32)
    m = tl.load(first_moments, mask=mask).to(tl.float32)
    v = tl.load(second_moments, mask=mask).to(tl.float32)
    m = m + (1.0 - beta1) * (g - m)
    v = beta2 * v + (1.0 - beta2) * g * g
    if STOCHASTIC:
        noise1, noise2, noise3, _ = tl.randint4x(tl.load(seed) + owner, offsets.to(tl.int32))
    else:
        noise1, noise2, noise3 = 0, 0, 0
    tl.store(first_moments, _rounded(m, STATE, noise1, STOCHASTIC), mask=mask)
    tl.store(second_moments, _rounded(v, STATE, noise2, STOCHASTIC), mask=mask)
    w = w - lr * decay * w
    w = w - lr / correction1 * m / (tl.sqrt(v) / correction2 + eps)
    tl.store(parameters, _rounded(w, PARAMETER, noise3, STOCHASTIC), mask=mask)


@triton.jit
def _advance_kernel(table, settings, corrections, parameters, BLOCK: tl.constexpr):
    """Adds 1 to the step t of every parameter of the table; writes 1 - beta1^t and sqrt(1 - beta2^t), computed in double precision."""
    if tl.load(settings + 5) != 0:
        return
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < parameters
    steps = tl.load(table + index * 6 + 4, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(steps, mask=mask, other=0.0) + 1.0
    tl.store(steps, step, mask=mask)
    log1 = tl.log(tl.load(settings + 2).to(tl.float64))
    log2 = tl.log(tl.load(settings + 3).to(tl.float64))
    correction1 = 1.0 - tl.exp(step.to(tl.float64) * log1)
    correction2 = tl.sqrt(1.0 - tl.exp(step.to(tl.float64) * log2))
    tl.store(corrections + index * 2, correction1.to(tl.float32), mask=mask)
    tl.store(corrections + index * 2 + 1, correction2.to(tl.float32), mask=mask)


DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def advance_momentum(
    table: Tensor,
    settings: Tensor,
    parts: Sequence[tuple[int, int, bool]],
    x: Tensor,
    *,
    nesterov: bool,
    gradient_dtype: torch.dtype,
    aligned: bool,
    safety: float,
    state_dtype: torch.dtype = torch.float32,
    seed: Tensor | None = None,
) -> None:
    """Advances the momenta of a table of matrices; writes the normalised updates to ``x`` (matrices, rows <= columns), half precision.

    ``seed``, one integer on the device, asks for stochastic rounding of momenta in bfloat16.
    """
    device = table.device
    count, rows, columns = x.shape
    raw = x.view(torch.bfloat16)
    tiles = triton.cdiv(rows, TILE) * triton.cdiv(columns, TILE)
    maxima, squares = torch.empty((2, count, tiles), dtype=torch.float32, device=device).unbind()
    for first, number, tall in parts:
        _momentum_kernel[(tiles, number)](
            table,
            settings,
            raw,
            maxima,
            squares,
            table if seed is None else seed,
            rows,
            columns,
            first,
            NESTEROV=nesterov,
            TALL=tall,
            GRADIENT=DTYPES[gradient_dtype],
            STATE=DTYPES[state_dtype],
            STOCHASTIC=seed is not None and state_dtype == torch.bfloat16,
            ALIGNED=aligned,
            TILE=TILE,
        )
    elements = rows * columns
    _normalize_kernel[(triton.cdiv(elements, NORMALIZE_BLOCK), count)](
        raw,
        x,
        maxima,
        squares,
        tiles,
        elements,
        safety,
        TILES=triton.next_power_of_2(tiles),
        BLOCK=NORMALIZE_BLOCK,
    )


def apply_updates(
    table: Tensor,
    settings: Tensor,
    scales: Tensor,
    factors: Tensor | None,
    o: Tensor,
    *,
    first: int,
    number: int,
    tall: bool,
    factor_dim: int,
    parameter_dtype: torch.dtype,
    cautious: bool,
    aligned: bool,
    seed: Tensor | None = None,
) -> None:
    """Decays the matrices ``first`` to ``first + number`` of a table and subtracts their scaled updates; ``factors`` (number, neurons)."""
    _, rows, columns = o.shape
    tiles = triton.cdiv(rows, TILE) * triton.cdiv(columns, TILE)
    _apply_kernel[(tiles, number)](
        table,
        settings,
        scales,
        scales if factors is None else factors,
        o,
        table if seed is None else seed,
        rows,
        columns,
        first,
        TALL=tall,
        PARAMETER=DTYPES[parameter_dtype],
        STOCHASTIC=seed is not None and parameter_dtype == torch.bfloat16,
        CAUTIOUS=cautious,
        FACTORS=factor_dim,
        ALIGNED=aligned,
        TILE=TILE,
    )


def adamw(
    table: Tensor,
    whole_chunks: Tensor,
    last_chunks: Tensor,
    settings: Tensor,
    *,
    gradient_dtype: torch.dtype,
    parameter_dtype: torch.dtype,
    aligned: bool,
    state_dtype: torch.dtype = torch.float32,
    seed: Tensor | None = None,
) -> None:
    """One AdamW update of every parameter of the table, its step included."""
    corrections = torch.empty((len(table), 2), dtype=torch.float32, device=table.device)
    _advance_kernel[(triton.cdiv(len(table), 128),)](table, settings, corrections, len(table), BLOCK=128)
    for chunks, masked in ((whole_chunks, False), (last_chunks, True)):
        if len(chunks):
            _adamw_kernel[(len(chunks),)](
                table,
                chunks,
                settings,
                corrections,
                table if seed is None else seed,
                MASKED=masked,
                GRADIENT=DTYPES[gradient_dtype],
                PARAMETER=DTYPES[parameter_dtype],
                STATE=DTYPES[state_dtype],
                STOCHASTIC=seed is not None and torch.bfloat16 in (parameter_dtype, state_dtype),
                ALIGNED=aligned,
                BLOCK=VECTOR_BLOCK,
            )
