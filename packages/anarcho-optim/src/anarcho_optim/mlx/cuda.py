"""Kernels for what an update does on a CUDA GPU besides matrix products: each reads and writes what it must once.

Notable: of the matrices of a batch one kernel advances the momenta and takes the norms of the updates, a second one puts the updates side
by side, divided by their norms and in the iteration's type, and a third one moves the weights. Between the first two no update is written
down: it follows from momentum and gradient. Norms are summed in float64, so that neither a huge nor a tiny update is lost. AdamW is one
kernel a parameter. MLX 0.32's compiler writes a result down wherever a sum follows it, and wherever another result shares a part of it.

Numbers are the same as those of `anarcho_optim.mlx.update` but for the last bits. Elsewhere than on CUDA none of this is used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

__all__ = ["MAX_MATRICES", "adamw", "advance", "has_adamw", "has_matrices", "move", "stack"]

VECTOR = 8
"""Numbers that a thread reads at a time."""
THREADS = 256
ROUNDS = 4
"""How often a thread of the kernels for matrices does so."""
MAX_MATRICES = 64
"""Of so many matrices one kernel has the addresses."""
TYPES = (mx.float32, mx.bfloat16, mx.float16)

HEADER = """
template <typename U>
struct alignas(16) Eight {
    U values[8];
};
template <typename U>
__device__ inline Eight<U> read_eight(const U* place) {
    return *reinterpret_cast<const Eight<U>*>(place);
}
template <typename U>
__device__ inline void write_eight(U* place, const Eight<U>& eight) {
    *reinterpret_cast<Eight<U>*>(place) = eight;
}
"""

ADVANCE = """
CHOICE
const bool known = wanted[0];
const float factor = scale[0], mu = rate[0];
double total = 0;
for (int round = 0; round < ROUNDS; ++round) {
    const size_t start = ((static_cast<size_t>(blockIdx.x) * ROUNDS + round) * THREADS + threadIdx.x) * 8;
    if (start < SIZE) {
        const auto grads = read_eight(gradient + start);
        auto momenta = read_eight(momentum + start);
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float old = momenta.values[i];
            const float grad = known ? float(grads.values[i]) * factor : old;
            const float fresh = old + (1.0f - mu) * (grad - old);
            const double update = NESTEROV ? grad + mu * (fresh - grad) : fresh;
            momenta.values[i] = fresh;
            total += update * update;
        }
        write_eight(advanced + start, momenta);
    }
}
__shared__ double sums[THREADS / 32];
for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = total;
__syncthreads();
if (threadIdx.x == 0) {
    total = 0;
    for (int warp = 0; warp < THREADS / 32; ++warp) total += sums[warp];
    norms[blockIdx.y * gridDim.x + blockIdx.x] = float(sqrt(total));
}
"""

STACK = """
CHOICE
__shared__ double inverse;
if (threadIdx.x < 32) {
    double total = 0;
    for (int part = threadIdx.x; part < static_cast<int>(gridDim.x); part += 32) {
        const double norm = norms[blockIdx.y * gridDim.x + part];
        total += norm * norm;
    }
    for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
    if (threadIdx.x == 0) inverse = total == 0 ? 0.0 : 1.0 / (double(safety[0]) * sqrt(total));
}
__syncthreads();
const bool known = wanted[0];
const float factor = scale[0], mu = rate[0];
const double share = inverse;
for (int round = 0; round < ROUNDS; ++round) {
    const size_t start = ((static_cast<size_t>(blockIdx.x) * ROUNDS + round) * THREADS + threadIdx.x) * 8;
    if (start < SIZE) {
        const auto grads = read_eight(gradient + start);
        const auto momenta = read_eight(momentum + start);
        Eight<T> updates;
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float fresh = momenta.values[i];
            const float grad = known ? float(grads.values[i]) * factor : fresh;
            const float update = NESTEROV ? grad + mu * (fresh - grad) : fresh;
            updates.values[i] = T(float(update * share));
        }
        write_eight(updates_ + static_cast<size_t>(blockIdx.y) * SIZE + start, updates);
    }
}
"""

MOVE = """
CHOICE
const float step = rate[0], decay = weight_decay[0], size = factor[0];
for (int round = 0; round < ROUNDS; ++round) {
    const size_t start = ((static_cast<size_t>(blockIdx.x) * ROUNDS + round) * THREADS + threadIdx.x) * 8;
    if (start < SIZE) {
        auto weights = read_eight(weight + start);
        const auto updates = read_eight(updates_ + static_cast<size_t>(blockIdx.y) * SIZE + start);
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float old = float(weights.values[i]), update = float(updates.values[i]);
            const float decayed = CAUTIOUS && update * old < 0 ? old : old - step * decay * old;
            weights.values[i] = decayed - step * size * update;
        }
        write_eight(moved + start, weights);
    }
}
"""

ADAMW = """
const size_t start = (static_cast<size_t>(blockIdx.x) * THREADS + threadIdx.x) * 8;
if (start >= static_cast<size_t>(weight_shape[0])) return;
const float factor = scale[0], step = steps[0] + 1.0f;
const float beta1 = constants[0], beta2 = constants[1], eps = constants[2];
const float correction1 = -expm1f(step * constants[3]), correction2 = sqrtf(-expm1f(step * constants[4]));
auto weights = read_eight(weight + start), means = read_eight(exp_avg + start), squares = read_eight(exp_avg_sq + start);
const auto grads = read_eight(gradient + start);
if (wanted[0]) {
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float grad = float(grads.values[i]) * factor;
        means.values[i] += (1.0f - beta1) * (grad - means.values[i]);
        squares.values[i] = beta2 * squares.values[i] + (1.0f - beta2) * grad * grad;
        const float decayed = weights.values[i] - rate[0] * weight_decay[0] * weights.values[i];
        const float denominator = sqrtf(squares.values[i]) / correction2 + eps;
        weights.values[i] = decayed - rate[0] / correction1 * (means.values[i] / denominator);
    }
}
write_eight(new_weight + start, weights);
write_eight(new_exp_avg + start, means);
write_eight(new_exp_avg_sq + start, squares);
"""


def has_matrices(matrices: Sequence[mx.array], gradients: Sequence[mx.array]) -> bool:
    """Whether the kernels take float32 matrices of one size and gradients of one type, as these should be.

    Rows are whole vectors, so that what is a part of the rows of another array lies where vectors are read, too.
    """
    return (
        all(m.dtype == mx.float32 and m.ndim == 2 and m.size > 0 and m.shape[1] % VECTOR == 0 for m in matrices)
        and gradients[0].dtype in TYPES
        and len({g.dtype for g in gradients}) == 1
    )


def advance(
    momenta: Sequence[mx.array],
    gradients: Sequence[mx.array],
    *,
    scale: mx.array,
    rate: mx.array,
    wanted: mx.array,
    nesterov: bool,
) -> tuple[list[mx.array], mx.array]:
    """The new momenta of up to `MAX_MATRICES` matrices, and parts of their updates' norms: float32 (matrices, parts)."""
    count, parts = len(momenta), _blocks(momenta[0])
    *advanced, norms = _kernel("advance", count)(
        inputs=[*gradients, *momenta, scale, rate, wanted],
        template=[("SIZE", momenta[0].size), ("NESTEROV", nesterov), *_LAUNCH],
        grid=(parts * THREADS, count, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[*(m.shape for m in momenta), (count, parts)],
        output_dtypes=[mx.float32] * (count + 1),
    )
    return advanced, norms


def stack(
    momenta: Sequence[mx.array],
    gradients: Sequence[mx.array],
    norms: mx.array,
    *,
    scale: mx.array,
    rate: mx.array,
    wanted: mx.array,
    nesterov: bool,
    safety: float,
    dtype: mx.Dtype,
) -> mx.array:
    """From what `advance` returned the updates divided by ``safety`` times their norms, (matrices, rows, columns) of ``dtype``."""
    count, parts = norms.shape
    return _kernel("stack", count)(
        inputs=[*gradients, *momenta, norms, scale, rate, wanted, mx.array([safety])],
        template=[("T", dtype), ("SIZE", momenta[0].size), ("NESTEROV", nesterov), *_LAUNCH],
        grid=(parts * THREADS, count, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(count, *momenta[0].shape)],
        output_dtypes=[dtype],
    )[0]


def move(
    weights: Sequence[mx.array],
    updates: mx.array,
    *,
    rate: mx.array,
    weight_decay: mx.array,
    factor: float,
    cautious: bool,
) -> list[mx.array]:
    """W - rate decay W - rate factor O for up to `MAX_MATRICES` weights, from the stack of ``updates``."""
    count = len(weights)
    return _kernel("move", count)(
        inputs=[*weights, updates, rate, weight_decay, mx.array([factor])],
        template=[("SIZE", weights[0].size), ("CAUTIOUS", cautious), *_LAUNCH],
        grid=(_blocks(weights[0]) * THREADS, count, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[w.shape for w in weights],
        output_dtypes=[mx.float32] * count,
    )


def has_adamw(weight: mx.array, gradient: mx.array) -> bool:
    """Whether `adamw` takes these."""
    whole = weight.ndim > 0 and weight.size > 0 and weight.shape[-1] % VECTOR == 0
    return whole and weight.dtype == mx.float32 and gradient.dtype in TYPES


def adamw(
    weight: mx.array,
    gradient: mx.array,
    exp_avg: mx.array,
    exp_avg_sq: mx.array,
    step: mx.array,
    *,
    scale: mx.array,
    rate: mx.array,
    weight_decay: mx.array,
    wanted: mx.array,
    betas: tuple[float, float],
    eps: float,
) -> list[mx.array]:
    """The new weight, ``exp_avg`` and ``exp_avg_sq``, the last step having been number ``step``."""
    constants = [*betas, eps, *(math.log(beta) if beta else -math.inf for beta in betas)]
    flat = [array.reshape(-1) for array in (weight, gradient, exp_avg, exp_avg_sq)]
    results = _kernel("adamw", 1)(
        inputs=[*flat, step, scale, rate, weight_decay, wanted, mx.array(constants, mx.float32)],
        template=[("THREADS", THREADS)],
        grid=(-(-weight.size // (VECTOR * THREADS)) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(weight.size,)] * 3,
        output_dtypes=[mx.float32] * 3,
    )
    return [result.reshape(weight.shape) for result in results]


_LAUNCH = [("THREADS", THREADS), ("ROUNDS", ROUNDS)]


def _blocks(matrix: mx.array) -> int:
    return -(-matrix.size // (VECTOR * THREADS * ROUNDS))


@functools.cache
def _kernel(name: str, count: int) -> Callable[..., list[Any]]:
    """The kernel for so many matrices, whose addresses are parameters of their own."""
    places, once, outputs, source = {
        "advance": (["gradient", "momentum"], ["scale", "rate", "wanted"], ["advanced"], ADVANCE),
        "stack": (["gradient", "momentum"], ["norms", "scale", "rate", "wanted", "safety"], [], STACK),
        "move": (["weight"], ["updates_", "rate", "weight_decay", "factor"], ["moved"], MOVE),
        "adamw": ([], ADAMW_INPUTS, [], ADAMW),
    }[name]
    single = {"advance": ["norms"], "stack": ["updates_"], "move": [], "adamw": ADAMW_OUTPUTS}[name]
    kernel: Any = mx.fast.cuda_kernel(
        name=f"anarcho_{name}_{count}",
        input_names=[*(f"{place}{i}" for place in places for i in range(count)), *once],
        output_names=[*(f"{place}{i}" for place in outputs for i in range(count)), *single],
        source=source.replace("CHOICE", _choice([*places, *outputs], count)),
        header=HEADER,
    )
    return kernel


ADAMW_INPUTS = [
    *("weight", "gradient", "exp_avg", "exp_avg_sq", "steps", "scale", "rate", "weight_decay", "wanted", "constants"),
]
ADAMW_OUTPUTS = ["new_weight", "new_exp_avg", "new_exp_avg_sq"]


def _choice(places: Sequence[str], count: int) -> str:
    """C++ that sets a pointer of each name to that of the block's matrix."""
    pointers = "".join(f"auto {place} = {place}0;\n" for place in places)
    cases = "".join(
        f"case {i}: {' '.join(f'{place} = {place}{i};' for place in places)} break;\n" for i in range(1, count)
    )
    return f"{pointers}switch (blockIdx.y) {{\n{cases}}}"
