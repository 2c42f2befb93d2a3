"""Losses of preference tuning, from the log-probabilities of pairs of answers to one prompt.

Notable: the formulas are pure functions of (pairs,) tensors and give a value per pair; `PreferenceLoss` sums log-probabilities over
answers, applies one of them and returns sums over pairs, to be divided once by the number of the step's pairs. So the gradient
does not depend on how pairs are split into batches, except KTO's, which compares with an average over a batch.

Rows 2i and 2i + 1 of a batch are the chosen and the rejected answer. A pair whose rows have no weight is padding and counts nothing.

Symbols: y_w chosen, y_l rejected, pi the policy, ref the reference, sigma the logistic function, |y| the answer's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from torch import Tensor, exp, expm1, log, log1p, where
from torch.nn.functional import logsigmoid

from anarcho_train.config import PreferenceConfig
from anarcho_train.losses.pairs import num_pairs, pair_arrays
from anarcho_train.losses.torch import answer_logprobs
from anarcho_train.step import Batch

_LARGEST_MEAN_LOGPROB = -1e-6
"""A probability of 1 has infinite odds; beyond this, an answer is certain and has no gradient through them."""


def dpo_losses(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO (Rafailov et al. 2023, equation 7): ``-log sigma(beta * (chosen - rejected))``, (pairs,) to (pairs,).

    ``chosen`` and ``rejected`` are log(pi / ref) of the answers. With ``label_smoothing`` e it is conservative DPO (Mitchell 2023, "A
    note on DPO with noisy preferences"): ``-(1 - e) * log sigma(m) - e * log sigma(-m)`` with m = beta * (chosen - rejected).
    """
    return _smoothed(beta * (chosen - rejected), label_smoothing)


def ipo_losses(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """IPO (Azar et al. 2023, equation 17): ``(chosen - rejected - 1 / (2 * beta))^2``, (pairs,) to (pairs,); beta is the paper's tau.

    ``chosen`` and ``rejected`` are log(pi / ref) of the answers, usually divided by their tokens, as otherwise the target margin of
    1 / (2 * beta) means less the longer the answers are.
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def simpo_losses(
    chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float, label_smoothing: float = 0.0
) -> Tensor:
    """SimPO (Meng et al. 2024, equation 6): ``-log sigma(beta * (chosen - rejected) - gamma)``, (pairs,) to (pairs,).

    ``chosen`` and ``rejected`` are log pi(y|x) / |y|; there is no reference. ``label_smoothing`` as in `dpo_losses`.
    """
    return _smoothed(beta * (chosen - rejected) - gamma, label_smoothing)


def orpo_losses(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """ORPO (Hong et al. 2024, equations 6 and 7): ``-chosen - beta * log sigma(log odds(y_w) - log odds(y_l))``, (pairs,) to (pairs,).

    ``chosen`` and ``rejected`` are log P = log pi(y|x) / |y|, the odds P / (1 - P); the first term is the usual loss of fine-tuning
    on the chosen answer, a mean over its tokens; beta is the paper's lambda.
    """
    return -chosen - beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def kto_losses(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO (Ethayarajh et al. 2024, L_KTO of section 4.1) of the two answers of each pair, their mean: (pairs,) to (pairs,).

    ``chosen`` and ``rejected`` are log(pi / ref). A chosen answer is desirable, ``1 - sigma(beta * (chosen - chosen_kl))``, a rejected one
    undesirable, ``1 - sigma(beta * (rejected_kl - rejected))``, each with its weight; the points of reference are scalars (see `kto_kl`).
    """
    desirable = (beta * (chosen_kl - chosen)).sigmoid()
    undesirable = (beta * (rejected - rejected_kl)).sigmoid()
    return (desirable_weight * desirable + undesirable_weight * undesirable) / 2


def kto_kl(logratios: Tensor, weights: Tensor) -> Tensor:
    """An estimate of KL(pi || ref), ``max(0, mean log(pi / ref))`` over the answers that count, without gradient: (pairs,) twice to ().

    Ethayarajh et al. take answers of other prompts, which costs a second pass through the model. `PreferenceLoss` takes for the chosen
    answers the rejected ones of the same batch, and the other way round: answers that are not themselves judged by the estimate.
    """
    return ((weights * logratios).sum() / weights.sum().clamp(min=1)).clamp(min=0).detach()


class PreferenceLoss:
    """The loss of preference tuning as `anarcho_train.steps.torch.TorchStep` takes it; its weight is the number of pairs.

    Measures, per pair: ``reward_chosen`` and ``reward_rejected`` (beta times what the loss compares), ``margin`` between them,
    ``accuracy`` (share of pairs of which the chosen answer has the larger reward) and, where there is a reference, ``kl``: the mean of
    log(pi / ref) of both answers, in nats, which estimates the divergence from the reference on the data's answers and may be negative.
    """

    def __init__(self, config: PreferenceConfig) -> None:
        self.config = config

    def weight(self, batch: Batch) -> float:
        """Pairs of which both answers count."""
        return num_pairs(batch)

    def arrays(self, batch: Batch) -> dict[str, np.ndarray]:
        """What the loss reads besides the policy's log-probabilities; raises ValueError where a reference is needed and missing."""
        return pair_arrays(batch, self.config)

    def __call__(self, logprobs: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the loss and of the measures over the pairs; ``logprobs`` float32 (rows, length), ``tensors`` are `arrays`'."""
        weights = tensors["weights"]
        lengths = weights.sum(dim=-1)
        counted = (lengths != 0).to(logprobs.dtype)
        pairs = counted[0::2] * counted[1::2]
        sums = answer_logprobs(logprobs, weights)
        if self.config.needs_reference:
            sums = sums - tensors["reference"]
        values = sums / lengths.clamp(min=1) if self.config.per_token else sums
        chosen, rejected = values[0::2], values[1::2]
        loss = (pairs * self._losses(chosen, rejected, pairs)).sum()
        with_kl = {"kl": (sums[0::2] + sums[1::2]) / 2} if self.config.needs_reference else {}
        measures = self._measures(chosen.detach(), rejected.detach()) | with_kl
        return loss, {name: (pairs * measure.detach()).sum() for name, measure in measures.items()}

    def _losses(self, chosen: Tensor, rejected: Tensor, pairs: Tensor) -> Tensor:
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

    def _measures(self, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        beta = self.config.scale
        return {
            "reward_chosen": beta * chosen,
            "reward_rejected": beta * rejected,
            "margin": beta * (chosen - rejected),
            "accuracy": (chosen > rejected).to(chosen.dtype),
        }


def _smoothed(margin: Tensor, label_smoothing: float) -> Tensor:
    loss = -logsigmoid(margin)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * logsigmoid(-margin)
    return loss


def _log_odds(mean_logprobs: Tensor) -> Tensor:
    """``log(P / (1 - P))`` from log P, exact at both ends (Mächler 2012, "Accurately computing log(1 - exp(-|a|))")."""
    value = mean_logprobs.clamp(max=_LARGEST_MEAN_LOGPROB)
    return value - where(value < -math.log(2), log1p(-exp(value)), log(-expm1(value)))
