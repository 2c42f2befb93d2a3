"""One step of Muon and of AdamW as pure functions on arrays.

Notable: everything but the iteration sees a matrix in the parameter's own orientation, because transposing would change the scale, the rows
that are equilibrated and the axis of NorMuon. Momentum, norms and weights are float32 whatever the parameters are; a parameter is rounded
once. Rates and momenta are 0-D arrays, so that a compiled step is not traced again when a schedule changes them.

Sources: Muon, Keller Jordan (https://kellerjordan.github.io/posts/muon/); NorMuon, Li et al., arXiv:2510.05491; cautious weight decay,
Chen et al., arXiv:2510.12402; row equilibration, arXiv:2603.28254; Frobenius normalisation, arXiv:2602.21545; AdamW, Loshchilov and Hutter,
arXiv:1711.05101.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import mlx.core as mx

from anarcho_optim.groups import Blocks
from anarcho_optim.memory import mlx_batch_bytes
from anarcho_optim.mlx import cuda
from anarcho_optim.mlx.batching import Iteration, batches
from anarcho_optim.mlx.newton_schulz import (
    frobenius_norm,
    iterate,
    on_cuda,
    orthogonalize,
    reciprocal,
    resolve_ns_dtype,
)
from anarcho_optim.scaling import shape_scale

Result = tuple[mx.array, dict[str, mx.array]]
"""The new weight and the new state of a parameter."""


@dataclass(frozen=True, kw_only=True)
class MuonInput:
    """What one parameter brings to a step of Muon."""

    weight: mx.array
    gradient: mx.array
    state: Mapping[str, mx.array]
    """``momentum``, float32 and shaped like the weight, and with NorMuon ``neuron_mean_sq``."""
    blocks: Blocks
    options: Mapping[str, Any]
    """A Muon group's keys; those that schedules change are taken from the three arrays below instead."""
    lr: mx.array
    weight_decay: mx.array
    momentum: mx.array
    where: mx.array | None = None
    """A boolean scalar: if it is false, the result is what there was; ``lr`` must then be 0."""
    scale: mx.array | None = None
    """A float32 scalar that the gradient is multiplied by."""


def muon_step(inputs: Sequence[MuonInput]) -> list[Result]:
    """The new weight and the new state of each parameter; matrices of one shape and iteration are batched across all parameters.

    Each batch starts, momentum included, when the weights of the one before it are updated. MLX evaluates later, in an order of its own,
    and would otherwise hold the intermediate results of all batches at once; so the memory of a step does not grow with the number of
    layers.
    """
    cap = mlx_batch_bytes("cpu" if mx.default_device() == mx.cpu else "cuda" if on_cuda() else "mps")
    started: dict[int, tuple[mx.array, list[mx.array]]] = {}
    orthogonal = [[[] for _ in item.blocks.sizes] for item in inputs]
    missing = [sum(item.blocks.count for shape in item.blocks.shapes if math.prod(shape)) for item in inputs]
    results: dict[int, Result] = {}
    before: list[mx.array] = []
    for key, batch in batches([i.blocks for i in inputs], [i.options for i in inputs], limit_bytes=cap):
        whole = [inputs[run.parameter] for run in batch]
        if _has_kernels(whole, key):
            stepped = _step_in_kernels(whole, key, before)
            results |= dict(zip((run.parameter for run in batch), stepped, strict=True))
            before = [weight for weight, _ in stepped]
            continue
        for index in dict.fromkeys(run.parameter for run in batch if run.parameter not in started):
            started[index] = _start(inputs[index], before)
        factors = _orthogonalize_batch([started[r.parameter][1][r.block][r.start : r.stop] for r in batch], key)
        before = [factors[-1]]
        for run, factor in zip(batch, factors, strict=True):
            orthogonal[run.parameter][run.block].append(factor)
            missing[run.parameter] -= run.stop - run.start
            if missing[run.parameter] == 0:
                momentum, _ = started[run.parameter]
                results[run.parameter] = _finish(inputs[run.parameter], momentum, orthogonal[run.parameter])
                before.append(results[run.parameter][0])
    # What is left are empty parameters: there is nothing to update.
    return [results.get(i, (item.weight, dict(item.state))) for i, item in enumerate(inputs)]


