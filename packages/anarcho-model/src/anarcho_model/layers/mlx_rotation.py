"""Rotary positions of queries and keys on a CUDA GPU: one kernel for both, and one for the gradient of a whole projection.

Notable: MLX 0.32's own kernel reads and writes one number at a time and works out an angle for each of them; these read 16 bytes and take
angles from a table. The gradients of queries, keys and values leave theirs side by side, so that of the layer's input is one product, and
that of the three weights another.

Arithmetic is float32, rounded once. Elsewhere than on CUDA none of this is used. Source: RoPE (arXiv:2104.09864).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from jaxtyping import Float

from anarcho_model.layers.mlx_cuda import EIGHT, THREADS, VECTOR, on_cuda

__all__ = ["has_rotation_kernel", "project_rotated", "rotate_both"]

HEADS_A_THREAD = 4
"""A thread turns the same pairs of so many heads, by angles that it reads once."""

TURN = """
constexpr int SIZE = 2 * HALF, CHUNKS = HALF / 8;
constexpr int QUERY_GROUPS = (HEADS + PER_THREAD - 1) / PER_THREAD, KEY_GROUPS = (KV_HEADS + PER_THREAD - 1) / PER_THREAD;
constexpr int GROUPS = QUERY_GROUPS + KEY_GROUPS * (JOINED ? 2 : 1);
const size_t place = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
const int chunk = place % CHUNKS, group = place / CHUNKS % GROUPS;
const size_t token = place / (CHUNKS * GROUPS);
if (token >= static_cast<size_t>(q_shape[0])) return;

