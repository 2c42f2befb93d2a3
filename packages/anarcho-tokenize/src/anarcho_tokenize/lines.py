"""Rows of streams of bytes: a JSON object a line, documents between separators, or parts of one long text.

Each function yields `Row`s from the byte `offset` on, at which the stream stands, and numbers them after `row`. No row larger than
`limit` bytes is held: it is skipped to its end, and reported. A byte order mark at the start of a file is not text.
"""

import json
from collections.abc import Iterator
from io import BufferedIOBase

from anarcho_tokenize.reading import Fault, Row, excerpt_of, nul_fault

PART_BYTES = 2**24
_CHUNK_BYTES = 2**18
_JSON_TYPES = {
    list: "a list",
    str: "a text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


class Lines:
    """The lines of a stream, stretch by stretch."""

    def __init__(self, stream: BufferedIOBase) -> None:
        """The stream stands at its start."""
        self.offset = 0
        """Byte at which it stands."""
        self.count = 0
        """Lines of the stretch begun so far."""
        self._stream = stream
        self._stop: int | None = None
        self._is_between = True

    def go_on(self, start: int, *, stop: int | None, can_seek: bool) -> None:
        """To the first line that starts at byte `start` or later; the last one is the last that starts before `stop`."""
        if start > self.offset:  # also from the end of the last stretch, which is where a line starts
            before = start - 1
            if can_seek:
                self._stream.seek(before)
            else:
                skip(self._stream, before - self.offset)
            self.offset = before + _skip_line(self._stream)
        self.count, self._stop, self._is_between = 0, stop, True

    def readline(self, limit: int) -> bytes:
        """As of a stream: at most so many bytes of a line; nothing at the end."""
        if self._is_between and self._stop is not None and self.offset >= self._stop:
            return b""
        data = self._stream.readline(limit)
        self.count += self._is_between and bool(data)
        self._is_between = data.endswith(b"\n")
        self.offset += len(data)
        return data


def skip(stream: BufferedIOBase, count: int) -> None:
    """Read on to a place in a stream that cannot seek."""
    while count > 0 and (data := stream.read(min(count, 2**20))):
        count -= len(data)


def read_lines(stream: BufferedIOBase | Lines, *, name: str, row: int, offset: int, limit: int) -> Iterator[Row]:
    """JSON objects, one a line; lines without any text are no rows."""
    while line := stream.readline(limit + 1):
        row += 1
        start, offset = offset, offset + len(line)
        if len(line) > limit and not line.endswith(b"\n"):
            offset += _skip_line(stream)
            yield Row(_too_large("line", offset - start, line, limit=limit), row, offset, f"{name}:{row}")
        elif (value := _parse(line, start=start)) is not None:
            yield Row(value, row, offset, f"{name}:{row}")


def read_parts(stream: BufferedIOBase, *, name: str, row: int, offset: int, limit: int) -> Iterator[Row]:
    """One document; of a text longer than 16 MiB (or the limit) several, cut at the ends of lines where there are any."""
    size = min(PART_BYTES, limit)
    pending = bytearray()
    is_first = offset == 0
    while True:
        while len(pending) <= size and (chunk := stream.read1(_CHUNK_BYTES)):
            pending += chunk
        if not pending and not (is_first and row == 0):
            return
        is_last = len(pending) <= size
        cut = len(pending) if is_last else _cut(pending, size)
        place = name if is_first and is_last else f"{name}, part {row + 1}"
        value = _decode(bytes(pending[:cut]), start=offset)
        del pending[:cut]
        row, offset = row + 1, offset + cut
        yield Row(value, row, offset, place)
        if is_last:
            return
        is_first = False


def read_separated(
    stream: BufferedIOBase, *, name: str, row: int, offset: int, limit: int, separator: bytes
) -> Iterator[Row]:
    """Documents between separators, which are found as bytes, as UTF-8 allows; empty ones are no rows."""
    for data, length, is_whole in _split(stream, separator, limit=limit):
        start, offset = offset, offset + length + len(separator)
        if length:
            row += 1
            value = _decode(data, start=start) if is_whole else _too_large("document", length, data, limit=limit)
            if value:
                yield Row(value, row, offset, f"{name}, document {row}")


def _split(stream: BufferedIOBase, separator: bytes, *, limit: int) -> Iterator[tuple[bytes, int, bool]]:
    """What is between separators: the bytes (of what is larger than the limit only the beginning), their number, whether they are all."""
    pending, head, dropped = bytearray(), b"", 0
    while chunk := stream.read1(_CHUNK_BYTES):
        searched = max(0, len(pending) - len(separator) + 1)
        pending += chunk
        taken = 0
        while (found := pending.find(separator, max(searched, taken))) >= 0:
            length = dropped + found - taken
            is_whole = length <= limit
            yield bytes(pending[taken:found]) if is_whole else head or bytes(pending[taken:found]), length, is_whole
            head, dropped, taken = b"", 0, found + len(separator)
        del pending[:taken]
        surplus = len(pending) - len(separator) + 1  # what may be the beginning of a separator stays
        if dropped + surplus > limit:
            head = head or bytes(pending[:_CHUNK_BYTES])
            dropped += surplus
            del pending[:surplus]
    length = dropped + len(pending)
    yield (bytes(pending) if not dropped else head), length, length <= limit


def _skip_line(stream: BufferedIOBase | Lines) -> int:
    """Read on to the end of a line; the number of bytes."""
    count = 0
    while rest := stream.readline(_CHUNK_BYTES):
        count += len(rest)
        if rest.endswith(b"\n"):
            break
    return count


def _parse(line: bytes, *, start: int) -> dict[str, object] | Fault | None:
    text = _decode(line.rstrip(b"\r\n"), start=start)
    if isinstance(text, Fault):
        return text
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not text or text.isspace():
            return None
        return nul_fault(text) if "\0" in text else Fault(_json_problem(error), excerpt_of(text))
    if not isinstance(row, dict):
        return Fault(f"holds {_JSON_TYPES[type(row)]}; expected an object with keys.", excerpt_of(text))
    return row


def _json_problem(error: Exception) -> str:
    problem = str(error)
    if isinstance(error, json.JSONDecodeError):  # whose own text would count lines from here
        problem = f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
    return f"is not JSON ({problem}); expected one object a line."


def _decode(data: bytes, *, start: int) -> str | Fault:
    """Text of `data`, which starts at a byte of the (unpacked) file."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = (
            f"is not UTF-8: byte 0x{data[error.start]:02X} at offset {start + error.start}; convert the file to UTF-8."
        )
        return Fault(reason, excerpt_of(data[max(0, error.start - 100) :]))
    return text.removeprefix("\ufeff") if start == 0 else text


def _too_large(what: str, size: int, head: bytes, *, limit: int) -> Fault:
    return Fault(
        f"is a {what} of {size:,} bytes; expected at most data.max_document_bytes, {limit:,}.", excerpt_of(head)
    )


def _cut(data: bytearray, size: int) -> int:
    """Where a part of at most `size` bytes ends: behind a line, or else between two characters."""
    line_end = data.rfind(b"\n", 0, size) + 1
    if line_end:
        return line_end
    cut = size
    while cut > max(1, size - 3) and data[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut
