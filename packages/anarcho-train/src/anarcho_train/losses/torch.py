"""Losses as functions of per-token log-probabilities: sums over the batch, to be divided once by the whole step's weight."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from anarcho_train.step import Batch


def next_token_loss(logprobs: Tensor, weights: Tensor) -> Tensor:
    """Negative log-likelihood, summed: ``-sum(weights * logprobs)``.

    ``logprobs`` float32 (sequences, length), in nats; ``weights`` float32 of the same shape. Returns a float32 scalar.
    """
    return -(weights * logprobs).sum()


def answer_logprobs(logprobs: Tensor, weights: Tensor) -> Tensor:
    """Sums over each row, ``sum_t(weights * logprobs)``: (rows, length) twice to (rows,), float32, in nats."""
    return (weights * logprobs).sum(dim=-1)


class NextTokenLoss:
    """The loss of pre-training and fine-tuning as `anarcho_train.steps.torch.TorchStep` takes it; its weight is that of the targets."""

    def weight(self, batch: Batch) -> float:
        """Sum of the weights of all targets."""
        return float(batch.weights.sum(dtype=np.float64))

    def arrays(self, batch: Batch) -> dict[str, np.ndarray]:
        """What the loss reads besides log-probabilities."""
        return {"weights": batch.weights}

    def __call__(self, logprobs: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """`next_token_loss`; there are no further measures."""
        return next_token_loss(logprobs, tensors["weights"]), {}
