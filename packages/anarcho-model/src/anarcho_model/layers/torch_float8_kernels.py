"""Triton kernels that write operands of 8-bit products, and their transposes, from what they compute or read.

Notable: a program reads a tile once and stores it in both memory orders. All arithmetic is in float32; sizes that make no whole tiles are
masked.
"""

# Triton's compiler gives the parameters of a kernel their types; a checker of Python's cannot know them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["cast_in_both_orders", "logit_gradients", "swiglu_gradients", "swiglu_hidden", "turned"]

ROWS, COLUMNS = 64, 128
"""Of a tile: among the fastest of those that `benchmarks/float8_products.py` tries, for every kernel here that has tiles."""
WARPS = 8
HIDDEN_WARPS = 4
"""Of a program that has a row of the hidden layer."""


@triton.jit
def _e5m2(x):
    """The bytes of x in e5m2, by way of float16, of which that is the upper half; what is not finite stays so.

    In integers, because ptxas (seen in 12.8 and 12.9, for sm_90) takes some bytes of its own conversion's results from wrong registers
    where they are stored in two orders.
    """
    bits = x.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    nearest = (bits + 0x7F + ((bits >> 8) & 1)) >> 8
    return tl.where(x == x, nearest, 0x7F).to(tl.uint8)


@triton.jit
def _store_in_both_orders(
    tile, rows, columns, row, column, row_stride, column_stride, tokens, width, ONLY_TURNED: tl.constexpr
):
    """Stores ``tile``, bytes of these rows and columns, and its transpose."""
    if not ONLY_TURNED:
        inside = (row[:, None] < tokens) & (column[None, :] < width)
        tl.store(rows + row[:, None] * row_stride + column[None, :], tile, mask=inside)
    inside = (column[:, None] < width) & (row[None, :] < tokens)
    tl.store(columns + column[:, None].to(tl.int64) * column_stride + row[None, :], tl.trans(tile), mask=inside)


@triton.jit
def _hidden_kernel(
    gate_up,
    hidden,
    units,
    factors,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_LIMIT: tl.constexpr,
):
    """h = silu(gate) up of one row, in units of its own."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(gate_up + row * (2 * WIDTH) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * WIDTH) + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    made = gate * tl.sigmoid(gate) * up
    unit = tl.maximum(tl.max(tl.abs(made), 0), SMALLEST_LIMIT) / LARGEST
    tl.store(hidden + row * WIDTH + column, (made / unit).to(hidden.dtype.element_ty), mask=inside)
    tl.store(units + row, unit)
    tl.store(factors + row, tl.max(tl.maximum(tl.abs(gate), tl.abs(up)), 0))


def swiglu_hidden(
    gate_up: Float[Tensor, "tokens both"], *, largest: float, smallest_limit: float
) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, "tokens 1"], Float[Tensor, "tokens 1"]]:
    """h of gate and up, side by side, in e4m3 with a unit for each row, these units, and the largest number of a row's gate and up.

    A unit is such that ``largest`` of them are the largest number of the row, or ``smallest_limit`` if that is larger.
    """
    gate_up = gate_up.contiguous()
    tokens, width = len(gate_up), gate_up.shape[1] // 2
    hidden = gate_up.new_empty((tokens, width), dtype=torch.float8_e4m3fn)
    units, factors = (gate_up.new_empty((tokens, 1), dtype=torch.float32) for _ in range(2))
    _hidden_kernel[(tokens,)](
        gate_up,
        hidden,
        units,
        factors,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        LARGEST=largest,
        SMALLEST_LIMIT=smallest_limit,
        num_warps=HIDDEN_WARPS,
    )
    return hidden, units, factors


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
    hidden = (silu * up * tl.load(hidden_scale)).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    grad_gate = _e5m2(grad * up * share * (1.0 + gate * (1.0 - share)))
    grad_up = _e5m2(grad * silu)
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
    gradient = gate_up.new_empty((tokens, 2 * width), dtype=torch.uint8)
    turned_gradient = gate_up.new_empty((2 * width, tokens), dtype=torch.uint8)
    turned_hidden = gate_up.new_empty((width, tokens), dtype=torch.uint8)
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
    e5m2, e4m3 = torch.float8_e5m2, torch.float8_e4m3fn
    return gradient.view(e5m2), turned_gradient.view(e5m2), turned_hidden.view(e4m3)


@triton.jit
def _logit_kernel(
    logits,
    normalisers,
    targets,
    grad_output,
    scale,
    rows,
    columns,
    tokens,
    VOCABULARY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(one-hot(target) - softmax) times the gradient of a token's log-probability."""
    blocks: tl.constexpr = (VOCABULARY + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    row = ((program // blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row[:, None] < tokens) & (column[None, :] < VOCABULARY)
    logit = tl.load(logits + row[:, None] * VOCABULARY + column[None, :], mask=inside, other=0.0).to(tl.float32)
    normaliser = tl.load(normalisers + row, mask=row < tokens, other=0.0)
    target = tl.load(targets + row, mask=row < tokens, other=0)
    grad = tl.load(grad_output + row, mask=row < tokens, other=0.0) * tl.load(scale)
    hit = (column[None, :] == target[:, None]).to(tl.float32)
    tile = _e5m2((hit - tl.exp(logit - normaliser[:, None])) * grad[:, None])
    _store_in_both_orders(tile, rows, columns, row, column, VOCABULARY, tokens, tokens, VOCABULARY, ONLY_TURNED=False)


def logit_gradients(
    logits: Float[Tensor, "tokens vocab"],
    normalisers: Float[Tensor, " tokens"],
    targets: Int[Tensor, " tokens"],
    grad_output: Float[Tensor, " tokens"],
    scale: Float[Tensor, ""],
) -> tuple[Float[Tensor, "tokens vocab"], Float[Tensor, "vocab tokens"]]:
    """The gradient of logits, times ``scale`` in e5m2, and its transpose, each contiguous.

    Of the log-probability of each token's target, its logit less the normaliser; ``grad_output`` is the gradient of these.
    """
    logits = logits.contiguous()
    tokens, vocabulary = logits.shape
    rows = logits.new_empty((tokens, vocabulary), dtype=torch.uint8)
    columns = logits.new_empty((vocabulary, tokens), dtype=torch.uint8)
    _logit_kernel[_grid(tokens, vocabulary)](
        logits,
        normalisers.contiguous(),
        targets.contiguous(),
        grad_output.contiguous(),
        scale,
        rows,
        columns,
        tokens,
        VOCABULARY=vocabulary,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
    )
    return rows.view(torch.float8_e5m2), columns.view(torch.float8_e5m2)


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
        tile = _e5m2(tile.to(tl.float32) * tl.load(scale))
    _store_in_both_orders(tile, rows, columns, row, column, width, tokens, tokens, width, ONLY_TURNED=TURN)


def cast_in_both_orders(
    x: Float[Tensor, "tokens width"], scale: Float[Tensor, ""]
) -> tuple[Float[Tensor, "tokens width"], Float[Tensor, "width tokens"]]:
    """``x`` times ``scale`` in e5m2, and its transpose, each contiguous."""
    x = x.contiguous()
    tokens, width = x.shape
    rows = x.new_empty((tokens, width), dtype=torch.uint8)
    columns = x.new_empty((width, tokens), dtype=torch.uint8)
    _cast_kernel[_grid(tokens, width)](
        x, scale, rows, columns, tokens, width, TURN=False, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS
    )
    return rows.view(torch.float8_e5m2), columns.view(torch.float8_e5m2)


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
