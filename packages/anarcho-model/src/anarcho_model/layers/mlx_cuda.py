"""Kernels for what MLX 0.32 is slow at on a CUDA GPU: the gradients of the gated product, and a lookup of rows.

Notable: of the gated product's gradient, what two results share is computed once and never written down. Norms have a module of their own,
`anarcho_model.layers.mlx_norm`.

Numbers are read and written 16 bytes at a time, computed in float32, and rounded once. Elsewhere than on CUDA none of this is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from jaxtyping import Float, Int

__all__ = [
    "gated_gradients",
    "has_gated_gradients",
    "has_lookup",
    "lookup",
]

VECTOR = 8
"""Numbers of half precision in 16 bytes."""
THREADS = 256

EIGHT = """
union Eight {
    uint4 bits;
    T values[8];
};
"""

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

LOOKUP = """
constexpr int PARTS = SIZE / 8;
const size_t place = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
if (place >= static_cast<size_t>(tokens_shape[0]) * PARTS) return;
const size_t column = place % PARTS * 8, row = tokens[place / PARTS];
struct alignas(16) Read { float values[8]; };
struct alignas(16) Written { T values[8]; };
const Read numbers = *reinterpret_cast<const Read*>(table + row * SIZE + column);
Written result;
#pragma unroll
for (int i = 0; i < 8; ++i) result.values[i] = T(numbers.values[i]);
*reinterpret_cast<Written*>(found + place * 8) = result;
"""


def on_cuda(dtype: mx.Dtype) -> bool:
    """Whether numbers of this type are computed by a CUDA GPU, in half precision."""
    return dtype in (mx.bfloat16, mx.float16) and _computes()


def _computes() -> bool:
    """Whether a CUDA GPU is what computes."""
    return mx.default_device() == mx.gpu and mx.cuda.is_available()


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


def has_lookup(table: Float[mx.array, "vocab size"], dtype: mx.Dtype) -> bool:
    """Whether `lookup` takes a table of this size and type."""
    fits = table.dtype == mx.float32 and table.shape[1] % VECTOR == 0 and mx.issubdtype(dtype, mx.floating)
    return fits and _computes()


def lookup(
    table: Float[mx.array, "vocab size"], tokens: Int[mx.array, "*shape"], dtype: mx.Dtype
) -> Float[mx.array, "*shape size"]:
    """`table[tokens]` as `dtype`, from a table in float32."""
    size = table.shape[1]
    return _kernel("lookup")(
        inputs=[table, tokens.reshape(-1)],
        template=[("T", dtype), ("SIZE", size)],
        grid=(-(-tokens.size * size // (VECTOR * THREADS)) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(*tokens.shape, size)],
        output_dtypes=[dtype],
    )[0]


@functools.cache
def _kernel(name: str) -> Callable[..., list[Any]]:
    inputs, outputs, source = {
        "gated_gradients": (["gate", "up", "cotangent"], ["grad_gate", "grad_up", "product"], GATED),
        "lookup": (["table", "tokens"], ["found"], LOOKUP),
    }[name]
    kernel: Any = mx.fast.cuda_kernel(name=f"anarcho_{name}", input_names=inputs, output_names=outputs, source=source)
    return kernel
