"""One source of a mixture, read file after file, from a place that is a few integers."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from anarcho_tokenize.config import Kind, SourceConfig
from anarcho_tokenize.errors import SourceError
from anarcho_tokenize.files import EMBEDDED, DataFile, FileReader, embedded_file, local_files
from anarcho_tokenize.reading import Reading, Row


@dataclass(frozen=True, slots=True)
class Catalog:
    """The files of a source, as they are now."""

    files: list[DataFile]
    revision: str | None = None
    """The commit that they are of, where they are kept in versions."""
    text_field: str | None = None
    """The text's column, where the source names it."""

    @property
    def size(self) -> int | None:
        """Bytes of all files as stored; None where unknown."""
        sizes = [file.size for file in self.files if file.size is not None]
        return sum(sizes) if len(sizes) == len(self.files) else None

    def identity(self) -> dict[str, Any]:
        """Names the files by their names, below their common folder, and sizes."""
        root = os.path.commonpath([Path(file.name).parent for file in self.files]) if self.files else ""
        listed = [(str(Path(file.name).relative_to(root)), file.size) for file in self.files]
        digest = hashlib.sha256(repr(listed).encode()).hexdigest()
        size = sum(size or 0 for _, size in listed)
        return {"files": len(listed), "bytes": size, "sha256": digest, "revision": self.revision}


def local_catalog(spec: str, *, kind: Kind) -> Catalog:
    """The files that a source names on this machine. Raises FileNotFoundError or SourceError."""
    return Catalog([embedded_file(kind)] if spec == EMBEDDED else local_files(spec))


class Rows(Protocol):
    """The rows of a file from a place on."""

    def __iter__(self) -> Iterator[Row]:
        """The rows."""
        ...

    @property
    def stored_bytes(self) -> int:
        """Bytes of the file, as stored, that have been read."""
        ...


@dataclass(slots=True)
class Place:
    """Where a source is read: all that changes."""

    passes: int = 0
    """Times that the source has been read to its end."""
    file: int = 0
    row: int = 0
    offset: int = 0
    stored_bytes: int = 0
    """Bytes of the files before this one, as stored, in all passes."""
    taken_bytes: int = 0
    """Bytes of the examples taken, in all passes."""
    taken_before: int = 0
    """The same when this pass began."""
    is_done: bool = False
    """Whether a whole pass has taken nothing, so that another would not, either."""


@dataclass(slots=True)
class Feed:
    """Reads the rows of one source."""

    source: SourceConfig
    number: int
    kind: Kind
    max_document_bytes: int
    find: Callable[[str | None], Catalog]
    """Finds the files, of the given revision where they are kept in versions."""
    place: Place = field(default_factory=Place)
    identity: dict[str, Any] | None = None
    """Of the files that the place was in; None before they have been found."""
    recorded: Callable[[int, Place], Rows] | None = None
    """Reads what was recorded of the file of a number, in place of the file."""
    is_open: bool = False
    _files: list[DataFile] = field(default_factory=list)
    _size: int | None = None
    _text_field: str | None = None
    _reader: Rows | None = None
    _rows: Iterator[Row] | None = None

    def open(self) -> None:
        """Find the files. Raises SourceError where they are not the ones that the place was in."""
        known = self.identity
        catalog = self.find(None if known is None else known.get("revision"))
        identity = catalog.identity()
        if known is not None and known != identity:
            raise _changed(self.source.source, known, identity)
        self.identity, self._files, self._size = identity, catalog.files, catalog.size
        self._text_field = catalog.text_field or self.source.text_field
        self.is_open = True

    @property
    def files(self) -> list[DataFile]:
        """Its files, in order, once it is open."""
        return self._files

    @property
    def text_field(self) -> str | None:
        """The text's key or column; None for the usual ones."""
        return self._text_field

    def read(self) -> Row | None:
        """The next row; None at the end of a pass, after which the source begins again."""
        if not self.is_open:
            self.open()
        self._rows = self._rows or self._read()
        row = None
        try:
            row = next(self._rows, None)
        finally:
            if row is None:  # at the end of the pass, and after an error
                self._rows = self._reader = None
        return row

    def end_pass(self) -> None:
        """Note that the source has been read to its end; it is at its start again, unless nothing of it was taken."""
        place = self.place
        place.passes += 1
        if place.taken_bytes == place.taken_before:
            place.is_done = True
        else:
            place.taken_before = place.taken_bytes
            place.file = place.row = place.offset = 0

    def progress(self) -> tuple[int, int | None]:
        """Bytes read, as stored, and in the first pass in all; None where unknown."""
        if self._size is not None and self.place.passes:
            return self._size, self._size
        return self.place.stored_bytes + (0 if self._reader is None else self._reader.stored_bytes), self._size

    def _read(self) -> Iterator[Row]:
        place, reading = self.place, self.reading()
        while place.file < len(self._files):
            self._reader = (
                self.recorded(place.file, place)
                if self.recorded is not None
                else FileReader(self._files[place.file], reading, row=place.row, offset=place.offset)
            )
            rows = iter(self._reader)
            for row in rows:
                if row.end is None:
                    break
                place.row, place.offset = row.number, row.end
                yield row
            else:
                row = None
            size = self._files[place.file].size
            place.stored_bytes += self._reader.stored_bytes if size is None else size
            self._reader = None
            place.file, place.row, place.offset = place.file + 1, 0, 0
            if row is not None:
                yield row

    def reading(self) -> Reading:
        """What of its files is read."""
        source = self.source
        texts = ("text", "content") if self._text_field is None else (self._text_field,)
        scores = (source.score_field,) if source.min_score is not None else ()
        return Reading(
            document_separator=source.document_separator,
            max_document_bytes=self.max_document_bytes,
            text_columns=texts if self.kind == "text" else None,
            other_columns=(*scores, *((source.language_field,) if source.languages else ())),
        )


def _changed(source: str, known: dict[str, Any], found: dict[str, Any]) -> SourceError:
    had, has = (
        f"{identity['files']} {'file' if identity['files'] == 1 else 'files'} of {identity['bytes']:,} bytes"
        for identity in (known, found)
    )
    now = "as many of other names or sizes" if had == has else has
    return SourceError(
        f"{source} has changed since its reading began: it had {had}, now {now}; bring the former files back, or begin anew."
    )
