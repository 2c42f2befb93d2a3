"""Which rows are taken: checks that put a broken row into quarantine, and the filters of a source that leave rows out."""

import math
from collections.abc import Mapping
from typing import Literal

from anarcho_tokenize.config import SourceConfig
from anarcho_tokenize.reading import Fault, excerpt_of, nul_fault
from anarcho_tokenize.rows import Content, texts_of

Reason = Literal["min_score", "language", "min_chars", "max_chars", "duplicate"]
EMPTY = Fault("holds no text; expected at least one character.")


def check_texts(content: Content, *, limit: int) -> int | Fault:
    """UTF-8 bytes of the texts in a row, or what is wrong with them."""
    num_bytes = 0
    for text in texts_of(content):
        try:
            num_bytes += len(text.encode())
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            reason = f"holds the lone surrogate U+{code:04X}, which UTF-8 cannot represent; repair the row."
            return Fault(reason, excerpt_of(text))
        if "\0" in text:
            return nul_fault(text)
    if not num_bytes:
        return EMPTY
    if num_bytes > limit:
        reason = f"holds {num_bytes:,} bytes of text; expected at most data.max_document_bytes, {limit:,}."
        return Fault(reason, excerpt_of(next(texts_of(content))))
    return num_bytes


def filter_row(source: SourceConfig, row: str | Mapping[str, object], content: Content) -> Reason | Fault | None:
    """Why a row is left out; None for one that is taken, a Fault where it lacks what the filter looks at."""
    if source.min_score is not None:
        score = None if isinstance(row, str) else row.get(source.score_field)
        if isinstance(score, bool) or not isinstance(score, int | float) or math.isnan(score):
            return _fault(source.score_field, score, expected="a number, which data.min_score is compared with")
        if score < source.min_score:
            return "min_score"
    if source.languages:
        language = None if isinstance(row, str) else row.get(source.language_field)
        if not isinstance(language, str):
            return _fault(source.language_field, language, expected="a language, for data.languages")
        if language not in source.languages:
            return "language"
    if source.min_chars > 1 or source.max_chars is not None:
        length = sum(map(len, texts_of(content)))
        if length < source.min_chars:
            return "min_chars"
        if source.max_chars is not None and length > source.max_chars:
            return "max_chars"
    return None


def _fault(field: str, value: object, *, expected: str) -> Fault:
    return Fault(f"has {excerpt_of(repr(value))} as {field!r}; expected {expected}.")
