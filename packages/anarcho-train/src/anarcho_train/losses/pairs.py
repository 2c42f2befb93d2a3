"""What a loss of preferences reads of a batch, before any framework.

Rows 2i and 2i + 1 of a batch are the chosen and the rejected answer. A pair whose rows have no weight is padding and counts nothing.
"""

from __future__ import annotations

import numpy as np

from anarcho_train.config import PreferenceConfig
from anarcho_train.step import Batch


def num_pairs(batch: Batch) -> float:
    """Pairs of which both answers count; raises ValueError where a row has no partner."""
    if len(batch.weights) % 2:
        raise ValueError(
            f"the batch has {len(batch.weights)} rows; expected pairs of a chosen and a rejected answer: prepare the data as preferences"
        )
    answered = (batch.weights != 0).any(axis=1)
    return float(np.count_nonzero(answered[0::2] & answered[1::2]))


def pair_arrays(batch: Batch, config: PreferenceConfig) -> dict[str, np.ndarray]:
    """``weights``, and ``reference`` where the loss needs it; raises ValueError where it is missing."""
    arrays = {"weights": batch.weights}
    if config.needs_reference:
        reference = getattr(batch, "reference", None)
        if reference is None or reference.shape != batch.weights.shape[:1]:
            raise ValueError(
                f"preference.loss is {config.loss}, but the batch has "
                f"{'no reference' if reference is None else f'a reference of shape {reference.shape}'}; expected the reference's "
                f"log-probabilities of {len(batch.weights)} rows, so compute them first"
            )
        arrays["reference"] = reference
    return arrays
