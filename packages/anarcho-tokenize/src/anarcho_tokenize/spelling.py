"""Texts in which special tokens are spelled, as chat templates write them: there the spelling of a special token is that token.

This is how transformers reads any text. `Tokenizer.encode` and `ByteLevelTokenizer.encode` take the same spelling for plain text, as
untrusted text needs it; so only what a trusted template wrote is read here.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from anarcho_tokenize.piece_model import CONTROL, UNKNOWN_KIND, PieceModel


class Encodes(Protocol):
    """What is needed of a tokenizer of either kind."""

    @property
    def piece_model(self) -> PieceModel:
        """The vocabulary."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text, in which no special token is found."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for."""
        ...

    def normalize(self, text: str) -> str:
        """The text that the bytes of its tokens spell."""
        ...


class Stretch(NamedTuple):
    """The characters [start, stop) of a text: a special token, or what stands between two of them."""

    start: int
    stop: int
    token: int | None
    """The special token; None for plain text."""


class Spellings:
    """Finds special tokens in texts."""

    def __init__(self, pieces: PieceModel, *, added_tokens: Sequence[Mapping[str, Any]] | None = None) -> None:
        """`added_tokens` are those of a tokenizer.json, with the spaces that they take; without them, all control pieces count."""
        if added_tokens is None:
            special = (CONTROL, UNKNOWN_KIND)
            added_tokens = [
                {"id": number, "content": piece.text}
                for number, piece in enumerate(pieces.pieces)
                if piece.kind in special
            ]
        else:
            added_tokens = [token for token in added_tokens if token.get("special")]
        self._ids: dict[str, int] = {token["content"]: token["id"] for token in added_tokens if token["content"]}
        # The longest spelling wins where several begin at one place.
        tokens = sorted(added_tokens, key=lambda token: -len(token["content"]))
        found = "|".join(_pattern(token) for token in tokens if token["content"])
        self._pattern = re.compile(found or r"(?!)")
        self.plain = re.compile("|".join(map(re.escape, sorted(self._ids, key=len, reverse=True))) or r"(?!)")
        """Matches the spelling of any special token, without spaces around it."""

    def stretches(self, text: str) -> Iterator[Stretch]:
        """Cut a text at special tokens; no stretch is empty."""
        end = 0
        for match in self._pattern.finditer(text):
            if match.start() > end:
                yield Stretch(end, match.start(), None)
            yield Stretch(*match.span(), self._ids[match[0].strip() if match[0] not in self._ids else match[0]])
            end = match.end()
        if end < len(text):
            yield Stretch(end, len(text), None)


def encode_spelled(tokenizer: Encodes, spellings: Spellings, text: str) -> list[int]:
    """Ids of a text in which the spelling of a special token is that token."""
    ids: list[int] = []
    for part in spellings.stretches(text):
        ids += tokenizer.encode(text[part.start : part.stop]) if part.token is None else [part.token]
    return ids


def _pattern(token: Mapping[str, Any]) -> str:
    found = re.escape(token["content"])
    if token.get("single_word"):
        found = rf"(?<!\w){found}(?!\w)"
    before, behind = (r"\s*" if token.get(side) else "" for side in ("lstrip", "rstrip"))
    return f"{before}{found}{behind}"
