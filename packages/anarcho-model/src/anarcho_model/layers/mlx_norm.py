"""RMSNorm on a CUDA GPU: its gradient, and the residual sum before it as one kernel with it, in forward and in backward.

Notable: MLX 0.32 sums the gradient of a gain over the tokens in as many blocks of threads as there are 32 columns, in the type of the
numbers, which was off by 3 % over 16384 tokens in bfloat16; here every block sums some rows in float32, always the same ones, so the result
is the same each time. The residual stream is read once and written once between two layers, in either direction.

Numbers are read and written 16 bytes at a time, computed in float32, and rounded once. Elsewhere than on CUDA none of this is used.
Source: RMSNorm (arXiv:1910.07467).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from jaxtyping import Float

from anarcho_model.layers.mlx_cuda import EIGHT, THREADS, VECTOR, on_cuda

__all__ = ["has_norm_gradients", "norm_gradients", "sum_norm"]

NORM_BLOCKS = 512
"""Blocks of threads that share a norm's rows: about four for each multiprocessor of an H100."""
NORM_SHARED_BYTES = 32 * 2**10
"""Bound of the sums that a block puts together."""
MAX_NORM_SIZE = 2048
"""A thread has so much of a row, and of the sums, in its registers."""

NORM = (
    EIGHT
    + """
constexpr int ROWS = THREADS / LANES;
__shared__ float sums[ROWS * SIZE];
const int lane = threadIdx.x % LANES, place = threadIdx.x / LANES, rows = x_shape[0];
const Eight zero = {uint4{0, 0, 0, 0}};
Eight gains[PARTS];
float totals[PARTS][8];
#pragma unroll
for (int part = 0; part < PARTS; ++part) {
    const int column = (part * LANES + lane) * 8;
    gains[part] = zero;
    if (column < SIZE) gains[part].bits = *reinterpret_cast<const uint4*>(weight + column);
    for (int i = 0; i < 8; ++i) totals[part][i] = 0;
}
for (int first = blockIdx.x * ROWS; first < rows; first += gridDim.x * ROWS) {
    const int row = first + place;
    const size_t start = static_cast<size_t>(row) * SIZE;
    Eight inputs[PARTS], grads[PARTS];
    float squares = 0, products = 0;
    #pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const int column = (part * LANES + lane) * 8;
        inputs[part] = grads[part] = zero;
        if (row < rows && column < SIZE) {
            inputs[part].bits = *reinterpret_cast<const uint4*>(x + start + column);
            grads[part].bits = *reinterpret_cast<const uint4*>(cotangent + start + column);
        }
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float value = float(inputs[part].values[i]);
            squares += value * value;
            products += value * float(grads[part].values[i]) * float(gains[part].values[i]);
        }
    }
    #pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) {
        squares += __shfl_xor_sync(0xffffffffu, squares, offset);
        products += __shfl_xor_sync(0xffffffffu, products, offset);
    }
    const float scale = rsqrtf(squares / SIZE + eps[0]);
    const float share = products / SIZE * scale * scale;
    #pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const int column = (part * LANES + lane) * 8;
        const bool inside = row < rows && column < SIZE;
        Eight result;
        READ_OTHER
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float value = float(inputs[part].values[i]), grad = float(grads[part].values[i]);
            totals[part][i] += grad * value * scale;
            result.values[i] = T(scale * (grad * float(gains[part].values[i]) - value * share) ADD_OTHER);
        }
        if (inside) *reinterpret_cast<uint4*>(grad_x + start + column) = result.bits;
    }
}
#pragma unroll
for (int part = 0; part < PARTS; ++part) {
    const int column = (part * LANES + lane) * 8;
    if (column < SIZE) {
        for (int i = 0; i < 8; ++i) sums[place * SIZE + column + i] = totals[part][i];
    }
}
__syncthreads();
for (int column = threadIdx.x; column < SIZE; column += THREADS) {
    float total = 0;
    for (int other = 0; other < ROWS; ++other) total += sums[other * SIZE + column];
    grad_weight[static_cast<size_t>(blockIdx.x) * SIZE + column] = total;
}
"""
)

