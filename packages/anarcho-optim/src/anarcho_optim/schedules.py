"""Learning-rate and momentum schedules: pure functions from a step to a number, the same for every framework.

Steps count from 0: ``step`` is the number of updates already made. Learning-rate schedules return the factor, in (0, 1], by which
the top learning rate is multiplied. The warm-up gives ``(step + 1) / warmup_steps``, so that the first update is not lost on a zero rate.

Sources: linear warm-up with cosine decay, Loshchilov and Hutter, arXiv:1608.03983; warm-up-stable-decay, Hu et al., arXiv:2404.06395;
momentum warm-up, Keller Jordan's Muon.
"""

from __future__ import annotations

import math

from anarcho_optim.config import OptimConfig


def _progress(step: int, start: int, stop: int) -> float:
    """How far ``step`` is between ``start`` and ``stop``, clamped to [0, 1]."""
    return min(1.0, max(0.0, (step - start) / max(1, stop - start)))


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def cosine(step: int, *, total_steps: int, warmup_steps: int = 0, final_fraction: float = 0.0) -> float:
    """Linear warm-up, then f + (1 - f)(1 + cos(pi p)) / 2 down to ``final_fraction`` = f at ``total_steps``."""
    shape = (1 + math.cos(math.pi * _progress(step, warmup_steps, total_steps))) / 2
    return _warmup(step, warmup_steps) * (final_fraction + (1 - final_fraction) * shape)


def linear(step: int, *, total_steps: int, warmup_steps: int = 0, final_fraction: float = 0.0) -> float:
    """Linear warm-up, then a straight line down to ``final_fraction`` at ``total_steps``."""
    shape = 1 - _progress(step, warmup_steps, total_steps)
    return _warmup(step, warmup_steps) * (final_fraction + (1 - final_fraction) * shape)


def warmup_stable_decay(
    step: int, *, total_steps: int, warmup_steps: int = 0, decay_fraction: float = 0.2, final_fraction: float = 0.0
) -> float:
    """Linear warm-up, a plateau, then a straight line to ``final_fraction`` over the last ``decay_fraction`` of all steps."""
    decay_start = max(warmup_steps, round(total_steps * (1 - decay_fraction)))
    shape = 1 - _progress(step, decay_start, total_steps)
    return _warmup(step, warmup_steps) * (final_fraction + (1 - final_fraction) * shape)


def constant(step: int, *, warmup_steps: int = 0) -> float:
    """Linear warm-up, then 1."""
    return _warmup(step, warmup_steps)


def momentum_warmup(step: int, *, start: float = 0.85, stop: float = 0.95, warmup_steps: int = 300) -> float:
    """Muon's momentum: a straight line from ``start`` to ``stop`` over ``warmup_steps`` steps, ``stop`` afterwards."""
    return start + (stop - start) * _progress(step, 0, warmup_steps) if warmup_steps else stop


def lr_scale(config: OptimConfig, step: int, *, total_steps: int) -> float:
    """The factor of the top learning rate that ``config`` gives the update number ``step`` of ``total_steps``."""
    shared = {
        "total_steps": total_steps,
        "warmup_steps": config.warmup_steps,
        "final_fraction": config.final_lr_fraction,
    }
    match config.schedule:
        case "cosine":
            return cosine(step, **shared)
        case "linear":
            return linear(step, **shared)
        case "wsd":
            return warmup_stable_decay(step, decay_fraction=config.decay_fraction, **shared)
        case "constant":
            return constant(step, warmup_steps=config.warmup_steps)


def momentum(config: OptimConfig, step: int) -> float:
    """Muon's momentum that ``config`` gives the update number ``step``."""
    start = min(0.85, config.momentum)
    return momentum_warmup(step, start=start, stop=config.momentum, warmup_steps=config.momentum_warmup_steps)
