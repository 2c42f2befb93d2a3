"""What a model reads: documents, a text with its continuation, or a conversation with an answer, as requests.

* A document or a text begins after the end-of-text token, as in training. The end-of-text that would end it is not predicted.
* A continuation is encoded together with the text before it, since a token may reach over their border; all tokens from the first one
  that the text alone would not have count as the continuation's.
* A conversation is written with the chat template; an answer's tokens are its text's and the one behind it that ends the message. Where an
  answer is several messages, those of the user are read and not predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from anarcho_cli.evaluation.errors import EvaluationError
from anarcho_cli.evaluation.scoring import Request

if TYPE_CHECKING:
    from anarcho_tokenize import AnyTokenizer, Message


def encode_document(tokenizer: AnyTokenizer, text: str) -> Request:
    """All tokens of a text are predicted."""
    ids = tokenizer.encode_array(text)
    return Request(tokens=np.concatenate([np.array([tokenizer.eot_id], dtype=np.int32), ids]), first_target=1)


def encode_continuation(tokenizer: AnyTokenizer, context: str, continuation: str) -> Request:
    """The continuation's tokens are predicted; white space at the end of the context counts as the continuation's.

    Raises EvaluationError where it has no tokens.
    """
    trimmed = context.rstrip()
    whole = tokenizer.encode(context + continuation)
    before = tokenizer.encode(trimmed)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False)))
    if shared == len(whole):
        raise EvaluationError(f"{continuation!r} adds no token to the text before it; expected some text to predict")
    return Request(tokens=np.array([tokenizer.eot_id, *whole], dtype=np.int32), first_target=1 + shared)


def encode_answer(tokenizer: AnyTokenizer, prompt: Sequence[Message], answer: Sequence[Message]) -> Request:
    """The tokens of an answer that training would count are predicted, which are those of the assistant's messages in it."""
    from anarcho_tokenize import encode_answer as encode_said

    ids, counted = encode_said(tokenizer, prompt, answer)
    places = np.flatnonzero(counted)
    first, stop = int(places[0]), int(places[-1]) + 1
    return Request(tokens=ids[:stop], first_target=first, mask=counted[first:stop].astype(np.bool_))
