"""Losses of preference tuning in MLX, from the log-probabilities of pairs of answers to one prompt.

Notable: the formulas, their papers and the measures are those of `anarcho_train.losses.torch_preference`, value for value: pure functions
of (pairs,) arrays that give a value per pair, summed by `PreferenceLoss` and divided once by the number of the step's pairs.

Rows 2i and 2i + 1 of a batch are the chosen and the rejected answer. A pair whose rows have no weight is padding and counts nothing.

Symbols: y_w chosen, y_l rejected, pi the policy, ref the reference, sigma the logistic function, |y| the answer's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from anarcho_train.config import PreferenceConfig
from anarcho_train.losses.mlx import answer_logprobs
from anarcho_train.losses.pairs import num_pairs, pair_arrays
from anarcho_train.step import Batch

_LARGEST_MEAN_LOGPROB = -1e-6
"""A probability of 1 has infinite odds; beyond this, an answer is certain and has no gradient through them."""


def dpo_losses(chosen: mx.array, rejected: mx.array, *, beta: float, label_smoothing: float = 0.0) -> mx.array:
    """DPO (Rafailov et al. 2023, equation 7): ``-log sigma(beta * (chosen - rejected))``, (pairs,) to (pairs,).

    ``chosen`` and ``rejected`` are log(pi / ref) of the answers. With ``label_smoothing`` e it is conservative DPO (Mitchell 2023):
    ``-(1 - e) * log sigma(m) - e * log sigma(-m)`` with m = beta * (chosen - rejected).
    """
    return _smoothed(beta * (chosen - rejected), label_smoothing)


def ipo_losses(chosen: mx.array, rejected: mx.array, *, beta: float) -> mx.array:
    """IPO (Azar et al. 2023, equation 17): ``(chosen - rejected - 1 / (2 * beta))^2``, (pairs,) to (pairs,); beta is the paper's tau."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def simpo_losses(
    chosen: mx.array, rejected: mx.array, *, beta: float, gamma: float, label_smoothing: float = 0.0
) -> mx.array:
    """SimPO (Meng et al. 2024, equation 6): ``-log sigma(beta * (chosen - rejected) - gamma)``, (pairs,) to (pairs,).

    ``chosen`` and ``rejected`` are log pi(y|x) / |y|; there is no reference. ``label_smoothing`` as in `dpo_losses`.
    """
    return _smoothed(beta * (chosen - rejected) - gamma, label_smoothing)


def orpo_losses(chosen: mx.array, rejected: mx.array, *, beta: float) -> mx.array:
    """ORPO (Hong et al. 2024, equations 6 and 7): ``-chosen - beta * log sigma(log odds(y_w) - log odds(y_l))``, (pairs,) to (pairs,).

    ``chosen`` and ``rejected`` are log P = log pi(y|x) / |y|, the odds P / (1 - P); beta is the paper's lambda.
    """
    return -chosen - beta * _log_sigmoid(_log_odds(chosen) - _log_odds(rejected))


