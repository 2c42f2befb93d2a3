"""Muon's update of matrices of one shape, on stacks, from the momentum to the parameters.

Notable: everything here is pure or writes only into what it is given, and sees a matrix in the parameter's own orientation: transposing
would change the scale, the rows that are equilibrated and the axis of NorMuon.

Sources: Muon, Keller Jordan (https://kellerjordan.github.io/posts/muon/); NorMuon, Li et al., arXiv:2510.05491; cautious weight decay,
Chen et al., arXiv:2510.12402; row equilibration, arXiv:2603.28254; Frobenius normalisation, arXiv:2602.21545.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from anarcho_optim.coefficients import iteration
from anarcho_optim.groups import Blocks
from anarcho_optim.scaling import shape_scale
from anarcho_optim.torch.newton_schulz import orthogonalize_, resolve_ns_dtype
from anarcho_optim.torch.rounding import copy_rounded_

Options = Mapping[str, Any]

CACHE_ELEMENTS = 2**17
"""Elements of a part that is worked on at a time on the CPU."""


def advance_momentum(
    momenta: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    momentum: float,
    nesterov: bool,
    stochastic_rounding: bool = False,
) -> Tensor:
    """m <- mu m + (1 - mu) g in place; returns the updates, stacked in float32: (1 - mu) g + mu m with ``nesterov``, else m.

    The arithmetic is float32; a momentum of another type is rounded once, and the updates are of what it was before that.
    """
    updates = torch.empty((len(momenta), *momenta[0].shape), dtype=torch.float32, device=momenta[0].device)
    for matrices in zip(momenta, gradients, updates.unbind(), strict=True):
        for m, g, u in zip(*map(_cache_sized, matrices), strict=True):
            gradient, wide = g.float(), m.float()
            wide.lerp_(gradient, 1 - momentum)
            if m.dtype != torch.float32:
                copy_rounded_(m, wide, stochastic=stochastic_rounding)
            if nesterov:
                torch.lerp(gradient, wide, momentum, out=u)
            else:
                u.copy_(wide)
    return updates


def _cache_sized(tensor: Tensor) -> Sequence[Tensor]:
    """On the CPU, parts along the first dimension that stay in a core's cache from one operation to the next; elsewhere all of it."""
    if tensor.device.type != "cpu" or tensor.numel() <= CACHE_ELEMENTS:
        return (tensor,)
    return tensor.split(max(1, CACHE_ELEMENTS * len(tensor) // tensor.numel()))


def equilibrate_rows(matrices: Tensor) -> Tensor:
    """Each row of (matrices, rows, columns) divided by its 2-norm; rows of zeros stay zero."""
    largest = matrices.abs().amax(dim=-1, keepdim=True)
    scaled = torch.where(largest > 0, matrices / largest, 0.0)
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return torch.where(norm > 0, scaled / norm, 0.0)


def frobenius_factor(orthogonal: Tensor) -> Tensor:
    """sqrt(min(rows, columns)) / ||O||_F per matrix, (matrices, 1, 1) float32; 0 for zeros."""
    norm = torch.linalg.vector_norm(orthogonal, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    return torch.where(norm > 0, math.sqrt(min(orthogonal.shape[-2:])) / norm, 0.0)


def normuon_factors(mean_sq: Tensor, neuron_mean_sq: Tensor, *, beta2: float) -> tuple[Tensor, Tensor]:
    """What NorMuon multiplies each neuron's update by, and the new running mean square, both (matrices, neurons) float32.

    ``mean_sq`` is the mean square of each neuron's update. The factors keep the Frobenius norm of every matrix.
    """
    running = torch.lerp(neuron_mean_sq, mean_sq, 1 - beta2)
    inverse = torch.where(running > 0, running.rsqrt(), 0.0)
    after = (mean_sq * inverse.square()).sum(dim=-1, keepdim=True)
    ratio = torch.where(after > 0, (mean_sq.sum(dim=-1, keepdim=True) / after).sqrt(), 0.0)
    return inverse * ratio, running


def _neuron_blocks(neurons: Tensor, blocks: Blocks, axis: int) -> tuple[Tensor, ...]:
    """`neuron_mean_sq` (matrices, rows, blocks) or (matrices, blocks, columns) cut like the matrices themselves."""
    kept = 0 if axis == -1 else 1
    return neurons.split(blocks.sizes if kept == blocks.split_dim else 1, dim=blocks.split_dim + 1)


def orthogonal_blocks(updates: Tensor, blocks: Blocks, options: Options) -> list[Tensor]:
    """The orthogonalised blocks of stacked ``updates`` (parameters, *shape): one (parameters x count, rows, columns) stack per block.

    ``updates`` may be overwritten.
    """
    pieces = split_blocks(updates, blocks)
    variant = iteration(options["variant"], ns_steps=options["ns_steps"], ns_coefficients=options["ns_coefficients"])
    results: dict[int, Tensor] = {}
    for shape in dict.fromkeys(blocks.shapes):
        indices = [i for i, other in enumerate(blocks.shapes) if other == shape]
        if 0 in shape:
            results.update((i, pieces[i]) for i in indices)
            continue
        stack = pieces[indices[0]] if len(indices) == 1 else torch.cat([pieces[i] for i in indices])
        if options["row_equilibration"]:
            stack = equilibrate_rows(stack)
        dtype = resolve_ns_dtype(options["ns_dtype"], updates.device)
        orthogonal = orthogonalize_(stack, variant=variant, dtype=dtype)
        if options["frobenius_normalization"]:
            orthogonal = orthogonal.float() * frobenius_factor(orthogonal)
        results.update(zip(indices, orthogonal.chunk(len(indices)), strict=True))
    return [results[i] for i in range(len(pieces))]


def split_blocks(whole: Tensor, blocks: Blocks) -> list[Tensor]:
    """Views of the blocks of a stack of whole matrices, (..., rows, columns): one (matrices, rows, columns) stack per block."""
    return list(whole.view(-1, blocks.rows, blocks.columns).split(blocks.sizes, dim=blocks.split_dim + 1))


def join_blocks(pieces: Sequence[Tensor], blocks: Blocks) -> Tensor:
    """The inverse of `split_blocks`: (matrices, rows, columns)."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=blocks.split_dim + 1)


def common_scale(blocks: Blocks, options: Options) -> float | None:
    """The scale S that all blocks of a parameter share, None where they differ."""
    scales = {shape_scale(options["adjust_lr_fn"], *shape) for shape in blocks.shapes if 0 not in shape}
    return scales.pop() if len(scales) == 1 else None


def scaled_updates(
    pieces: Sequence[Tensor], out: Tensor, blocks: Blocks, options: Options, neuron_mean_sq: Tensor | None
) -> None:
    """Writes O, or S O where blocks differ in S, into ``out`` (parameters, *shape) float32; NorMuon where ``neuron_mean_sq`` is given.

    The running mean square is updated in place. A scale that all blocks share is left to `apply_updates`, which applies it at no cost.
    """
    shared = common_scale(blocks, options) is not None
    targets = split_blocks(out, blocks)
    axis = options["normuon_axis"]
    neurons = None if neuron_mean_sq is None else _neuron_blocks(neuron_mean_sq, blocks, axis)
    for index, (piece, target, shape) in enumerate(zip(pieces, targets, blocks.shapes, strict=True)):
        if target.numel() == 0:
            continue
        target.copy_(piece)
        factor: Tensor | float = 1.0 if shared else shape_scale(options["adjust_lr_fn"], *shape)
        if neurons is not None:
            mean_sq = target.square().mean(dim=axis)
            block = neurons[index]
            factors, running = normuon_factors(mean_sq, block.squeeze(axis), beta2=options["normuon_beta2"])
            block.copy_(running.unsqueeze(axis))
            factor = factors.unsqueeze(axis) * factor
        if isinstance(factor, Tensor) or factor != 1.0:
            target.mul_(factor)


def apply_updates(
    parameters: Sequence[Tensor],
    updates: Sequence[Tensor],
    *,
    lr: float,
    scale: float,
    weight_decay: float,
    cautious: bool,
    stochastic_rounding: bool = False,
) -> None:
    """W <- (1 - lr wd) W - lr S U in float32, rounded once to the parameter's dtype; ``cautious`` decays only where U W >= 0."""
    weights = [p.float() for p in parameters]
    if weights[0].device.type == "cpu" and not cautious:
        # One matrix after the other, while it lies in the cache.
        for w, u in zip(weights, updates, strict=True):
            if weight_decay:
                w.mul_(1 - lr * weight_decay)
            w.add_(u, alpha=-lr * scale)
    else:
        if weight_decay and cautious:
            for w, u in zip(weights, updates, strict=True):
                w.sub_(torch.where(w * u >= 0, w, 0.0), alpha=lr * weight_decay)
        elif weight_decay:
            torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_add_(weights, list(updates), alpha=-lr * scale)
    for parameter, weight in zip(parameters, weights, strict=True):
        if parameter.dtype != torch.float32:
            copy_rounded_(parameter, weight, stochastic=stochastic_rounding)
