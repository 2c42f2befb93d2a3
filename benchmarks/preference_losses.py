"""The losses of fine-tuning and preference tuning beside TRL's own code, values and gradients, on the same batches.

    uv run --with 'trl==1.16.0' python benchmarks/preference_losses.py --markdown table.md

Each loss is a function of the log-probabilities of tokens. Both sides get the same random ones, in float32 on the processor; of TRL's
trainers only the loss runs, on a stand-in that has the fields it reads. A value's difference is absolute; a gradient's, with respect to
the log-probabilities, is relative to its largest entry. The table has the largest over all batches. The exit status is 1 where losses of
the same definition differ by more than the tolerance, or where DPO without any step taken is not ln 2.

TRL's DPO has no label smoothing, so conservative DPO is compared with its CPO loss, which has, on the same log-ratios.

Two definitions differ on purpose. Their rows show by how much on such data, and decide nothing:

* ORPO's first term. Here it is a mean over the tokens of each chosen answer, then over pairs, so that each pair counts the same. TRL's is a
  mean over the tokens of all chosen sequences of the batch, so that long ones count more (prompts too, which are left out here). The two
  are the same where answers are equally long; the odds ratio's term always is.
* KTO's estimate of the divergence. TRL takes answers of other prompts, in a second pass. Here a batch's rejected answers serve its chosen
  ones, and the other way round, without a second pass. Given the same estimate, the losses are the same. In the row that shows the
  difference, TRL's estimate is from all answers of the batch.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import trl
from anarcho_train import PreferenceConfig
from anarcho_train.losses.torch import NextTokenLoss, answer_logprobs
from anarcho_train.losses.torch_preference import PreferenceLoss, kto_losses, orpo_losses
from torch import Tensor
from trl import DPOTrainer, KTOTrainer, SFTTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

LENGTH = 48
LONGEST_PROMPT = 20
EQUAL_ANSWER = 20

Loss = Callable[[Tensor], Tensor]
"""From the log-probabilities of tokens, (rows, length), to the mean that is trained on."""


@dataclass(frozen=True)
class Pairs:
    """A batch: rows 2i and 2i + 1 are the chosen and the rejected answer; `weights` are 1 on their tokens."""

    logprobs: Tensor
    reference: Tensor
    weights: Tensor

    @property
    def reference_sums(self) -> Tensor:
        return answer_logprobs(self.reference, self.weights)


@dataclass(frozen=True)
class Comparison:
    """One row of the table; `differs` says why the definitions are not the same, `value` what both must give."""

    name: str
    ours: Loss
    theirs: Loss
    differs: str = ""
    value: float | None = None


def main() -> None:
    """Compare every loss on every batch, print the table and fail where a difference is too large."""
    options = _options()
    worst: dict[str, tuple[float, float]] = {}
    differs: dict[str, str] = {}
    for seed in range(options.batches):
        pairs, equal = (_draw(seed, options.pairs, equal=equal) for equal in (False, True))
        for comparison in _comparisons(pairs, equal):
            found = _differences(comparison, pairs.logprobs)
            # NumPy's maximum keeps a NaN, which Python's may drop.
            largest = np.maximum(found, worst.get(comparison.name, (0.0, 0.0)))
            worst[comparison.name] = (float(largest[0]), float(largest[1]))
            differs[comparison.name] = comparison.differs
    table = _table(worst, differs)
    print(f"TRL {trl.__version__}, torch {torch.__version__}, {options.batches} batches of {options.pairs} pairs\n")
    print(table)
    if options.markdown:
        options.markdown.write_text(table)
    wrong = [name for name, found in worst.items() if not differs[name] and not max(found) <= options.tolerance]
    if wrong or any(math.isnan(number) for found in worst.values() for number in found):
        sys.exit(f"differences above {options.tolerance:g}, or not numbers: {', '.join(wrong) or 'see the table'}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=16, help="of each batch")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args()
    if options.batches < 1 or options.pairs < 2:
        parser.error("at least one batch of two pairs is needed to compare anything")
    return options


def _draw(seed: int, pairs: int, *, equal: bool) -> Pairs:
    """A batch of random log-probabilities, the same for both kinds of answers: of any length, or all of one."""
    random = np.random.default_rng(seed)
    logprobs = -random.exponential(1.5, (2 * pairs, LENGTH))
    reference = logprobs * np.exp(random.normal(0, 0.3, logprobs.shape))
    starts = random.integers(1, LONGEST_PROMPT, (2 * pairs, 1))
    lengths = EQUAL_ANSWER if equal else random.integers(1, LENGTH - LONGEST_PROMPT, (2 * pairs, 1))
    columns = np.arange(LENGTH)
    weights = (columns >= starts) & (columns < starts + lengths)
    return Pairs(*(torch.tensor(array, dtype=torch.float32) for array in (logprobs, reference, weights)))


def _differences(comparison: Comparison, logprobs: Tensor) -> tuple[float, float]:
    """Of the values, and of the gradients relative to the largest entry of TRL's."""
    our_value, our_gradient = _run(comparison.ours, logprobs)
    their_value, their_gradient = _run(comparison.theirs, logprobs)
    value = abs(our_value - their_value)
    if comparison.value is not None:
        value = max(value, abs(our_value - comparison.value), abs(their_value - comparison.value))
    return value, float((our_gradient - their_gradient).abs().max() / their_gradient.abs().max())


