"""Measuring the validation data: sums over batches, divided once at the end."""

from __future__ import annotations

import math
from collections.abc import Callable

from anarcho_train.interfaces import ValidationBatches
from anarcho_train.ranks import Alone, Ranks
from anarcho_train.step import Batch, LossSum, Step


def evaluate(
    step: Step, validation: ValidationBatches, *, batch_size: int, sequence_length: int, max_tokens: int | None = None
) -> tuple[float, float]:
    """Mean loss in nats per token and bits per byte of the validation text.

    ``max_tokens`` limits the evaluation to windows spread evenly over the text; None reads all of it. The bytes of a limited evaluation are
    taken as its share of the tokens.
    """
    total = total_loss(step, validation, batch_size=batch_size, window_tokens=sequence_length, max_tokens=max_tokens)
    return total.loss / total.weight, bits_per_byte(total, validation)


def total_loss(
    step: Step,
    validation: ValidationBatches,
    *,
    batch_size: int,
    window_tokens: float,
    max_tokens: int | None = None,
    measure: Callable[[Batch], LossSum] | None = None,
    ranks: Ranks | None = None,
) -> LossSum:
    """The loss and measures of the validation data, as sums; several ranks share the batches, and all have the sums of all.

    ``max_tokens`` limits it to windows (or batches) of ``window_tokens`` spread evenly over the data; None reads all. ``measure`` stands
    in for ``step.evaluate``.
    """
    windows = None if max_tokens is None else max(1, int(max_tokens // window_tokens))
    ranks, measure = ranks or Alone(), measure or step.evaluate
    total, unmeasured = LossSum(), None
    for number, batch in enumerate(validation.batches(batch_size, max_windows=windows)):
        if number % ranks.size == ranks.rank:
            total += measure(batch)
        elif number == 0:
            unmeasured = batch
    if ranks.size == 1:
        return total
    if (
        not total.weight and unmeasured is not None
    ):  # Fewer batches than ranks: even so, all must know what is measured.
        total = LossSum(measures=dict.fromkeys(measure(unmeasured).measures, 0.0))
    return _summed(total, ranks)


def _summed(own: LossSum, ranks: Ranks) -> LossSum:
    names = sorted(own.measures)
    loss, weight, *measures = ranks.gathered([own.loss, own.weight, *map(own.measures.__getitem__, names)]).sum(axis=0)
    return LossSum(loss=float(loss), weight=float(weight), measures=dict(zip(names, map(float, measures), strict=True)))


def bits_per_byte(total: LossSum, validation: ValidationBatches) -> float:
    """The loss of a text in bits per byte; of a part of it, the bytes are taken as its share of the tokens."""
    text_bytes = validation.num_bytes * total.weight / validation.num_tokens
    return total.loss / math.log(2) / text_bytes