const int kind = group < QUERY_GROUPS ? 0 : group < QUERY_GROUPS + KEY_GROUPS ? 1 : 2;
const int groups = kind == 0 ? QUERY_GROUPS : KEY_GROUPS, heads = kind == 0 ? HEADS : KV_HEADS;
const int first = group - (kind == 0 ? 0 : kind == 1 ? QUERY_GROUPS : QUERY_GROUPS + KEY_GROUPS);
float cosines[8], sines[8];
const size_t angle = (token % TABLE) * HALF + chunk * 8;
#pragma unroll
for (int i = 0; i < 8; ++i) {
    cosines[i] = kind == 2 ? 1.0f : cos_table[angle + i];
    sines[i] = kind == 2 ? 0.0f : (BACK ? -1.0f : 1.0f) * sin_table[angle + i];
}
SOURCE_AND_TARGET
#pragma unroll
for (int part = 0; part < PER_THREAD; ++part) {
    const int head = first + part * groups;
    if (head < heads) {
        const size_t at = static_cast<size_t>(head) * SIZE + chunk * 8;
        Eight low, high, new_low, new_high;
        low.bits = *reinterpret_cast<const uint4*>(source + at);
        high.bits = *reinterpret_cast<const uint4*>(source + at + HALF);
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float x = float(low.values[i]), y = float(high.values[i]);
            new_low.values[i] = T(x * cosines[i] - y * sines[i]);
            new_high.values[i] = T(y * cosines[i] + x * sines[i]);
        }
        *reinterpret_cast<uint4*>(target + at) = new_low.bits;
        *reinterpret_cast<uint4*>(target + at + HALF) = new_high.bits;
    }
}
"""

APART = """
const T* source = (kind == 0 ? q : k) + token * (heads * SIZE);
T* target = (kind == 0 ? new_q : new_k) + token * (heads * SIZE);
"""

JOINED = """
const T* source = (kind == 0 ? q : kind == 1 ? k : v) + token * (heads * SIZE);
T* target = joined + (token * (HEADS + 2 * KV_HEADS) + (kind == 0 ? 0 : kind == 1 ? HEADS : HEADS + KV_HEADS)) * SIZE;
"""


def has_rotation_kernel(head_size: int, dtype: mx.Dtype) -> bool:
    """Whether the kernels take heads of this size and type, and are right here."""
    return head_size % (2 * VECTOR) == 0 and on_cuda(dtype) and _are_right()


@functools.cache
def _are_right() -> bool:
    """Whether both kernels, which MLX compiles when they are first used, turn a few numbers as they should; else it warns, once."""
    fault = _fault()
    if fault is not None:
        warnings.warn(f"the CUDA kernels for rotary positions are not used: {fault}; MLX's own is slower", stacklevel=2)
    return fault is None


def _fault() -> str | None:
    q, k, v = (mx.random.normal((1, 3, heads, 32), key=mx.random.key(heads)).astype(mx.bfloat16) for heads in (5, 2, 2))
    angles = mx.arange(3)[:, None] * mx.array(0.7) ** mx.arange(16)
    cos, sin = mx.cos(angles)[None, None], mx.sin(angles)[None, None]

    def turned(x: mx.array, sine: mx.array) -> mx.array:
        low, high = mx.split(x.astype(mx.float32), 2, axis=-1)
        factors = cos[0, 0][:, None], sine[0, 0][:, None]
        return mx.concatenate([low * factors[0] - high * factors[1], high * factors[0] + low * factors[1]], axis=-1)

    try:
        found = [*_rotate_both(q, k, cos, sin, back=False), _turned_back(q, k, v, cos, sin)]
        joined = mx.concatenate([x.reshape(3, -1) for x in (turned(q, -sin), turned(k, -sin), v)], axis=-1)
        right = all(
            mx.allclose(x.astype(mx.float32), y.astype(mx.float32), rtol=0.01, atol=0.01).item()
            for x, y in zip(found, [turned(q, sin), turned(k, sin), joined], strict=True)
        )
    except RuntimeError as error:
        return " ".join(str(error).split())[:200]
    return None if right else "they compute wrong numbers"


@mx.custom_function
def rotate_both(
    q: Float[mx.array, "batch length heads head"],
    k: Float[mx.array, "batch length kv head"],
    cos: Float[mx.array, "rows 1 length half"],
    sin: Float[mx.array, "rows 1 length half"],
) -> list[mx.array]:
    """Queries and keys, of which the pairs (i, i + head/2) are turned by the angles of their positions."""
    return _rotate_both(q, k, cos, sin, back=False)


@rotate_both.vjp
def _rotate_both_vjp(
    primals: Sequence[mx.array], cotangents: Sequence[mx.array], _: Sequence[mx.array]
) -> tuple[mx.array, ...]:
    """The gradients are turned back; angles have none."""
    (q, k), (cos, sin) = cotangents, primals[2:]
    return *_rotate_both(q, k, cos, sin, back=True), mx.zeros_like(cos), mx.zeros_like(sin)


@mx.custom_function
def project_rotated(
    x: Float[mx.array, "batch length dim"],
    query: Float[mx.array, "queries dim"],
    key: Float[mx.array, "keys dim"],
    value: Float[mx.array, "keys dim"],
    cos: Float[mx.array, "rows 1 length half"],
    sin: Float[mx.array, "rows 1 length half"],
) -> list[mx.array]:
    """`x @ weight.T` for the three weights, as (batch, length, heads, head), queries and keys turned; backward keeps `x` alone."""
    q, k, v = (_in_heads(x @ weight.T, 2 * cos.shape[-1]) for weight in (query, key, value))
    return [*_rotate_both(q, k, cos, sin, back=False), v]


@project_rotated.vjp
def _project_rotated_vjp(
    primals: Sequence[mx.array], cotangents: Sequence[mx.array], _: Sequence[mx.array]
) -> tuple[mx.array, ...]:
    """As of `anarcho_model.layers.mlx.project`, earlier layers wait for the gradients of the weights."""
    (x, *weights, cos, sin), (q, k, v) = primals, cotangents
    joined = _turned_back(q, k, v, cos, sin)
    grad_weight = joined.T @ x.reshape(-1, x.shape[-1])
    grad_x = (joined @ mx.concatenate(weights)).reshape(x.shape)
    rows = [len(weights[0]), len(weights[0]) + len(weights[1])]
    return *mx.depends([grad_x], [grad_weight]), *mx.split(grad_weight, rows), mx.zeros_like(cos), mx.zeros_like(sin)


def _in_heads(x: mx.array, head_size: int) -> mx.array:
    return x.reshape(*x.shape[:-1], -1, head_size)


def _rotate_both(q: mx.array, k: mx.array, cos: mx.array, sin: mx.array, *, back: bool) -> list[mx.array]:
    return _launch("rotation", [q, k], cos, sin, back=back, output_shapes=[q.shape, k.shape])


def _turned_back(q: mx.array, k: mx.array, v: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """The gradients of queries, keys and values before the rotation, as (tokens, queries + keys + values)."""
    tokens = q.shape[0] * q.shape[1]
    shape = (tokens, (q.size + k.size + v.size) // tokens)
    return _launch("joined_rotation", [q, k, v], cos, sin, back=True, output_shapes=[shape])[0]


def _launch(
    name: str, arrays: list[mx.array], cos: mx.array, sin: mx.array, *, back: bool, output_shapes: list[tuple[int, ...]]
) -> list[mx.array]:
    batch, length, heads, size = arrays[0].shape
    kv_heads, joined = arrays[1].shape[2], len(arrays) == 3
    groups = -(-heads // HEADS_A_THREAD) + -(-kv_heads // HEADS_A_THREAD) * (2 if joined else 1)
    numbers = {
        "HALF": size // 2,
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "PER_THREAD": HEADS_A_THREAD,
        "TABLE": cos.shape[0] * length,
        "BACK": back,
        "JOINED": joined,
    }
    threads = batch * length * groups * (size // 2 // VECTOR)
    return _kernel(name)(
        inputs=[*(array.reshape(batch * length, -1) for array in arrays), cos, sin],
        template=[("T", arrays[0].dtype), *numbers.items()],
        grid=(-(-threads // THREADS) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=output_shapes,
        output_dtypes=[arrays[0].dtype] * len(output_shapes),
    )


@functools.cache
def _kernel(name: str) -> Callable[..., list[Any]]:
    inputs, outputs, places = {
        "rotation": (["q", "k"], ["new_q", "new_k"], APART),
        "joined_rotation": (["q", "k", "v"], ["joined"], JOINED),
    }[name]
    kernel: Any = mx.fast.cuda_kernel(
        name=f"anarcho_{name}",
        input_names=[*inputs, "cos_table", "sin_table"],
        output_names=outputs,
        source=EIGHT + TURN.replace("SOURCE_AND_TARGET", places),
    )
    return kernel
