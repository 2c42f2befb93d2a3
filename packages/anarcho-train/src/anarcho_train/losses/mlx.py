"""Losses as functions of per-token log-probabilities, in MLX: sums over the batch, to be divided once by the whole step's weight."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from anarcho_train.step import Batch


def next_token_loss(logprobs: mx.array, weights: mx.array) -> mx.array:
    """Negative log-likelihood, summed: ``-sum(weights * logprobs)``.

    ``logprobs`` float32 (sequences, length), in nats; ``weights`` float32 of the same shape. Returns a float32 scalar.
    """
    return -(weights * logprobs).sum()


def answer_logprobs(logprobs: mx.array, weights: mx.array) -> mx.array:
    """Sums over each row, ``sum_t(weights * logprobs)``: (rows, length) twice to (rows,), float32, in nats."""
    return (weights * logprobs).sum(axis=-1)


class NextTokenLoss:
    """The loss of pre-training and fine-tuning as `anarcho_train.steps.mlx.MlxStep` takes it; its weight is that of the targets."""

    def weight(self, batch: Batch) -> float:
        """Sum of the weights of all targets."""
        return float(batch.weights.sum(dtype=np.float64))

    def arrays(self, batch: Batch) -> dict[str, np.ndarray]:
        """What the loss reads besides log-probabilities."""
        return {"weights": batch.weights}

    def __call__(self, logprobs: mx.array, arrays: Mapping[str, mx.array]) -> tuple[mx.array, dict[str, mx.array]]:
        """`next_token_loss`; there are no further measures."""
        return next_token_loss(logprobs, arrays["weights"]), {}
