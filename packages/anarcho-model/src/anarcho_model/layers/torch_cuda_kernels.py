"""Triton kernels of the backward passes that the compiler of PyTorch makes slow: SwiGLU's, and the one through rotary positions.

Notable: what both write is the gradient of one joint product, whose parts lie side by side in each row. The compiler writes such a row
part by part with a choice at every element; here a program knows the part that it writes. All arithmetic is in float32 and rounded once;
sizes that make no whole tiles are masked.
"""

# Triton's compiler gives the parameters of a kernel their types; a checker of Python's cannot know them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

__all__ = ["pack_rotary_gradients", "swiglu_gradients"]

TILE = 1024
"""Elements that one program reads of each operand at a time: eight of each thread, 16 bytes of a half-precision type."""
WARPS = 4
HEADS_OF_PROGRAM = 4
"""Heads for which one program reads the cosines and sines of its tokens once."""


@triton.jit
def _swiglu_kernel(
    gate_up,
    hidden,
    grad_gate_up,
    tokens,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradients of gate and up, which lie side by side, from that of h = silu(gate) up, in whose place h itself is written."""
    blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    row = ((program // blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = ((program % blocks) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < tokens) & (column < WIDTH)
    narrow, wide = row * WIDTH + column, row * (2 * WIDTH) + column
    gate = tl.load(gate_up + wide, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + wide + WIDTH, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(hidden + narrow, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    silu = gate * share
    kind = hidden.dtype.element_ty
    tl.store(hidden + narrow, (silu * up).to(kind), mask=inside)
    tl.store(grad_gate_up + wide, (grad * up * share * (1.0 + gate * (1.0 - share))).to(kind), mask=inside)
    tl.store(grad_gate_up + wide + WIDTH, (grad * silu).to(kind), mask=inside)


def swiglu_gradients(
    gate_up: Float[Tensor, "tokens both"], hidden: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, "tokens both"]:
    """The gradient of gate and up, side by side, from that of the hidden layer h = silu(gate) up; where this was, there is then h."""
    gate_up, dense = gate_up.contiguous(), hidden.contiguous()
    grad_gate_up = torch.empty_like(gate_up)
    tokens, width = dense.shape
    columns = width & -width  # the largest power of two that divides it needs no mask
    columns = min(columns if columns >= TILE // 8 else triton.next_power_of_2(width), TILE)
    rows = TILE // columns
    grid = (triton.cdiv(tokens, rows) * triton.cdiv(width, columns),)
    _swiglu_kernel[grid](gate_up, dense, grad_gate_up, tokens, WIDTH=width, ROWS=rows, COLUMNS=columns, num_warps=WARPS)
    if dense is not hidden:
        hidden.copy_(dense)
    return grad_gate_up


@triton.jit
def _turn_back(grads, out, cos, sin, inside, HALF: tl.constexpr):
    first = tl.load(grads, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(grads + HALF, mask=inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(out, (first * cos + second * sin).to(kind), mask=inside)
    tl.store(out + HALF, (second * cos - first * sin).to(kind), mask=inside)


@triton.jit
def _copy(grads, out, inside, HALF: tl.constexpr):
    first = tl.load(grads, mask=inside)
    second = tl.load(grads + HALF, mask=inside)
    tl.store(out, first, mask=inside)
    tl.store(out + HALF, second, mask=inside)


@triton.jit
def _rotary_kernel(
    grad_q,
    grad_k,
    grad_v,
    cos,
    sin,
    out,
    tokens,
    length,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    table_batch,
    table_row,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A row of all heads of a token from three tensors, those of q and k turned back by the angles of its position."""
    slots: tl.constexpr = HEADS + 2 * KV_HEADS
    groups: tl.constexpr = (slots + GROUP - 1) // GROUP
    program = tl.program_id(0)
    group = program % groups  # programs that run together read and write neighbouring memory
    token = ((program // groups) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    inside = (token < tokens) & (lane < HALF)
    batch, row = token // length, token % length
    angles = batch * table_batch + row * table_row + lane
    cosine = tl.load(cos + angles, mask=inside, other=0.0)
    sine = tl.load(sin + angles, mask=inside, other=0.0)
    start = out + token * (slots * 2 * HALF) + lane
    for index in tl.static_range(GROUP):
        slot = group * GROUP + index
        target = start + slot * (2 * HALF)
        if slot < HEADS:
            source = grad_q + batch * q_batch + row * q_row + slot.to(tl.int64) * q_head + lane
            _turn_back(source, target, cosine, sine, inside, HALF)
        elif slot < HEADS + KV_HEADS:
            source = grad_k + batch * k_batch + row * k_row + (slot - HEADS).to(tl.int64) * k_head + lane
            _turn_back(source, target, cosine, sine, inside, HALF)
        elif slot < slots:
            source = grad_v + batch * v_batch + row * v_row + (slot - HEADS - KV_HEADS).to(tl.int64) * v_head + lane
            _copy(source, target, inside, HALF)


def pack_rotary_gradients(
    grad_q: Float[Tensor, "batch heads length head"],
    grad_k: Float[Tensor, "batch kv length head"],
    grad_v: Float[Tensor, "batch kv length head"],
    cos: Float[Tensor, "rows 1 length half"],
    sin: Float[Tensor, "rows 1 length half"],
) -> Float[Tensor, "tokens all_heads"]:
    """The gradient of the product that q, k, before they were rotated, and v are the parts of; in its memory order."""
    grads = [grad if grad.stride(-1) == 1 else grad.contiguous() for grad in (grad_q, grad_k, grad_v)]
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, heads, length, head = grad_q.shape
    kv_heads, half, tokens = grad_k.shape[1], head // 2, batch * length
    out = grad_q.new_empty((tokens, (heads + 2 * kv_heads) * head))
    lanes = triton.next_power_of_2(half)
    rows = max(TILE // lanes, 1)
    groups = triton.cdiv(heads + 2 * kv_heads, HEADS_OF_PROGRAM)
    _rotary_kernel[(triton.cdiv(tokens, rows) * groups,)](
        *grads,
        cos,
        sin,
        out,
        tokens,
        length,
        *(stride for grad in grads for stride in grad.stride()[:3]),
        0 if len(cos) == 1 else cos.stride(0),
        cos.stride(2),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=half,
        ROWS=rows,
        LANES=lanes,
        GROUP=HEADS_OF_PROGRAM,
        num_warps=WARPS,
    )
    return out