def _run(loss: Loss, logprobs: Tensor) -> tuple[float, Tensor]:
    leaf = logprobs.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.item(), gradient


def _comparisons(pairs: Pairs, equal: Pairs) -> Iterator[Comparison]:
    """All rows of the table; `equal` differs from `pairs` in the lengths of the answers alone."""
    yield Comparison("SFT", _our_sft(pairs), _trl_sft(pairs))
    yield Comparison("SFT, accumulated over two batches", _our_sft(pairs), _trl_sft(pairs, parts=2))
    yield from _dpo_comparisons(pairs)
    for name, config in {
        "SimPO": PreferenceConfig(loss="simpo", gamma=1.0),
        "SimPO, smoothed": PreferenceConfig(loss="simpo", beta=2.5, gamma=0.5, label_smoothing=0.2),
    }.items():
        yield Comparison(name, _ours(config, pairs), _trl_cpo("simpo", config, pairs))
    yield from _orpo_comparisons(pairs, equal)
    yield from _kto_comparisons(pairs)


def _dpo_comparisons(pairs: Pairs) -> Iterator[Comparison]:
    dpo = PreferenceConfig(beta=0.1)
    per_token = PreferenceConfig(beta=2.0, length_normalization=True)
    smoothed = PreferenceConfig(beta=0.1, label_smoothing=0.1)
    ipo = PreferenceConfig(loss="ipo", beta=0.1)
    start = Pairs(pairs.logprobs, pairs.logprobs, pairs.weights)
    yield Comparison("DPO", _ours(dpo, pairs), _trl_dpo("sigmoid", dpo, pairs))
    before = _ours(dpo, start), _trl_dpo("sigmoid", dpo, start)
    yield Comparison("DPO at step 0, ln 2", *before, value=math.log(2))
    yield Comparison("DPO, per token", _ours(per_token, pairs), _trl_dpo("sigmoid_norm", per_token, pairs))
    yield Comparison("cDPO, smoothing 0.1", _ours(smoothed, pairs), _trl_cpo("sigmoid", smoothed, pairs))
    yield Comparison("IPO", _ours(ipo, pairs), _trl_dpo("ipo", ipo, pairs))


def _orpo_comparisons(pairs: Pairs, equal: Pairs) -> Iterator[Comparison]:
    orpo = PreferenceConfig(loss="orpo", beta=0.1)
    odds = _our_odds_ratio(orpo, pairs), _trl_orpo(orpo, pairs, first_term=False)
    yield Comparison("ORPO, odds ratio's term", *odds)
    yield Comparison("ORPO, answers of one length", _ours(orpo, equal), _trl_orpo(orpo, equal))
    why = "first term: a mean over answers here, over tokens in TRL"
    yield Comparison("ORPO, answers of any length", _ours(orpo, pairs), _trl_orpo(orpo, pairs), differs=why)


