"""How the next token is drawn; free of any framework, so that a command line can read it fast.

The filters apply in the order temperature, top-k, top-p, min-p, each on the distribution that the ones before have
left, which is the order of Transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["SMALLEST", "SamplingConfig", "SamplingError"]

SMALLEST = 2.0**-126
"""The smallest number that float32, in which tokens are drawn, holds in full; smaller ones may be 0 there."""


class SamplingError(ValueError):
    """Sampling settings, or a prompt, that cannot be used; the message names the key or the token."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How text is drawn from a model."""

    max_new_tokens: int = 256
    """The most tokens to generate; the model's context may end the text earlier."""
    temperature: float = 1.0
    """Logits are divided by this; 0, or less than float32 holds, takes the likeliest token and ignores the filters."""
    top_k: int | None = None
    """Keep the k likeliest tokens (and those tied with the k-th); None keeps all."""
    top_p: float | None = None
    """Keep the likeliest tokens until their probabilities reach this sum, at least one; None keeps all."""
    min_p: float | None = None
    """Keep the tokens with at least this share of the likeliest token's probability; None keeps all."""
    seed: int | None = None
    """Seed of the draws; None takes a fresh one from the operating system."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the text; the id itself is not part of it."""

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < SMALLEST

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        whole = isinstance(self.max_new_tokens, int) and not isinstance(self.max_new_tokens, bool)
        _require(
            whole and self.max_new_tokens >= 0, "max_new_tokens", self.max_new_tokens, "a whole number of at least 0"
        )
        _require(0 <= self.temperature < math.inf, "temperature", self.temperature, "a finite number of at least 0")
        if self.top_k is not None:
            _require(
                isinstance(self.top_k, int) and self.top_k >= 1, "top_k", self.top_k, "a whole number of at least 1"
            )
        if self.top_p is not None:
            _require(0 < self.top_p <= 1, "top_p", self.top_p, "a number above 0 and at most 1")
        if self.min_p is not None:
            _require(0 <= self.min_p <= 1, "min_p", self.min_p, "a number from 0 to 1")
        if self.seed is not None:
            _require(0 <= self.seed < 2**63, "seed", self.seed, "a whole number from 0 to 2**63 - 1")
        _require(
            all(isinstance(token, int) and token >= 0 for token in self.stop_token_ids),
            "stop_token_ids",
            self.stop_token_ids,
            "token ids of at least 0",
        )


def _require(satisfied: bool, key: str, value: object, expected: str) -> None:
    if not satisfied:
        raise SamplingError(f"sample.{key} is {value!r}, expected {expected}.")
