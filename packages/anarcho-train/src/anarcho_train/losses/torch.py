"""Losses as functions of per-token log-probabilities: sums over the batch, to be divided once by the whole step's weight."""

from __future__ import annotations

from torch import Tensor


def next_token_loss(logprobs: Tensor, weights: Tensor) -> Tensor:
    """Negative log-likelihood, summed: ``-sum(weights * logprobs)``.

    ``logprobs`` float32 (sequences, length), in nats; ``weights`` float32 of the same shape. Returns a float32 scalar.
    """
    return -(weights * logprobs).sum()