SUM_NORM = (
    EIGHT
    + """
constexpr int ROWS = THREADS / LANES;
const int lane = threadIdx.x % LANES, row = blockIdx.x * ROWS + threadIdx.x / LANES;
const size_t start = static_cast<size_t>(row) * SIZE;
Eight inputs[PARTS];
float squares = 0;
#pragma unroll
for (int part = 0; part < PARTS; ++part) {
    const int column = (part * LANES + lane) * 8;
    if (row < x_shape[0] && column < SIZE) {
        Eight more;
        inputs[part].bits = *reinterpret_cast<const uint4*>(x + start + column);
        more.bits = *reinterpret_cast<const uint4*>(added + start + column);
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
            inputs[part].values[i] = T(float(inputs[part].values[i]) + float(more.values[i]));
            const float value = float(inputs[part].values[i]);
            squares += value * value;
        }
        *reinterpret_cast<uint4*>(sum + start + column) = inputs[part].bits;
    }
}
#pragma unroll
for (int offset = LANES / 2; offset > 0; offset /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, offset);
const float scale = rsqrtf(squares / SIZE + eps[0]);
#pragma unroll
for (int part = 0; part < PARTS; ++part) {
    const int column = (part * LANES + lane) * 8;
    if (row < x_shape[0] && column < SIZE) {
        Eight gains;
        gains.bits = *reinterpret_cast<const uint4*>(weight + column);
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
            inputs[part].values[i] = T(float(inputs[part].values[i]) * scale * float(gains.values[i]));
        }
        *reinterpret_cast<uint4*>(normed + start + column) = inputs[part].bits;
    }
}
"""
)


def has_norm_gradients(size: int, dtype: mx.Dtype) -> bool:
    """Whether `norm_gradients` takes rows of this size and type."""
    return size % VECTOR == 0 and size <= MAX_NORM_SIZE and on_cuda(dtype)


def norm_gradients(
    x: Float[mx.array, "*shape size"],
    weight: Float[mx.array, " size"],
    cotangent: Float[mx.array, "*shape size"],
    other: Float[mx.array, "*shape size"] | None = None,
    *,
    eps: float,
) -> tuple[Float[mx.array, "*shape size"], Float[mx.array, " size"]]:
    """The gradients of `mx.fast.rms_norm` for `x` and `weight`, which all have one type; `other` is added to the first."""
    size = x.shape[-1]
    threads = THREADS
    while threads // _lanes(size) * size * 4 > NORM_SHARED_BYTES:
        threads //= 2
    rows = x.reshape(-1, size)
    blocks = min(NORM_BLOCKS, -(-len(rows) // (threads // _lanes(size))))
    others = [] if other is None else [other.reshape(-1, size)]
    grad_x, sums = _kernel("norm_gradients" if other is None else "sum_norm_gradients")(
        inputs=[rows, weight, cotangent.reshape(-1, size), *others, mx.array([eps])],
        template=[("T", x.dtype), *_row_sizes(size, threads).items()],
        grid=(blocks * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[rows.shape, (blocks, size)],
        output_dtypes=[x.dtype, mx.float32],
    )
    return grad_x.reshape(x.shape), sums.sum(axis=0).astype(weight.dtype)


def sum_norm(
    x: Float[mx.array, "*shape size"],
    added: Float[mx.array, "*shape size"],
    weight: Float[mx.array, " size"],
    *,
    eps: float,
) -> list[Float[mx.array, "*shape size"]]:
    """`x + added` and the `mx.fast.rms_norm` of that, all of one type."""
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    found = _kernel("sum_norm")(
        inputs=[rows, added.reshape(-1, size), weight, mx.array([eps])],
        template=[("T", x.dtype), *_row_sizes(size, THREADS).items()],
        grid=(-(-len(rows) // (THREADS // _lanes(size))) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[rows.shape] * 2,
        output_dtypes=[x.dtype] * 2,
    )
    return [array.reshape(x.shape) for array in found]


def _lanes(size: int) -> int:
    """How many threads have a row between them."""
    return min(32, 1 << (size // VECTOR - 1).bit_length())


def _row_sizes(size: int, threads: int) -> dict[str, int]:
    return {"SIZE": size, "LANES": _lanes(size), "PARTS": -(-size // (VECTOR * _lanes(size))), "THREADS": threads}


@functools.cache
def _kernel(name: str) -> Callable[..., list[Any]]:
    inputs, outputs, source = {
        "norm_gradients": (["x", "weight", "cotangent"], ["grad_x", "grad_weight"], _norm("", "")),
        "sum_norm_gradients": (
            ["x", "weight", "cotangent", "other"],
            ["grad_x", "grad_weight"],
            _norm(READ_OTHER, "+ float(others.values[i])"),
        ),
        "sum_norm": (["x", "added", "weight"], ["sum", "normed"], SUM_NORM),
    }[name]
    kernel: Any = mx.fast.cuda_kernel(
        name=f"anarcho_{name}", input_names=[*inputs, "eps"], output_names=outputs, source=source
    )
    return kernel


READ_OTHER = """Eight others = zero;
        if (inside) others.bits = *reinterpret_cast<const uint4*>(other + start + column);"""


def _norm(read_other: str, add_other: str) -> str:
    return NORM.replace("READ_OTHER", read_other).replace("ADD_OTHER", add_other)
