"""Tasks from JSON lines files: questions with choices, texts whose last word is asked for, preferences.

A row's columns say what it is, and all rows of a file are of one kind:

* `choices` with a `question`, `context` or `prompt` and an `answer` or `answerKey`. Choices are a list of texts, or `{"text": [...],
  "label": [...]}` as of ARC and CommonsenseQA; the answer is an index from 0, a label or letter, or the text of a choice. A question is put
  as `Question: ...` and `Answer:`, below its context if there is one; a context or a prompt stands as it is.
* `chosen` and `rejected`, in any form that training on preferences takes.
* `text`: the last word, as the last stretch without white space, follows from the rest (LAMBADA: Paperno et al. 2016, arXiv:1606.06031).

A row that cannot be read is an error, since a file with fewer rows would be another task.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anarcho_cli.evaluation.errors import EvaluationError

if TYPE_CHECKING:
    from anarcho_tokenize import Preference

_OPENERS: Mapping[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_LAST_WORD = re.compile(r"\s\S+\Z")
MULTIPLE_CHOICE, LAST_WORD, PREFERENCE = "multiple-choice", "last-word", "preference"


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with choices, one of which is right."""

    prompt: str
    """What stands before a choice."""
    asked: str
    """What a user would ask in a conversation."""
    choices: tuple[str, ...]
    """At least two texts, none of them empty."""
    answer: int
    """Index of the right one."""


@dataclass(frozen=True, kw_only=True)
class LastWord:
    """A text without its last word, and that with the white space before it."""

    context: str
    word: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """The rows of a file."""

    name: str
    kind: str
    shots: tuple[Any, ...]
    """Rows from the file's beginning that are shown with their answers."""
    items: tuple[Any, ...]
    """Those that are scored: Question, LastWord or Preference, by kind."""
    sha256: str
    """Of the rows that are shown and scored."""


class _RowError(ValueError):
    """What is wrong with a row, as the end of a sentence that begins with its place."""


def read_task(path: Path, *, shots: int = 0, limit: int | None = None) -> Task:
    """Read a file; the first `shots` rows are examples, `limit` bounds the rows that are scored.

    Raises FileNotFoundError, and EvaluationError with file and line for what cannot be read.
    """
    digest = hashlib.sha256()
    kind, items = None, []
    for number, line in islice(_lines(path), None if limit is None else shots + limit):
        try:
            row = _row(line)
            found = _kind(row)
            if found != (kind := kind or found):
                raise _RowError(f"is a row of the kind {found}; expected {kind}, as the rows before it")
            items.append(_read(row, kind))
        except _RowError as error:
            raise EvaluationError(f"{path}:{number} {error}") from error
        digest.update(hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest())
    if kind is None or len(items) <= shots:
        raise EvaluationError(
            f"{path} holds {len(items)} rows; expected more than the {shots} that are shown as examples"
        )
    if shots and kind == PREFERENCE:
        raise EvaluationError(f"{path} holds preferences, which are put without examples; leave --shots out for it")
    return Task(
        name=str(path), kind=kind, shots=tuple(items[:shots]), items=tuple(items[shots:]), sha256=digest.hexdigest()
    )


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; expected a file of JSON lines")
    number = 0
    try:
        with _OPENERS.get(path.suffix, Path.open)(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise EvaluationError(f"{path} cannot be unpacked beyond line {number}; expected a whole file") from error


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except ValueError as error:
        raise _RowError("is no JSON in UTF-8; expected one object a line") from error
    if not isinstance(row, dict):
        raise _RowError(f"holds {_shown(row)}; expected an object")
    return row


def _kind(row: Mapping[str, Any]) -> str:
    if row.get("choices") is not None:
        return MULTIPLE_CHOICE
    if row.get("chosen") is not None:
        return PREFERENCE
    if row.get("text") is not None:
        return LAST_WORD
    raise _RowError(
        f"has the keys {', '.join(row) or 'of none'}; expected 'choices', 'chosen' and 'rejected', or 'text'"
    )


def _read(row: Mapping[str, Any], kind: str) -> Any:
    if kind == MULTIPLE_CHOICE:
        return _question(row)
    return _preference(row) if kind == PREFERENCE else _last_word(row)


def _preference(row: Mapping[str, Any]) -> Preference:
    from anarcho_tokenize.rows import RowError, preference_of

    try:
        return preference_of(row)
    except RowError as error:
        raise _RowError(f"is no preference: {error}") from error


def _last_word(row: Mapping[str, Any]) -> LastWord:
    text = _text(row["text"], name="text").rstrip()
    found = _LAST_WORD.search(text)
    if found is None or not text[: found.start()].strip():
        raise _RowError("has a text of one word; expected a last word and what goes before it")
    return LastWord(context=text[: found.start()], word=found[0])


def _question(row: Mapping[str, Any]) -> Question:
    choices, labels = _choices(row["choices"])
    prompt, asked = _prompt(row)
    name = next((name for name in ("answer", "answerKey") if row.get(name) is not None), None)
    if name is None:
        raise _RowError("has no answer; expected 'answer' or 'answerKey'")
    return Question(prompt=prompt, asked=asked, choices=choices, answer=_answer(row[name], choices, labels, name=name))


def _prompt(row: Mapping[str, Any]) -> tuple[str, str]:
    """What stands before a choice, and what a user would ask."""
    context = next((_text(row[name], name=name) for name in ("context", "prompt") if row.get(name) is not None), None)
    question = None if row.get("question") is None else _text(row["question"], name="question")
    if question is None:
        if context is None:
            raise _RowError("has choices for nothing; expected 'question', 'context' or 'prompt'")
        return context, context
    before = f"{context}\n" if context else ""
    return f"{before}Question: {question}\nAnswer:", before + question


def _choices(value: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Texts and labels; without labels of their own, the letters A, B, C."""
    labels = None
    if isinstance(value, Mapping):
        value, labels = value.get("text"), value.get("label")
    if not isinstance(value, list) or len(value) < 2:
        raise _RowError(f"has the choices {_shown(value)}; expected a list of at least two texts")
    texts = tuple(_text(choice, name="choices") for choice in value)
    if not all(text.strip() for text in texts):
        raise _RowError("has an empty choice; expected texts")
    if labels is None:
        return texts, tuple(chr(ord("A") + number) for number in range(len(texts)))
    if not isinstance(labels, list) or len(labels) != len(texts):
        raise _RowError(f"has the labels {_shown(labels)}; expected one for each of {len(texts)} choices")
    return texts, tuple(map(str, labels))


def _answer(value: Any, choices: tuple[str, ...], labels: tuple[str, ...], *, name: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < len(choices):
            return value
    elif value in labels:
        return labels.index(value)
    elif choices.count(value) == 1:
        return choices.index(value)
    raise _RowError(
        f"has the {name} {_shown(value)}; expected an index from 0 to {len(choices) - 1}, one of {', '.join(labels)}, "
        "or the text of one choice"
    )


def _text(value: Any, *, name: str) -> str:
    if not isinstance(value, str):
        raise _RowError(f"has {name!r} {_shown(value)}; expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _RowError(f"has a lone surrogate in {name!r}; expected Unicode text") from error
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
