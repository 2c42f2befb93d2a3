"""How choices are written in the two kinds of answers, whole and in parts, with their log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anarcho_cli.serving.answers import Piece

if TYPE_CHECKING:
    from anarcho_tokenize.loading import AnyTokenizer

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks."""

Logprobs = Callable[["AnyTokenizer", Sequence[Piece]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Form:
    """One of the two kinds of answers."""

    prefix: str
    kind: str
    chunk_kind: str
    whole: Callable[[str], dict[str, Any]]
    """A choice's text as its fields."""
    partial: Callable[[str], dict[str, Any]]
    """A part of a choice's text as its fields."""
    opening: dict[str, Any] | None
    """Fields of the first part of each choice, before any text."""
    logprobs_of: Logprobs

    def choice(self, pieces: Sequence[Piece], *, index: int, tokenizer: AnyTokenizer, logprobs: bool) -> dict[str, Any]:
        """A whole choice."""
        text = "".join(piece.text for piece in pieces)
        return {
            "index": index,
            **self.whole(text),
            "logprobs": self.logprobs_of(tokenizer, pieces) if logprobs else None,
            "finish_reason": pieces[-1].finish,
        }

    def part(self, piece: Piece, *, tokenizer: AnyTokenizer, logprobs: bool) -> dict[str, Any]:
        """A part of a choice."""
        return {
            "index": piece.choice,
            **self.partial(piece.text),
            "logprobs": self.logprobs_of(tokenizer, [piece]) if logprobs else None,
            "finish_reason": piece.finish,
        }


def _spelled(tokenizer: AnyTokenizer, token: int) -> bytes:
    return tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""


def _entry(tokenizer: AnyTokenizer, token: int, logprob: float) -> dict[str, Any]:
    raw = _spelled(tokenizer, token)
    return {"token": raw.decode("utf-8", errors="replace"), "logprob": _finite(logprob), "bytes": list(raw)}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB


def _chat_logprobs(tokenizer: AnyTokenizer, pieces: Sequence[Piece]) -> dict[str, Any]:
    content = []
    for new in (piece.new for piece in pieces if piece.new is not None):
        top = [_entry(tokenizer, token, logprob) for token, logprob in new.top]
        content.append({**_entry(tokenizer, new.token, new.logprob), "top_logprobs": top})
    return {"content": content}


def _text_logprobs(tokenizer: AnyTokenizer, pieces: Sequence[Piece]) -> dict[str, Any]:
    new = [piece.new for piece in pieces if piece.new is not None]
    tokens = [_spelled(tokenizer, item.token).decode("utf-8", errors="replace") for item in new]
    top = [
        {_spelled(tokenizer, token).decode("utf-8", errors="replace"): _finite(logprob) for token, logprob in item.top}
        for item in new
    ]
    return {"tokens": tokens, "token_logprobs": [_finite(item.logprob) for item in new], "top_logprobs": top}


CHAT = Form(
    prefix="chatcmpl",
    kind="chat.completion",
    chunk_kind="chat.completion.chunk",
    whole=lambda text: {"message": {"role": "assistant", "content": text}},
    partial=lambda text: {"delta": {"content": text} if text else {}},
    opening={"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None},
    logprobs_of=_chat_logprobs,
)
TEXT = Form(
    prefix="cmpl",
    kind="text_completion",
    chunk_kind="text_completion",
    whole=lambda text: {"text": text},
    partial=lambda text: {"text": text},
    opening=None,
    logprobs_of=_text_logprobs,
)