def _kto_comparisons(pairs: Pairs) -> Iterator[Comparison]:
    kto = PreferenceConfig(loss="kto", beta=0.1, undesirable_weight=1.33)
    given = torch.tensor(1.7)
    yield Comparison("KTO, given the same KL", _our_kto(kto, pairs, given), _trl_kto(kto, pairs, given))
    # All answers less likely than under the reference: both sides' estimates are then negative, and taken as 0.
    unlikely = Pairs(pairs.logprobs, pairs.logprobs / 2, pairs.weights)
    below = _log_ratios(unlikely.logprobs, unlikely)
    yield Comparison("KTO, estimates of 0", _ours(kto, unlikely), _trl_kto(kto, unlikely, below))
    estimate = _log_ratios(pairs.logprobs, pairs)
    why = "KL: from the opposite answers here, from other prompts' in TRL"
    yield Comparison("KTO, own estimates", _ours(kto, pairs), _trl_kto(kto, pairs, estimate), differs=why)


def _our_sft(pairs: Pairs) -> Loss:
    tensors = {"weights": pairs.weights}
    return lambda logprobs: NextTokenLoss()(logprobs, tensors)[0] / pairs.weights.sum()


def _ours(config: PreferenceConfig, pairs: Pairs) -> Loss:
    """The loss as the training step calls it: a sum, divided by the number of pairs."""
    tensors = {"weights": pairs.weights, "reference": pairs.reference_sums}
    return lambda logprobs: PreferenceLoss(config)(logprobs, tensors)[0] / (len(logprobs) // 2)


def _our_odds_ratio(config: PreferenceConfig, pairs: Pairs) -> Loss:
    def loss(logprobs: Tensor) -> Tensor:
        means = _means(logprobs, pairs.weights)
        return (orpo_losses(means[0::2], means[1::2], beta=config.scale) + means[0::2]).mean()

    return loss


def _our_kto(config: PreferenceConfig, pairs: Pairs, kl: Tensor) -> Loss:
    def loss(logprobs: Tensor) -> Tensor:
        ratios = _log_ratios(logprobs, pairs)
        return kto_losses(
            ratios[0::2],
            ratios[1::2],
            beta=config.scale,
            chosen_kl=kl,
            rejected_kl=kl,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        ).mean()

    return loss


def _trl_sft(pairs: Pairs, parts: int = 1) -> Loss:
    """`SFTTrainer.compute_loss`; in several parts, each is told the number of tokens of all, and gradients add up."""
    trainer = _trainer(
        args=SimpleNamespace(loss_type="nll", average_tokens_across_devices=False),
        compute_loss_func=None,
        label_smoother=None,
    )
    count = None if parts == 1 else pairs.weights.sum()

    def loss(logprobs: Tensor) -> Tensor:
        total = torch.zeros(())
        for some, weights in zip(logprobs.chunk(parts), pairs.weights.chunk(parts), strict=True):
            inputs = {"attention_mask": torch.ones_like(weights)}
            total = total + SFTTrainer.compute_loss(trainer, _model(some, weights), inputs, num_items_in_batch=count)
        return total

    return loss


def _trl_dpo(kind: str, config: PreferenceConfig, pairs: Pairs) -> Loss:
    """`DPOTrainer._compute_loss` with the reference's log-probabilities computed beforehand."""
    weights, reference = _halves(pairs.weights), _halves(pairs.reference_sums)
    chosen, rejected = reference.chunk(2)
    trainer = _trainer(
        loss_types=[kind],
        loss_weights=[1.0],
        beta=config.scale,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        precompute_ref_logps=True,
        use_weighting=False,
    )
    inputs = _inputs(weights) | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return lambda logprobs: DPOTrainer._compute_loss(trainer, _model(_halves(logprobs), weights), inputs, False)


def _trl_cpo(kind: str, config: PreferenceConfig, pairs: Pairs) -> Loss:
    """`CPOTrainer.cpo_loss`: SimPO of mean log-probabilities, or smoothed DPO where it is given log-ratios."""
    trainer = _trainer(
        loss_type=kind,
        alpha=0.0,
        beta=config.scale,
        simpo_gamma=config.gamma,
        label_smoothing=config.label_smoothing,
    )

    def loss(logprobs: Tensor) -> Tensor:
        values = _means(logprobs, pairs.weights) if kind == "simpo" else _log_ratios(logprobs, pairs)
        return CPOTrainer.cpo_loss(trainer, values[0::2], values[1::2])[0].mean()

    return loss


def _trl_orpo(config: PreferenceConfig, pairs: Pairs, *, first_term: bool = True) -> Loss:
    """`ORPOTrainer.get_batch_loss_metrics`, with what its pass through the model would give."""

    def loss(logprobs: Tensor) -> Tensor:
        means, chosen = _means(logprobs, pairs.weights), pairs.weights[0::2]
        likelihood = -answer_logprobs(logprobs[0::2], chosen).sum() / chosen.sum() * first_term
        no_logits = torch.zeros(1)
        trainer = _trainer(beta=config.scale)
        trainer.concatenated_forward = lambda *_: (means[0::2], means[1::2], no_logits, no_logits, likelihood)
        trainer.odds_ratio_loss = lambda *values: ORPOTrainer.odds_ratio_loss(trainer, *values)
        return ORPOTrainer.get_batch_loss_metrics(trainer, None, {})[0]

    return loss


def _trl_kto(config: PreferenceConfig, pairs: Pairs, kl_logratios: Tensor) -> Loss:
    """`KTOTrainer._compute_loss`, whose estimate of KL is the mean of `kl_logratios`, or 0 where that is negative."""
    trainer = _trainer(
        loss_type="kto",
        beta=config.scale,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        calculate_KL=True,
        precompute_ref_logps=True,
        _compute_kl_logps=lambda *_: kl_logratios,
    )
    inputs = _inputs(pairs.weights) | {
        "label": torch.arange(len(pairs.weights)) % 2 == 0,
        "ref_logps": pairs.reference_sums,
        "ref_KL_logps": torch.zeros_like(kl_logratios),
    }
    return lambda logprobs: KTOTrainer._compute_loss(trainer, _model(logprobs, pairs.weights), inputs, False)


def _trainer(**fields: Any) -> Any:
    """The fields that TRL's losses read, without the model, data and files that its trainers ask for."""
    accelerator = SimpleNamespace(
        device="cpu", gather=lambda value: value, gather_for_metrics=lambda value: value, parallelism_config=None
    )
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        _tp_size=1,
        _total_train_tokens=0,
        _metrics={"train": defaultdict(list)},
        **fields,
    )