def _has_kernels(items: Sequence[MuonInput], key: Iteration) -> bool:
    """Whether the kernels for CUDA take a batch: plain matrices of one group, whose updates are changed by nothing but the iteration."""
    if not on_cuda() or key.frobenius:
        return False
    options = items[0].options
    alone = all(item.blocks.count == len(item.blocks.sizes) == 1 and item.options is options for item in items)
    if not alone or options["normuon"] or options["row_equilibration"]:
        return False
    return cuda.has_matrices([item.weight for item in items], [item.gradient for item in items])


def _step_in_kernels(items: Sequence[MuonInput], key: Iteration, before: list[mx.array]) -> list[Result]:
    """`muon_step` of one batch that has kernels, not earlier than ``before`` is evaluated."""
    first, count = items[0], cuda.MAX_MATRICES
    options = first.options
    common: dict[str, Any] = {
        "scale": mx.array(1.0) if first.scale is None else first.scale,
        "rate": first.momentum,
        "wanted": mx.array(True) if first.where is None else first.where,
        "nesterov": options["nesterov"],
    }
    old = [item.state["momentum"] for item in items]
    old = mx.depends(old, before) if before else old
    momenta: list[mx.array] = []
    updates: list[mx.array] = []
    for start in range(0, len(items), count):
        gradients = [item.gradient for item in items[start : start + count]]
        advanced, norms = cuda.advance(old[start : start + count], gradients, **common)
        momenta += advanced
        dtype = resolve_ns_dtype(key.ns_dtype)
        updates.append(cuda.stack(advanced, gradients, norms, safety=key.variant.safety, dtype=dtype, **common))
    orthogonal = iterate(mx.concatenate(updates) if len(updates) > 1 else updates[0], variant=key.variant)
    weights: list[mx.array] = []
    for start in range(0, len(items), count):
        weights += cuda.move(
            [item.weight for item in items[start : start + count]],
            orthogonal[start : start + count] if len(items) > count else orthogonal,
            rate=first.lr,
            weight_decay=first.weight_decay,
            factor=shape_scale(options["adjust_lr_fn"], *key.shape),
            cautious=options["cautious_weight_decay"],
        )
    return [(weight, {"momentum": momentum}) for weight, momentum in zip(weights, momenta, strict=True)]


def _start(item: MuonInput, before: list[mx.array]) -> tuple[mx.array, list[mx.array]]:
    """The new momentum and the blocks of the update as (count, rows, columns) stacks, not earlier than ``before`` is evaluated."""
    # It is the momentum that waits: what the caller makes of the gradient, such as clipping it, is then part of the same kernel.
    old = mx.depends([item.state["momentum"]], before)[0] if before else item.state["momentum"]
    gradient = _scaled(item.gradient, item.scale)
    if item.where is not None:  # a momentum is its own mean with itself
        gradient = mx.where(item.where, gradient, old)
    blocks = item.blocks
    momentum, update = advance_momentum(old, gradient, rate=item.momentum, nesterov=item.options["nesterov"])
    pieces = _split(update.reshape(blocks.count, blocks.rows, blocks.columns), blocks.sizes, blocks.split_dim + 1)
    return momentum, [equilibrate_rows(piece) for piece in pieces] if item.options["row_equilibration"] else pieces


def _scaled(gradient: mx.array, scale: mx.array | None) -> mx.array:
    """The gradient in float32, times ``scale``."""
    gradient = gradient.astype(mx.float32)
    return gradient if scale is None else gradient * scale