def kto_losses(
    chosen: mx.array,
    rejected: mx.array,
    *,
    beta: float,
    chosen_kl: mx.array,
    rejected_kl: mx.array,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> mx.array:
    """KTO (Ethayarajh et al. 2024, L_KTO of section 4.1) of the two answers of each pair, their mean: (pairs,) to (pairs,).

    ``chosen`` and ``rejected`` are log(pi / ref). A chosen answer is desirable, ``1 - sigma(beta * (chosen - chosen_kl))``, a rejected one
    undesirable, ``1 - sigma(beta * (rejected_kl - rejected))``, each with its weight; the points of reference are scalars (see `kto_kl`).
    """
    desirable = mx.sigmoid(beta * (chosen_kl - chosen))
    undesirable = mx.sigmoid(beta * (rejected - rejected_kl))
    return (desirable_weight * desirable + undesirable_weight * undesirable) / 2


def kto_kl(logratios: mx.array, weights: mx.array) -> mx.array:
    """An estimate of KL(pi || ref), ``max(0, mean log(pi / ref))`` over the answers that count, without gradient: (pairs,) twice to ().

    `PreferenceLoss` takes for the chosen answers the rejected ones of the same batch, and the other way round.
    """
    mean = (weights * logratios).sum() / mx.maximum(weights.sum(), 1)
    return mx.stop_gradient(mx.maximum(mean, 0))


class PreferenceLoss:
    """The loss of preference tuning as `anarcho_train.steps.mlx.MlxStep` takes it; its weight is the number of pairs.

    Measures, per pair: ``reward_chosen`` and ``reward_rejected`` (beta times what the loss compares), ``margin`` between them,
    ``accuracy`` (share of pairs of which the chosen answer has the larger reward) and, where there is a reference, ``kl``: the mean of
    log(pi / ref) of both answers, in nats.
    """

    def __init__(self, config: PreferenceConfig) -> None:
        self.config = config

    def weight(self, batch: Batch) -> float:
        """Pairs of which both answers count."""
        return num_pairs(batch)

    def arrays(self, batch: Batch) -> dict[str, np.ndarray]:
        """What the loss reads besides the policy's log-probabilities; raises ValueError where a reference is needed and missing."""
        return pair_arrays(batch, self.config)

    def __call__(self, logprobs: mx.array, arrays: Mapping[str, mx.array]) -> tuple[mx.array, dict[str, mx.array]]:
        """Sum of the loss and of the measures over the pairs; ``logprobs`` float32 (rows, length), ``arrays`` are `arrays`'."""
        weights = arrays["weights"]
        lengths = weights.sum(axis=-1)
        counted = (lengths != 0).astype(logprobs.dtype)
        pairs = counted[0::2] * counted[1::2]
        sums = answer_logprobs(logprobs, weights)
        if self.config.needs_reference:
            sums = sums - arrays["reference"]
        values = sums / mx.maximum(lengths, 1) if self.config.per_token else sums
        chosen, rejected = values[0::2], values[1::2]
        loss = (pairs * self._losses(chosen, rejected, pairs)).sum()
        with_kl = {"kl": (sums[0::2] + sums[1::2]) / 2} if self.config.needs_reference else {}
        measures = self._measures(chosen, rejected) | with_kl
        return loss, {name: mx.stop_gradient((pairs * measure).sum()) for name, measure in measures.items()}

    def _losses(self, chosen: mx.array, rejected: mx.array, pairs: mx.array) -> mx.array:
        config, beta = self.config, self.config.scale
        match config.loss:
            case "dpo":
                return dpo_losses(chosen, rejected, beta=beta, label_smoothing=config.label_smoothing)
            case "ipo":
                return ipo_losses(chosen, rejected, beta=beta)
            case "simpo":
                smoothing = config.label_smoothing
                return simpo_losses(chosen, rejected, beta=beta, gamma=config.gamma, label_smoothing=smoothing)
            case "orpo":
                return orpo_losses(chosen, rejected, beta=beta)
            case "kto":
                return kto_losses(
                    chosen,
                    rejected,
                    beta=beta,
                    chosen_kl=kto_kl(rejected, pairs),
                    rejected_kl=kto_kl(chosen, pairs),
                    desirable_weight=config.desirable_weight,
                    undesirable_weight=config.undesirable_weight,
                )

    def _measures(self, chosen: mx.array, rejected: mx.array) -> dict[str, mx.array]:
        beta = self.config.scale
        return {
            "reward_chosen": beta * chosen,
            "reward_rejected": beta * rejected,
            "margin": beta * (chosen - rejected),
            "accuracy": (chosen > rejected).astype(chosen.dtype),
        }


def _log_sigmoid(x: mx.array) -> mx.array:
    return -mx.logaddexp(-x, mx.zeros_like(x))


def _smoothed(margin: mx.array, label_smoothing: float) -> mx.array:
    loss = -_log_sigmoid(margin)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * _log_sigmoid(-margin)
    return loss


def _log_odds(mean_logprobs: mx.array) -> mx.array:
    """``log(P / (1 - P))`` from log P, exact at both ends (Mächler 2012, "Accurately computing log(1 - exp(-|a|))").

    Both branches are computed, so each is given a value within its own range: the gradient of the other would be infinite times zero.
    """
    value = mx.minimum(mean_logprobs, _LARGEST_MEAN_LOGPROB)
    near_zero = value < -math.log(2)
    small = mx.log1p(-mx.exp(mx.where(near_zero, value, -1.0)))
    large = mx.log(-mx.expm1(mx.where(near_zero, -0.5, value)))
    return value - mx.where(near_zero, small, large)
