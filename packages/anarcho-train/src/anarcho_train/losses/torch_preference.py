"""Losses of preference tuning in PyTorch; `anarcho_train.losses.preference` has the formulas and their papers."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

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


def _log_odds(mean_logprobs: Tensor) -> Tensor:
    """``log(P / (1 - P))`` from log P, exact at both ends (Mächler 2012, "Accurately computing log(1 - exp(-|a|))")."""
    value = mean_logprobs.clamp(max=LARGEST_MEAN_LOGPROB)
    return value - torch.where(value < -math.log(2), torch.log1p(-torch.exp(value)), torch.log(-torch.expm1(value)))


_FORMULAS = PreferenceFormulas(
    Operations(
        sigmoid=torch.sigmoid,
        log_sigmoid=logsigmoid,
        log_odds=_log_odds,
        at_least=lambda x, number: x.clamp(min=number),
        as_numbers=Tensor.float,
        without_gradient=Tensor.detach,
    )
)

dpo_losses, ipo_losses, simpo_losses = _FORMULAS.dpo_losses, _FORMULAS.ipo_losses, _FORMULAS.simpo_losses
orpo_losses, kto_losses, kto_kl = _FORMULAS.orpo_losses, _FORMULAS.kto_losses, _FORMULAS.kto_kl
PreferenceLoss = partial(preference.PreferenceLoss, formulas=_FORMULAS)
