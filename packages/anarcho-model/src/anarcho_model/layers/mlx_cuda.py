"""Kernels for what MLX 0.32 is slow at on a CUDA GPU: the gradients of RMSNorm and of the gated product.

Notable: MLX sums the gradient of a norm's gain over the tokens in as many blocks of threads as there are 32 columns, in the type of the
numbers, which was off by 3 % over 16384 tokens in bfloat16; here every block sums some rows in float32, always the same ones, so the result
is the same each time. Of the gated product's gradient, what two results share is computed once and never written down.

Numbers are read and written 16 bytes at a time, computed in float32, and rounded once. Elsewhere than on CUDA none of this is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from jaxtyping import Float

__all__ = ["gated_gradients", "has_gated_gradients", "has_norm_gradients", "norm_gradients"]

VECTOR = 8
"""Numbers of half precision in 16 bytes."""
THREADS = 256
NORM_BLOCKS = 512
"""Blocks of threads that share a norm's rows: about four for each multiprocessor of an H100."""
NORM_SHARED_BYTES = 32 * 2**10
"""Bound of the sums that a block puts together."""
MAX_NORM_SIZE = 2048
"""A thread has so much of a row, and of the sums, in its registers."""

EIGHT = """
union Eight {
    uint4 bits;
    T values[8];
};
"""

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
        Eight result;
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float value = float(inputs[part].values[i]), grad = float(grads[part].values[i]);
            totals[part][i] += grad * value * scale;
            result.values[i] = T(scale * (grad * float(gains[part].values[i]) - value * share));
        }
        if (row < rows && column < SIZE) *reinterpret_cast<uint4*>(grad_x + start + column) = result.bits;
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

GATED = (
    EIGHT
    + """
const size_t start = (static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
if (start >= static_cast<size_t>(gate_shape[0])) return;
Eight gates, ups, grads, grad_gates, grad_ups, products;
gates.bits = *reinterpret_cast<const uint4*>(gate + start);
ups.bits = *reinterpret_cast<const uint4*>(up + start);
grads.bits = *reinterpret_cast<const uint4*>(cotangent + start);
#pragma unroll
for (int i = 0; i < 8; ++i) {
    const float gate_ = float(gates.values[i]), up_ = float(ups.values[i]), grad = float(grads.values[i]);
    const float sigmoid = 1.0f / (1.0f + __expf(-gate_));
    const float silu = gate_ * sigmoid;
    products.values[i] = T(silu * up_);
    grad_ups.values[i] = T(grad * silu);
    grad_gates.values[i] = T(grad * up_ * (sigmoid * (1.0f + gate_ * (1.0f - sigmoid))));
}
*reinterpret_cast<uint4*>(grad_gate + start) = grad_gates.bits;
*reinterpret_cast<uint4*>(grad_up + start) = grad_ups.bits;
*reinterpret_cast<uint4*>(product + start) = products.bits;
"""
)


def on_cuda(dtype: mx.Dtype) -> bool:
    """Whether numbers of this type are computed by a CUDA GPU, in half precision."""
    return dtype in (mx.bfloat16, mx.float16) and mx.default_device() == mx.gpu and mx.cuda.is_available()


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
    size = x.shape[-1]
    lanes = min(32, 1 << (size // VECTOR - 1).bit_length())
    threads = THREADS
    while threads // lanes * size * 4 > NORM_SHARED_BYTES:
        threads //= 2
    rows = x.reshape(-1, size)
    blocks = min(NORM_BLOCKS, -(-len(rows) // (threads // lanes)))
    sizes = {"SIZE": size, "LANES": lanes, "PARTS": -(-size // (VECTOR * lanes)), "THREADS": threads}
    grad_x, sums = _kernel("norm_gradients")(
        inputs=[rows, weight, cotangent.reshape(-1, size), mx.array([eps])],
        template=[("T", x.dtype), *sizes.items()],
        grid=(blocks * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[rows.shape, (blocks, size)],
        output_dtypes=[x.dtype, mx.float32],
    )
    return grad_x.reshape(x.shape), sums.sum(axis=0).astype(weight.dtype)


def has_gated_gradients(gate: Float[mx.array, "*shape hidden"]) -> bool:
    """Whether `gated_gradients` takes factors of this size and type."""
    return gate.shape[-1] % VECTOR == 0 and on_cuda(gate.dtype)


def gated_gradients(
    gate: Float[mx.array, "*shape hidden"],
    up: Float[mx.array, "*shape hidden"],
    cotangent: Float[mx.array, "*shape hidden"],
) -> list[Float[mx.array, "*shape hidden"]]:
    """Of `silu(gate) * up` the gradients for `gate` and `up`, and the product itself."""
    results = _kernel("gated_gradients")(
        inputs=[gate.reshape(-1), up.reshape(-1), cotangent.reshape(-1)],
        template=[("T", gate.dtype)],
        grid=(-(-gate.size // (VECTOR * THREADS)) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(gate.size,)] * 3,
        output_dtypes=[gate.dtype] * 3,
    )
    return [result.reshape(gate.shape) for result in results]


@functools.cache
def _kernel(name: str) -> Callable[..., list[Any]]:
    inputs, outputs, source = {
        "norm_gradients": (["x", "weight", "cotangent", "eps"], ["grad_x", "grad_weight"], NORM),
        "gated_gradients": (["gate", "up", "cotangent"], ["grad_gate", "grad_up", "product"], GATED),
    }[name]
    kernel: Any = mx.fast.cuda_kernel(name=f"anarcho_{name}", input_names=inputs, output_names=outputs, source=source)
    return kernel
