"""Losses of preference tuning in MLX; `anarcho_train.losses.preference` has the formulas and their papers."""

from __future__ import annotations

import math
from functools import partial

import mlx.core as mx

from anarcho_train.losses import preference
from anarcho_train.losses.preference import LARGEST_MEAN_LOGPROB, Operations, PreferenceFormulas

__all__ = [
    "PreferenceLoss",
    "dpo_losses",
    "ipo_losses",
    "kto_kl",
    "kto_losses",
    "orpo_losses",
    "simpo_losses",
]


def _log_sigmoid(x: mx.array) -> mx.array:
    return -mx.logaddexp(-x, mx.zeros_like(x))


def _log_odds(mean_logprobs: mx.array) -> mx.array:
    """``log(P / (1 - P))`` from log P, exact at both ends (Mächler 2012, "Accurately computing log(1 - exp(-|a|))").

    Both branches are computed, so each is given a value within its own range: the gradient of the other would be infinite times zero.
    """
    value = mx.minimum(mean_logprobs, LARGEST_MEAN_LOGPROB)
    near_zero = value < -math.log(2)
    small = mx.log1p(-mx.exp(mx.where(near_zero, value, -1.0)))
    large = mx.log(-mx.expm1(mx.where(near_zero, -0.5, value)))
    return value - mx.where(near_zero, small, large)


_FORMULAS = PreferenceFormulas(
    Operations(
        sigmoid=mx.sigmoid,
        log_sigmoid=_log_sigmoid,
        log_odds=_log_odds,
        at_least=mx.maximum,
        as_numbers=lambda condition: condition.astype(mx.float32),
        without_gradient=mx.stop_gradient,
    )
)

dpo_losses, ipo_losses, simpo_losses = _FORMULAS.dpo_losses, _FORMULAS.ipo_losses, _FORMULAS.simpo_losses
orpo_losses, kto_losses, kto_kl = _FORMULAS.orpo_losses, _FORMULAS.kto_losses, _FORMULAS.kto_kl
PreferenceLoss = partial(preference.PreferenceLoss, formulas=_FORMULAS)
