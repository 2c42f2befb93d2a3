"""Triton kernels that write operands of 8-bit products, and their transposes, from what they compute or read.

Notable: a program reads a tile once and stores it in both memory orders. All arithmetic is in float32, and rounded once; sizes that make
no whole tiles are masked.
"""

# Triton's compiler gives the parameters of a kernel their types; a checker of Python's cannot know them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

__all__ = ["cast_in_both_orders", "swiglu_gradients", "turned"]

ROWS, COLUMNS = 128, 64
"""Of a tile: a column of it, stored as a row of the transpose, fills 128 bytes, as does a row of bfloat16 that is read."""
WARPS = 8


@triton.jit
def _store_in_both_orders(
    tile, rows, columns, row, column, row_stride, column_stride, tokens, width, ONLY_TURNED: tl.constexpr
):
    """Stores ``tile``, of these rows and columns, and its transpose."""
    if not ONLY_TURNED:
        inside = (row[:, None] < tokens) & (column[None, :] < width)
        tl.store(rows + row[:, None] * row_stride + column[None, :], tile, mask=inside)
    inside = (column[:, None] < width) & (row[None, :] < tokens)
    tl.store(columns + column[:, None].to(tl.int64) * column_stride + row[None, :], tl.trans(tile), mask=inside)


@triton.jit
def _swiglu_kernel(
    gate_up,
    grad_hidden,
    scale,
    hidden_scale,
    gradient,
    turned_gate,
    turned_up,
    turned_hidden,
    tokens,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """As the kernel in full precision; h = silu(gate) up."""
    blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    row = ((program // blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row[:, None] < tokens) & (column[None, :] < WIDTH)
    wide = row[:, None] * (2 * WIDTH) + column[None, :]
    gate = tl.load(gate_up + wide, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + wide + WIDTH, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_hidden + row[:, None] * WIDTH + column[None, :], mask=inside, other=0.0).to(tl.float32)
    grad *= tl.load(scale)
    share = tl.sigmoid(gate)
    silu = gate * share
    kind = gradient.dtype.element_ty
    hidden = (silu * up * tl.load(hidden_scale)).to(turned_hidden.dtype.element_ty)
    grad_gate = (grad * up * share * (1.0 + gate * (1.0 - share))).to(kind)
    grad_up = (grad * silu).to(kind)
    _store_in_both_orders(hidden, turned_hidden, turned_hidden, row, column, 0, tokens, tokens, WIDTH, ONLY_TURNED=True)
    _store_in_both_orders(
        grad_gate, gradient, turned_gate, row, column, 2 * WIDTH, tokens, tokens, WIDTH, ONLY_TURNED=False
    )
    _store_in_both_orders(
        grad_up, gradient + WIDTH, turned_up, row, column, 2 * WIDTH, tokens, tokens, WIDTH, ONLY_TURNED=False
    )


def swiglu_gradients(
    gate_up: Float[Tensor, "tokens both"],
    grad_hidden: Float[Tensor, "tokens hidden"],
    scale: Float[Tensor, ""],
    hidden_scale: Float[Tensor, ""],
) -> tuple[Float[Tensor, "tokens both"], Float[Tensor, "both tokens"], Float[Tensor, "hidden tokens"]]:
    """The gradient of gate and up, side by side, times ``scale`` in e5m2, its transpose, and that of h times ``hidden_scale`` in e4m3."""
    gate_up, grad_hidden = gate_up.contiguous(), grad_hidden.contiguous()
    tokens, width = grad_hidden.shape
    gradient = gate_up.new_empty((tokens, 2 * width), dtype=torch.float8_e5m2)
    turned_gradient = gate_up.new_empty((2 * width, tokens), dtype=torch.float8_e5m2)
    turned_hidden = gate_up.new_empty((width, tokens), dtype=torch.float8_e4m3fn)
    _swiglu_kernel[_grid(tokens, width)](
        gate_up,
        grad_hidden,
        scale,
        hidden_scale,
        gradient,
        turned_gradient,
        turned_gradient[width:],
        turned_hidden,
        tokens,
        WIDTH=width,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
    )
    return gradient, turned_gradient, turned_hidden


@triton.jit
def _cast_kernel(
    x,
    scale,
    rows,
    columns,
    tokens,
    width,
    TURN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x times ``scale`` in both orders, or only its transpose as it is (TURN)."""
    blocks = tl.cdiv(width, COLUMNS)
    program = tl.program_id(0)
    row = ((program // blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row[:, None] < tokens) & (column[None, :] < width)
    tile = tl.load(x + row[:, None] * width + column[None, :], mask=inside, other=0)
    if not TURN:
        tile = (tile.to(tl.float32) * tl.load(scale)).to(columns.dtype.element_ty)
    _store_in_both_orders(tile, rows, columns, row, column, width, tokens, tokens, width, ONLY_TURNED=TURN)


def cast_in_both_orders(
    x: Float[Tensor, "tokens width"], scale: Float[Tensor, ""]
) -> tuple[Float[Tensor, "tokens width"], Float[Tensor, "width tokens"]]:
    """``x`` times ``scale`` in e5m2, and its transpose, each contiguous."""
    x = x.contiguous()
    tokens, width = x.shape
    rows = x.new_empty((tokens, width), dtype=torch.float8_e5m2)
    columns = x.new_empty((width, tokens), dtype=torch.float8_e5m2)
    _cast_kernel[_grid(tokens, width)](
        x, scale, rows, columns, tokens, width, TURN=False, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS
    )
    return rows, columns


def turned(x: Float[Tensor, "tokens width"]) -> Float[Tensor, "width tokens"]:
    """The transpose of a tensor of 8-bit floats, contiguous."""
    source = x.contiguous().view(torch.uint8)
    tokens, width = x.shape
    columns = source.new_empty((width, tokens))
    _cast_kernel[_grid(tokens, width)](
        source, source, columns, columns, tokens, width, TURN=True, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS
    )
    return columns.view(x.dtype)


def _grid(tokens: int, width: int) -> tuple[int]:
    return (triton.cdiv(tokens, ROWS) * triton.cdiv(width, COLUMNS),)