def _orthogonalize_batch(stacks: Sequence[mx.array], key: Iteration) -> list[mx.array]:
    """The orthogonal factors of stacks of one shape, as one batch, of the iteration's type: who reads them widens them on the way."""
    batch = mx.concatenate(list(stacks)) if len(stacks) > 1 else stacks[0]
    factors = orthogonalize(batch, variant=key.variant, dtype=resolve_ns_dtype(key.ns_dtype))
    if key.frobenius:
        factors = normalize_frobenius(factors.astype(mx.float32))
    return _split(factors, [len(stack) for stack in stacks], 0)


def _finish(item: MuonInput, momentum: mx.array, orthogonal: list[list[mx.array]]) -> Result:
    """The new weight and state of a parameter from the orthogonal factors of its blocks, each in one or several runs."""
    blocks = item.blocks
    whole = [
        mx.concatenate(runs) if runs else mx.zeros((blocks.count, *shape))
        for runs, shape in zip(orthogonal, blocks.shapes, strict=True)
    ]
    update, scale, state = _update(whole, item)
    return _apply_update(item, update, scale), {"momentum": momentum} | state


def advance_momentum(
    momentum: mx.array, gradient: mx.array, *, rate: mx.array, nesterov: bool
) -> tuple[mx.array, mx.array]:
    """m <- mu m + (1 - mu) g, and the update: (1 - mu) g + mu m with Nesterov, else m; both float32, of the parameter's shape."""
    g = gradient.astype(mx.float32)
    m = momentum + (1 - rate) * (g - momentum)
    return m, g + rate * (m - g) if nesterov else m


def _split(x: mx.array, sizes: Sequence[int], axis: int) -> list[mx.array]:
    return list(mx.split(x, list(accumulate(sizes))[:-1], axis=axis)) if len(sizes) > 1 else [x]


def equilibrate_rows(matrices: mx.array) -> mx.array:
    """Each row of (matrices, rows, columns) divided by its 2-norm; rows of zeros stay zero."""
    if matrices.size == 0:
        return matrices
    largest = mx.abs(matrices).max(axis=-1, keepdims=True)
    scaled = matrices / mx.where(largest == 0, 1.0, largest)
    return scaled * reciprocal(mx.sqrt(mx.square(scaled).sum(axis=-1, keepdims=True)))


def normalize_frobenius(orthogonal: mx.array) -> mx.array:
    """Each matrix of (matrices, rows, columns) rescaled to the norm of an orthogonal one, sqrt(min(rows, columns)); zeros stay zero."""
    if orthogonal.size == 0:
        return orthogonal
    return orthogonal * (math.sqrt(min(orthogonal.shape[-2:])) * reciprocal(frobenius_norm(orthogonal)))


def normalize_neurons(orthogonal: mx.array, mean_sq: mx.array, *, beta2: float, axis: int) -> tuple[mx.array, mx.array]:
    """NorMuon: each neuron of (matrices, rows, columns) divided by the root of its running mean square over ``axis``, the norm kept.

    Returns the result and the new mean square, of the shape of ``mean_sq``: (matrices, rows, 1) for axis -1, (matrices, 1, columns) for -2.
    """
    if orthogonal.size == 0:
        return orthogonal, mean_sq
    mean_sq = beta2 * mean_sq + (1 - beta2) * mx.square(orthogonal).mean(axis=axis, keepdims=True)
    normalized = orthogonal * reciprocal(mx.sqrt(mean_sq))
    return normalized * (frobenius_norm(orthogonal) * reciprocal(frobenius_norm(normalized))), mean_sq


