"""Guesses at the next tokens, so that a model checks several in the time that it takes to read one.

Notable: a draft only guesses. Every token is drawn from the model's own distribution, with the same random number as
without a draft, and what follows a wrong guess is thrown away; so the text is the same, sooner. This is speculative
sampling (Leviathan et al. 2023, arXiv:2211.17192) for guesses that are certain of themselves: there, a guess is kept
with the probability that the model gives it, and that is how often the model's own draw agrees with it. Looking guesses
up in the text itself is prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from anarcho_model.generate.sampling import SamplingError

__all__ = ["Draft", "PromptLookup"]


@runtime_checkable
class Draft(Protocol):
    """Whatever guesses how a text goes on."""

    def propose(self, tokens: Sequence[int], *, most: int) -> list[int]:
        """At most `most` tokens that may follow these; none where it has no idea."""
        ...


@dataclass(frozen=True, kw_only=True)
class PromptLookup:
    """Guesses that what followed the newest tokens at their last occurrence follows them again.

    Helps where a text repeats itself or its prompt: summaries, corrections, code, questions about a document.
    """

    guesses: int = 7
    """The most tokens to propose at once."""
    longest: int = 3
    """How many of the newest tokens are looked for first; then fewer, down to `shortest`."""
    shortest: int = 2
    """The fewest tokens that have to occur again."""

    def __post_init__(self) -> None:
        for name, least in (("guesses", 1), ("shortest", 1), ("longest", self.shortest)):
            if getattr(self, name) < least:
                raise SamplingError(f"PromptLookup.{name} is {getattr(self, name)}, expected at least {least}.")

    def propose(self, tokens: Sequence[int], *, most: int) -> list[int]:
        """The tokens after the latest earlier occurrence of the newest ones."""
        tokens, most = list(tokens), min(most, self.guesses)
        for width in range(min(self.longest, len(tokens) - 1), self.shortest - 1, -1):
            newest = tokens[-width:]
            for start in range(len(tokens) - width - 1, -1, -1):
                if tokens[start] == newest[0] and tokens[start : start + width] == newest:
                    return tokens[start + width : start + width + most]
        return []
