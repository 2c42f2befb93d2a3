"""What readers of rows give: a row, or a fault in its place, and where reading goes on after it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from anarcho_tokenize.judging import Judged

EXCERPT_CHARACTERS = 200


class Fault(NamedTuple):
    """Why there is no row here: a sentence that goes on after the name of the place, and the beginning of what was found."""

    reason: str
    excerpt: str = ""


class Row(NamedTuple):
    """What was read, and where reading goes on after it."""

    value: "str | Mapping[str, object] | Fault | Judged"
    number: int
    """Lines, documents or rows of the file up to this one."""
    end: int | None
    """Byte of the unpacked file at which the next row starts; None where nothing more of the file can be read."""
    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What of a file is read, and how."""

    document_separator: str | None
    max_document_bytes: int
    text_columns: tuple[str, ...] | None
    """Columns of a table, one of which holds the text; None for conversations and preferences, which come in many columns."""
    other_columns: tuple[str, ...]
    """Columns that filters look at."""


def excerpt_of(data: bytes | str) -> str:
    """The beginning of what was found, for people."""
    text = data if isinstance(data, str) else data[: 4 * EXCERPT_CHARACTERS].decode("utf-8", errors="replace")
    return text[:EXCERPT_CHARACTERS].encode(errors="replace").decode()


def nul_fault(text: str) -> Fault:
    """For binary data that happens to be UTF-8."""
    reason = f"holds a NUL character at character {text.index(chr(0))}, as binary data does; expected text."
    return Fault(reason, excerpt_of(text))