def _update(orthogonal: list[mx.array], item: MuonInput) -> tuple[mx.array, float, dict[str, mx.array]]:
    """O and S of one parameter, or S O and 1 where its blocks differ in S, and the state besides the momentum.

    ``orthogonal`` holds the blocks; the update has the parameter's shape.
    """
    blocks, options = item.blocks, item.options
    dim, axis = blocks.split_dim + 1, options["normuon_axis"]
    state = {}
    if options["normuon"]:
        mean_sq = item.state["neuron_mean_sq"]
        sizes = (1,) * len(blocks.sizes) if axis % 3 == dim else blocks.sizes
        means = _split(mean_sq.reshape(blocks.count, *mean_sq.shape[-2:]), sizes, dim)
        pairs = [
            normalize_neurons(o.astype(mx.float32), v, beta2=options["normuon_beta2"], axis=axis)
            for o, v in zip(orthogonal, means, strict=True)
        ]
        orthogonal = [o for o, _ in pairs]
        new = mx.concatenate([v for _, v in pairs], axis=dim).reshape(mean_sq.shape)
        state["neuron_mean_sq"] = new if item.where is None else mx.where(item.where, new, mean_sq)
    scales = [shape_scale(options["adjust_lr_fn"], *shape) for shape in blocks.shapes]
    common = scales[0] if len(set(scales)) == 1 else None
    if common is None:
        orthogonal = [o.astype(mx.float32) * scale for o, scale in zip(orthogonal, scales, strict=True) if o.size]
    update = orthogonal[0] if len(orthogonal) == 1 else mx.concatenate(orthogonal, axis=dim)
    return update.reshape(item.weight.shape), 1.0 if common is None else common, state


def _apply_update(item: MuonInput, update: mx.array, scale: float) -> mx.array:
    """W <- W - lr wd W - lr S O, rounded once; cautious decay leaves entries alone that the update moves away from zero."""
    w, update = item.weight.astype(mx.float32), update.astype(mx.float32)
    decayed = w - item.lr * item.weight_decay * w
    if item.options["cautious_weight_decay"]:
        decayed = mx.where(update * w >= 0, decayed, w)
    return (decayed - item.lr * scale * update).astype(item.weight.dtype)


def _bias_correction(beta: float, step: mx.array) -> mx.array:
    """1 - beta^step without the cancellation that a beta close to 1 suffers in float32."""
    return -mx.expm1(step * (math.log(beta) if beta else -math.inf))


def adamw_step(
    weight: mx.array,
    gradient: mx.array,
    state: Mapping[str, mx.array],
    *,
    lr: mx.array,
    weight_decay: mx.array,
    betas: tuple[float, float],
    eps: float,
    where: mx.array | None = None,
    scale: mx.array | None = None,
) -> tuple[mx.array, dict[str, mx.array]]:
    """The new weight and the new state of one parameter, as torch.optim.AdamW defines them for ``scale`` times the gradient.

    ``state`` holds ``exp_avg`` and ``exp_avg_sq``, float32 of the weight's shape, and the 0-D float32 ``step``. Where the boolean scalar
    ``where`` is false, both stay as they are.
    """
    step = state["step"] + 1
    if on_cuda() and cuda.has_adamw(weight, gradient):
        new_weight, mean, mean_sq = cuda.adamw(
            weight,
            gradient,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["step"],
            scale=mx.array(1.0) if scale is None else scale,
            rate=lr,
            weight_decay=weight_decay,
            wanted=mx.array(True) if where is None else where,
            betas=betas,
            eps=eps,
        )
        step = step if where is None else mx.where(where, step, state["step"])
        return new_weight, {"exp_avg": mean, "exp_avg_sq": mean_sq, "step": step}
    w, g = weight.astype(mx.float32), _scaled(gradient, scale)
    mean = state["exp_avg"] + (1 - betas[0]) * (g - state["exp_avg"])
    mean_sq = betas[1] * state["exp_avg_sq"] + (1 - betas[1]) * mx.square(g)
    denominator = mx.sqrt(mean_sq) / mx.sqrt(_bias_correction(betas[1], step)) + eps
    w = w - lr * weight_decay * w
    w = w - lr / _bias_correction(betas[0], step) * (mean / denominator)
    new = {"exp_avg": mean, "exp_avg_sq": mean_sq, "step": step}
    if where is None:
        return w.astype(weight.dtype), new
    kept = {key: mx.where(where, value, state[key]) for key, value in new.items()}
    return mx.where(where, w.astype(weight.dtype), weight), kept
