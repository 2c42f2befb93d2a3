"""The norm of all gradients together, in MLX.

Notable: MLX 0.32 writes the squares down in float32 before it sums them, and sums each array by itself. On a CUDA GPU arrays of one size
are read by one kernel, once. A thread's numbers are always the same ones, so the result is the same each time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

__all__ = ["global_norm"]

VECTOR = 8
"""Numbers that a thread reads at a time."""
THREADS = 256
ROUNDS = 8
"""How often a thread does so."""
MAX_ARRAYS = 64
"""Of so many arrays one kernel has the addresses."""

SQUARES = """
struct alignas(16) Eight { T values[8]; };
auto array = array0;
switch (blockIdx.y) {
CASES}
float total = 0;
for (int round = 0; round < ROUNDS; ++round) {
    const size_t start = ((static_cast<size_t>(blockIdx.x) * ROUNDS + round) * THREADS + threadIdx.x) * 8;
    if (start < SIZE) {
        const Eight numbers = *reinterpret_cast<const Eight*>(array + start);
        #pragma unroll
        for (int i = 0; i < 8; ++i) total += float(numbers.values[i]) * float(numbers.values[i]);
    }
}
__shared__ float totals[THREADS / 32];
for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
if (threadIdx.x % 32 == 0) totals[threadIdx.x / 32] = total;
__syncthreads();
if (threadIdx.x == 0) {
    total = 0;
    for (int warp = 0; warp < THREADS / 32; ++warp) total += totals[warp];
    sums[blockIdx.y * gridDim.x + blockIdx.x] = total;
}
"""


def global_norm(gradients: Any, unscale: mx.array) -> mx.array:
    """The 2-norm of all gradients together, each multiplied by ``unscale`` first."""
    arrays: list[mx.array] = [array for _, array in tree_flatten(gradients)]  # pyright: ignore[reportAssignmentType]
    squares: list[mx.array] = []
    for alike in _alike(arrays):
        if _has_kernel(alike[0]):
            squares.append(_square_sum(alike))
        else:
            squares += [mx.square(array.astype(mx.float32)).sum() for array in alike]
    return mx.sqrt(mx.stack(squares).sum()) * unscale


def _alike(arrays: Sequence[mx.array]) -> list[list[mx.array]]:
    """The arrays in groups of one size and type, of at most `MAX_ARRAYS`."""
    groups: dict[Any, list[mx.array]] = {}
    for array in arrays:
        groups.setdefault((array.size, array.dtype), []).append(array)
    return [
        group[start : start + MAX_ARRAYS] for group in groups.values() for start in range(0, len(group), MAX_ARRAYS)
    ]


def _has_kernel(array: mx.array) -> bool:
    # Rows of whole vectors: what is a part of the rows of another array lies where vectors are read, too.
    whole = array.ndim > 0 and array.size > 0 and array.shape[-1] % VECTOR == 0
    known = whole and array.dtype in (mx.float32, mx.bfloat16, mx.float16)
    return known and mx.default_device() == mx.gpu and mx.cuda.is_available()


def _square_sum(arrays: Sequence[mx.array]) -> mx.array:
    """The sum of the squares of arrays of one size and type."""
    count, size = len(arrays), arrays[0].size
    parts = -(-size // (VECTOR * THREADS * ROUNDS))
    return _kernel(count)(
        inputs=list(arrays),
        template=[("T", arrays[0].dtype), ("SIZE", size), ("THREADS", THREADS), ("ROUNDS", ROUNDS)],
        grid=(parts * THREADS, count, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(count, parts)],
        output_dtypes=[mx.float32],
    )[0].sum()


@functools.cache
def _kernel(count: int) -> Callable[..., list[Any]]:
    """The kernel for so many arrays, whose addresses are parameters of their own."""
    cases = "".join(f"case {i}: array = array{i}; break;\n" for i in range(1, count))
    kernel: Any = mx.fast.cuda_kernel(
        name=f"anarcho_square_sums_{count}",
        input_names=[f"array{i}" for i in range(count)],
        output_names=["sums"],
        source=SQUARES.replace("CASES", cases),
    )
    return kernel
