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

__all__ = ["has_norm_gradients", "norm_gradients", "sum_norm", "sum_norm_gradients"]

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
            float total = scale * (grad * float(gains[part].values[i]) - value * share);
            ADD_OTHER
            result.values[i] = T(total);
        }
        if (inside) *reinterpret_cast<uint4*>(grad_x + start + column) = result.bits;
        WRITE_WIDE
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

STREAM = """
struct alignas(16) Stream { S values[8]; };
"""

SUM_NORM = (
    EIGHT
    + STREAM
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
        Stream numbers = *reinterpret_cast<const Stream*>(x + start + column);
        Eight more;
        more.bits = *reinterpret_cast<const uint4*>(added + start + column);
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
            numbers.values[i] = S(float(numbers.values[i]) + float(more.values[i]));
            inputs[part].values[i] = T(float(numbers.values[i]));
            const float value = float(inputs[part].values[i]);
            squares += value * value;
        }
        *reinterpret_cast<Stream*>(sum + start + column) = numbers;
        WRITE_ROUNDED
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
    *,
    eps: float,
) -> tuple[Float[mx.array, "*shape size"], Float[mx.array, " size"]]:
    """The gradients of `mx.fast.rms_norm` for `x` and `weight`, which all have one type."""
    (grad_x,), grad_weight = _norm_gradients("norm_gradients", [x, weight, cotangent], [x.dtype], eps=eps)
    return grad_x, grad_weight


def sum_norm_gradients(
    x: Float[mx.array, "*shape size"],
    weight: Float[mx.array, " size"],
    cotangent: Float[mx.array, "*shape size"],
    other: Float[mx.array, "*shape size"],
    *,
    eps: float,
) -> tuple[Float[mx.array, "*shape size"], Float[mx.array, "*shape size"], Float[mx.array, " size"]]:
    """The gradients of `mx.fast.rms_norm` of a sum `x`, whose own gradient is `other`: for the sum, in the types of `other` and of `x`."""
    types = [x.dtype] if x.dtype == other.dtype else [x.dtype, other.dtype]
    name = f"sum_norm_gradients_{len(types)}"
    grads, grad_weight = _norm_gradients(name, [x, weight, cotangent, other], types, eps=eps, S=other.dtype)
    return grads[-1], grads[0], grad_weight


def _norm_gradients(
    name: str, inputs: list[mx.array], types: list[mx.Dtype], *, eps: float, **template: mx.Dtype
) -> tuple[list[mx.array], mx.array]:
    x, weight = inputs[:2]
    size = x.shape[-1]
    threads = THREADS
    while threads // _lanes(size) * size * 4 > NORM_SHARED_BYTES:
        threads //= 2
    rows = [array if array.ndim == 1 else array.reshape(-1, size) for array in inputs]
    blocks = min(NORM_BLOCKS, -(-len(rows[0]) // (threads // _lanes(size))))
    *grads, sums = _kernel(name)(
        inputs=[*rows, mx.array([eps])],
        template=[("T", x.dtype), *template.items(), *_row_sizes(size, threads).items()],
        grid=(blocks * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[*(rows[0].shape for _ in types), (blocks, size)],
        output_dtypes=[*types, mx.float32],
    )
    return [grad.reshape(x.shape) for grad in grads], sums.sum(axis=0).astype(weight.dtype)


def _lanes(size: int) -> int:
    """How many threads have a row between them."""
    return min(32, 1 << (size // VECTOR - 1).bit_length())


def _row_sizes(size: int, threads: int) -> dict[str, int]:
    return {"SIZE": size, "LANES": _lanes(size), "PARTS": -(-size // (VECTOR * _lanes(size))), "THREADS": threads}


def sum_norm(
    x: Float[mx.array, "*shape size"],
    added: Float[mx.array, "*shape size"],
    weight: Float[mx.array, " size"],
    *,
    eps: float,
) -> tuple[Float[mx.array, "*shape size"], Float[mx.array, "*shape size"], Float[mx.array, "*shape size"]]:
    """`x + added` in the type of `x`, the same in that of `added`, and the `mx.fast.rms_norm` of the latter."""
    size = x.shape[-1]
    types = [added.dtype] if x.dtype == added.dtype else [added.dtype, added.dtype]
    flat = x.reshape(-1, size)
    total, *others = _kernel(f"sum_norm_{len(types)}")(
        inputs=[flat, added.reshape(-1, size), weight, mx.array([eps])],
        template=[("T", added.dtype), ("S", x.dtype), *_row_sizes(size, THREADS).items()],
        grid=(-(-len(flat) // (THREADS // _lanes(size))) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[flat.shape] * (1 + len(types)),
        output_dtypes=[x.dtype, *types],
    )
    total, *others = (array.reshape(x.shape) for array in (total, *others))
    return total, others[-2] if len(others) > 1 else total, others[-1]


NORM_INPUTS = ["x", "weight", "cotangent"]
SUM_INPUTS = ["x", "added", "weight"]
READ_OTHER = """Stream others = {};
        if (inside) others = *reinterpret_cast<const Stream*>(other + start + column);"""
ADD_OTHER = "total += float(others.values[i]); others.values[i] = S(total);"
WRITE_WIDE = "if (inside) *reinterpret_cast<Stream*>(grad_sum + start + column) = others;"
WRITE_ROUNDED = "*reinterpret_cast<uint4*>(rounded + start + column) = inputs[part].bits;"


@functools.cache
def _kernel(name: str) -> Callable[..., list[Any]]:
    """The kernel of a name, which for a sum ends in the number of types that are written down of it."""
    inputs, outputs, source = {
        "norm_gradients": (NORM_INPUTS, ["grad_x", "grad_weight"], _norm()),
        "sum_norm_gradients_1": ([*NORM_INPUTS, "other"], ["grad_x", "grad_weight"], _norm(READ_OTHER, ADD_OTHER)),
        "sum_norm_gradients_2": (
            [*NORM_INPUTS, "other"],
            ["grad_x", "grad_sum", "grad_weight"],
            _norm(READ_OTHER, ADD_OTHER, WRITE_WIDE),
        ),
        "sum_norm_1": (SUM_INPUTS, ["sum", "normed"], SUM_NORM.replace("WRITE_ROUNDED", "")),
        "sum_norm_2": (SUM_INPUTS, ["sum", "rounded", "normed"], SUM_NORM.replace("WRITE_ROUNDED", WRITE_ROUNDED)),
    }[name]
    kernel: Any = mx.fast.cuda_kernel(
        name=f"anarcho_{name}", input_names=[*inputs, "eps"], output_names=outputs, source=source
    )
    return kernel


def _norm(read_other: str = "", add_other: str = "", write_wide: str = "") -> str:
    source = NORM if not read_other else STREAM + NORM
    for place, code in {"READ_OTHER": read_other, "ADD_OTHER": add_other, "WRITE_WIDE": write_wide}.items():
        source = source.replace(place, code)
    return source