def _model(logprobs: Tensor, weights: Tensor) -> Callable[..., SimpleNamespace]:
    """A model as TRL calls it: log-probabilities are 0 where no token counts; the rest is for its metrics alone."""
    zeros = torch.zeros_like(weights)
    outputs = SimpleNamespace(
        log_probs=logprobs * weights,
        label_mask=weights.bool(),
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
    )
    return lambda **_: outputs


def _inputs(weights: Tensor) -> dict[str, Tensor]:
    """TRL's masks are over tokens, ours over targets: each token but the first is the target of the one before it."""
    mask = torch.cat([torch.zeros(len(weights), 1), weights], dim=1)
    tokens = torch.zeros(mask.shape, dtype=torch.long)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(mask), "completion_mask": mask}


def _halves(rows: Tensor) -> Tensor:
    """TRL's order: all chosen answers, then all rejected ones."""
    return torch.cat([rows[0::2], rows[1::2]])


def _means(logprobs: Tensor, weights: Tensor) -> Tensor:
    return answer_logprobs(logprobs, weights) / weights.sum(dim=-1)


def _log_ratios(logprobs: Tensor, pairs: Pairs) -> Tensor:
    return answer_logprobs(logprobs, pairs.weights) - pairs.reference_sums


def _table(worst: dict[str, tuple[float, float]], differs: dict[str, str]) -> str:
    lines = ["| loss | value | gradient | definition |", "|---|---:|---:|---|"]
    for name, (value, gradient) in worst.items():
        lines.append(f"| {name} | {value:.1e} | {gradient:.1e} | {differs[name] or 'the same'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
