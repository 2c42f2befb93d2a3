"""Losses of preference tuning, whatever the framework, from the log-probabilities of pairs of answers to one prompt.

Notable: the formulas are pure functions of (pairs,) arrays and give a value per pair; `PreferenceLoss` sums log-probabilities over
answers, applies one of them and returns sums over pairs, to be divided once by the number of the step's pairs. So the gradient
does not depend on how pairs are split into batches, except KTO's, which compares with an average over a batch. What a framework
spells in its own way is in its `Operations`.

Rows 2i and 2i + 1 of a batch are the chosen and the rejected answer. A pair whose rows have no weight is padding and counts nothing.

Symbols: y_w chosen, y_l rejected, pi the policy, ref the reference, sigma the logistic function, |y| the answer's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from anarcho_train.config import PreferenceConfig
from anarcho_train.losses.likelihood import Array, answer_logprobs
from anarcho_train.losses.pairs import num_pairs, pair_arrays
from anarcho_train.step import Batch

__all__ = ["LARGEST_MEAN_LOGPROB", "Operations", "PreferenceFormulas", "PreferenceLoss"]

LARGEST_MEAN_LOGPROB = -1e-6
"""A probability of 1 has infinite odds; beyond this, an answer is certain and has no gradient through them."""


@dataclass(frozen=True, kw_only=True)
class Operations:
    """What the formulas ask of a framework besides arithmetic, comparison and ``sum``: functions of each element, with gradients."""

    sigmoid: Callable[[Array], Array]
    """The logistic function."""
    log_sigmoid: Callable[[Array], Array]
    """Its logarithm, which does not overflow."""
    log_odds: Callable[[Array], Array]
    """``log(P / (1 - P))`` from log P, which is cut off at `LARGEST_MEAN_LOGPROB`."""
    at_least: Callable[[Array, float], Array]
    """The larger one of element and number."""
    as_numbers: Callable[[Array], Array]
    """Float32 1 for true and 0 for false."""
    without_gradient: Callable[[Array], Array]
    """The same values as constants."""


class PreferenceFormulas:
    """The losses as functions of (pairs,) arrays, over the operations of one framework."""

    def __init__(self, operations: Operations) -> None:
        self.operations = operations

    def dpo_losses(self, chosen: Array, rejected: Array, *, beta: float, label_smoothing: float = 0.0) -> Array:
        """DPO (Rafailov et al. 2023, equation 7): ``-log sigma(beta * (chosen - rejected))``, (pairs,) to (pairs,).

        ``chosen`` and ``rejected`` are log(pi / ref) of the answers. With ``label_smoothing`` e it is conservative DPO (Mitchell 2023, "A
        note on DPO with noisy preferences"): ``-(1 - e) * log sigma(m) - e * log sigma(-m)`` with m = beta * (chosen - rejected).
        """
        return self._smoothed(beta * (chosen - rejected), label_smoothing)

    def ipo_losses(self, chosen: Array, rejected: Array, *, beta: float) -> Array:
        """IPO (Azar et al. 2023, equation 17): ``(chosen - rejected - 1 / (2 * beta))^2``, (pairs,) to (pairs,); beta is the paper's tau.

        ``chosen`` and ``rejected`` are log(pi / ref) of the answers, usually divided by their tokens, as otherwise the target margin of
        1 / (2 * beta) means less the longer the answers are.
        """
        return (chosen - rejected - 1 / (2 * beta)) ** 2

    def simpo_losses(
        self, chosen: Array, rejected: Array, *, beta: float, gamma: float, label_smoothing: float = 0.0
    ) -> Array:
        """SimPO (Meng et al. 2024, equation 6): ``-log sigma(beta * (chosen - rejected) - gamma)``, (pairs,) to (pairs,).

        ``chosen`` and ``rejected`` are log pi(y|x) / |y|; there is no reference. ``label_smoothing`` as in `dpo_losses`.
        """
        return self._smoothed(beta * (chosen - rejected) - gamma, label_smoothing)

    def orpo_losses(self, chosen: Array, rejected: Array, *, beta: float) -> Array:
        """ORPO (Hong et al. 2024, equations 6 and 7): ``-chosen - beta * log sigma(log odds(y_w) - log odds(y_l))``, (pairs,) to (pairs,).

        ``chosen`` and ``rejected`` are log P = log pi(y|x) / |y|, the odds P / (1 - P); the first term is the usual loss of fine-tuning
        on the chosen answer, a mean over its tokens; beta is the paper's lambda.
        """
        log_odds = self.operations.log_odds
        return -chosen - beta * self.operations.log_sigmoid(log_odds(chosen) - log_odds(rejected))

    def kto_losses(
        self,
        chosen: Array,
        rejected: Array,
        *,
        beta: float,
        chosen_kl: Array,
        rejected_kl: Array,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
    ) -> Array:
        """KTO (Ethayarajh et al. 2024, L_KTO of section 4.1) of the two answers of each pair, their mean: (pairs,) to (pairs,).

        ``chosen`` and ``rejected`` are log(pi / ref). A chosen answer is desirable, ``1 - sigma(beta * (chosen - chosen_kl))``, a rejected
        one undesirable, ``1 - sigma(beta * (rejected_kl - rejected))``, each with its weight; the points of reference are scalars (see
        `kto_kl`).
        """
        desirable = self.operations.sigmoid(beta * (chosen_kl - chosen))
        undesirable = self.operations.sigmoid(beta * (rejected - rejected_kl))
        return (desirable_weight * desirable + undesirable_weight * undesirable) / 2

    def kto_kl(self, logratios: Array, weights: Array) -> Array:
        """An estimate of KL(pi || ref), ``max(0, mean log(pi / ref))`` over the answers that count, without gradient: (pairs,) twice to ().

        Ethayarajh et al. take answers of other prompts, which costs a second pass through the model. `PreferenceLoss` takes for the
        chosen answers the rejected ones of the same batch, and the other way round: answers that are not themselves judged by the
        estimate.
        """
        at_least = self.operations.at_least
        mean = (weights * logratios).sum() / at_least(weights.sum(), 1)
        return self.operations.without_gradient(at_least(mean, 0))

    def _smoothed(self, margin: Array, label_smoothing: float) -> Array:
        log_sigmoid = self.operations.log_sigmoid
        loss = -log_sigmoid(margin)
        if label_smoothing:
            loss = (1 - label_smoothing) * loss - label_smoothing * log_sigmoid(-margin)
        return loss


class PreferenceLoss:
    """The loss of preference tuning as the step of the formulas' framework takes it; its weight is the number of pairs.

    Measures, per pair: ``reward_chosen`` and ``reward_rejected`` (beta times what the loss compares), ``margin`` between them,
    ``accuracy`` (share of pairs of which the chosen answer has the larger reward) and, where there is a reference, ``kl``: the mean of
    log(pi / ref) of both answers, in nats, which estimates the divergence from the reference on the data's answers and may be negative.
    """

    def __init__(self, config: PreferenceConfig, *, formulas: PreferenceFormulas) -> None:
        self.config, self._formulas, self._operations = config, formulas, formulas.operations

    def weight(self, batch: Batch) -> float:
        """Pairs of which both answers count."""
        return num_pairs(batch)

    def arrays(self, batch: Batch) -> dict[str, np.ndarray]:
        """What the loss reads besides the policy's log-probabilities; raises ValueError where a reference is needed and missing."""
        return pair_arrays(batch, self.config)

    def __call__(self, logprobs: Array, arrays: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Sum of the loss and of the measures over the pairs; ``logprobs`` float32 (rows, length), ``arrays`` are `arrays`'."""
        operations, weights = self._operations, arrays["weights"]
        lengths = weights.sum(-1)
        counted = operations.as_numbers(lengths != 0)
        pairs = counted[0::2] * counted[1::2]
        sums = answer_logprobs(logprobs, weights)
        if self.config.needs_reference:
            sums = sums - arrays["reference"]
        values = sums / operations.at_least(lengths, 1) if self.config.per_token else sums
        chosen, rejected = values[0::2], values[1::2]
        loss = (pairs * self._losses(chosen, rejected, pairs)).sum()
        with_kl = {"kl": (sums[0::2] + sums[1::2]) / 2} if self.config.needs_reference else {}
        constant = operations.without_gradient
        measures = self._measures(constant(chosen), constant(rejected)) | with_kl
        return loss, {name: (pairs * constant(measure)).sum() for name, measure in measures.items()}

    def _losses(self, chosen: Array, rejected: Array, pairs: Array) -> Array:
        config, formulas = self.config, self._formulas
        options: dict[str, Any] = {"beta": config.scale}
        match config.loss:
            case "dpo":
                return formulas.dpo_losses(chosen, rejected, label_smoothing=config.label_smoothing, **options)
            case "ipo":
                return formulas.ipo_losses(chosen, rejected, **options)
            case "simpo":
                options |= {"gamma": config.gamma, "label_smoothing": config.label_smoothing}
                return formulas.simpo_losses(chosen, rejected, **options)
            case "orpo":
                return formulas.orpo_losses(chosen, rejected, **options)
            case "kto":
                return formulas.kto_losses(
                    chosen,
                    rejected,
                    chosen_kl=formulas.kto_kl(rejected, pairs),
                    rejected_kl=formulas.kto_kl(chosen, pairs),
                    desirable_weight=config.desirable_weight,
                    undesirable_weight=config.undesirable_weight,
                    **options,
                )

    def _measures(self, chosen: Array, rejected: Array) -> dict[str, Array]:
        beta = self.config.scale
        return {
            "reward_chosen": beta * chosen,
            "reward_rejected": beta * rejected,
            "margin": beta * (chosen - rejected),
            "accuracy": self._operations.as_numbers(chosen > rejected),
        }
