"""The likelihood of tokens in PyTorch; see `anarcho_train.losses.likelihood`."""

from __future__ import annotations

from anarcho_train.losses.likelihood import NextTokenLoss, answer_logprobs, next_token_loss

__all__ = ["NextTokenLoss", "answer_logprobs", "next_token_loss"]
