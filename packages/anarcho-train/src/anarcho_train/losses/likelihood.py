"""The likelihood of tokens, whatever the framework: sums over the batch, to be divided once by the whole step's weight.

Notable: nothing is needed but arithmetic and ``sum``, which tensors of PyTorch and arrays of MLX spell alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from anarcho_train.step import Batch

__all__ = ["NextTokenLoss", "answer_logprobs", "next_token_loss"]

Array = Any
"""A tensor of PyTorch or an array of MLX."""


def next_token_loss(logprobs: Array, weights: Array) -> Array:
    """Negative log-likelihood, summed: ``-sum(weights * logprobs)``.

    ``logprobs`` float32 (sequences, length), in nats; ``weights`` float32 of the same shape. Returns a float32 scalar.
    """
    return -(weights * logprobs).sum()


def answer_logprobs(logprobs: Array, weights: Array) -> Array:
    """Sums over each row, ``sum_t(weights * logprobs)``: (rows, length) twice to (rows,), float32, in nats."""
    return (weights * logprobs).sum(-1)


class NextTokenLoss:
    """The loss of pre-training and fine-tuning as the steps of either framework take it; its weight is that of the targets."""

    def weight(self, batch: Batch) -> float:
        """Sum of the weights of all targets."""
        return float(batch.weights.sum(dtype=np.float64))

    def arrays(self, batch: Batch) -> dict[str, np.ndarray]:
        """What the loss reads besides log-probabilities."""
        return {"weights": batch.weights}

    def __call__(self, logprobs: Array, arrays: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        """`next_token_loss`; there are no further measures."""
        return next_token_loss(logprobs, arrays["weights"]), {}
