"""Finds the files of a source, and reads their rows: JSON lines, plain text and Parquet, each perhaps compressed.

Memory does not grow with a file or a row: lines, documents and parts have a bound, and what exceeds it is skipped unread. Each row comes
with the place at which the next one starts, so that reading goes on from there: by a seek in a file that is not compressed, by reading
up to there in one that is, by row groups in Parquet. Content that is not as expected is a `Fault` in the row's place, never an error.
"""

import glob
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Literal

from anarcho_tokenize.config import Kind
from anarcho_tokenize.corpus import EMBEDDED_BYTES, embedded_documents, embedded_rows
from anarcho_tokenize.errors import SourceError
from anarcho_tokenize.lines import Lines, read_lines, read_parts, read_separated, skip
from anarcho_tokenize.reading import Fault, Reading, Row
from anarcho_tokenize.tables import read_table, require_pyarrow
from anarcho_tokenize.unpacking import COMPRESSIONS, require_zstandard, unpack, unpacking_errors

EMBEDDED = "embedded"
Form = Literal[".txt", ".jsonl", ".parquet", "embedded", "rows"]
_FORMS: tuple[Form, ...] = (".txt", ".jsonl", ".parquet")
EXPECTED = ".txt, .jsonl (each perhaps with .gz, .xz, .bz2 or .zst) or .parquet"


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file, here or elsewhere."""

    name: str
    form: Form
    compression: str
    size: int | None
    """Bytes as stored, None where unknown."""
    open: Callable[[], BufferedIOBase]
    """Opens it for reading; what it gives can seek."""
    rows: Callable[[int], Iterator[Mapping[str, object]]] | None = None
    """For the form `rows`, which a library reads: its rows after so many."""


class UnpackedFile:
    """A compressed file that several readers go through, one behind the other."""

    lines: Lines

    def __init__(self, file: DataFile) -> None:
        self._file = file
        self._stream: BufferedIOBase | None = None

    def open(self) -> BufferedIOBase:
        """The file as it is stored; opens it if need be."""
        if self._stream is None:
            self._stream = self._file.open()
            self.lines = Lines(unpack(self._stream, self._file.compression, name=self._file.name))
        return self._stream

    def close(self) -> None:
        """Close it."""
        if self._stream is not None:
            self._stream.close()


class FileReader:
    """Iterates over the rows of a file, from a row and the byte at which it starts.

    With `stop_row`, for tables, up to the row of this number. With `stretch`, for JSON lines and the embedded corpus, those that start
    between two bytes; JSON lines are numbered from `row` on, and compressed ones come from `unpacked`, which goes from one stretch to
    the next.
    """

    def __init__(
        self,
        file: DataFile,
        reading: Reading,
        *,
        row: int = 0,
        offset: int = 0,
        stop_row: int | None = None,
        stretch: tuple[int, int | None] | None = None,
        unpacked: "UnpackedFile | None" = None,
    ) -> None:
        self._stop_row = stop_row
        self._stretch = stretch
        self._unpacked = unpacked
        self.num_lines = row
        """`row`, and at the end of a stretch its lines besides."""
        self._file = file
        self._reading = reading
        self._row = row
        self._offset = offset
        self._stream: BufferedIOBase | None = None
        self._stored_bytes = 0

    def __iter__(self) -> Iterator[Row]:
        name = self._file.name
        try:
            shared = self._unpacked
            with self._file.open() if shared is None else nullcontext(shared.open()) as self._stream:
                try:
                    yield from self._rows(self._stream)
                finally:
                    self._stored_bytes = self.stored_bytes
        except PermissionError:
            yield Row(Fault("cannot be read: permission denied; make it readable."), 0, None, name)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{name} is no longer there; expected it to stay until it has been read."
            ) from error
        except unpacking_errors() as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise SourceError(f"{name} cannot be read ({error}); see to the disk, and go on from here.") from error
            wanted = f"a whole, valid {self._file.compression or self._file.form} file"
            yield Row(Fault(f"cannot be read ({error}); expected {wanted}."), 0, None, name)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the file, as stored, that have been read."""
        if self._stream is None or self._stream.closed or self._file.form == EMBEDDED:
            return self._stored_bytes
        return self._stream.tell()

    def _rows(self, stream: BufferedIOBase) -> Iterator[Row]:
        file, separator = self._file, self._reading.document_separator
        if self._stretch is not None and file.form == ".jsonl":
            yield from self._stretch_rows(stream, *self._stretch)
            return
        if self._stop_row is not None and self._stop_row <= self._row:
            return
        if file.form == ".parquet":
            for row in read_table(stream, name=file.name, reading=self._reading, row=self._row):
                yield row
                if row.number == self._stop_row:
                    return
            return
        if file.rows is not None:
            for number, value in enumerate(file.rows(self._row), start=self._row + 1):
                yield Row(value, number, 0, f"{file.name}, row {number}")
            return
        if file.form == EMBEDDED:
            for row in _embedded_rows(self._row, *(self._stretch or (0, None))):
                self._stored_bytes = row.end or 0
                yield row
            return
        unpacked = unpack(stream, file.compression, name=file.name)
        if file.compression:
            skip(unpacked, self._offset)
        else:
            unpacked.seek(self._offset)
        start = {"name": file.name, "row": self._row, "offset": self._offset}
        limit = self._reading.max_document_bytes
        if file.form == ".jsonl":
            yield from read_lines(unpacked, limit=limit, **start)
        elif separator is None:
            yield from read_parts(unpacked, limit=limit, **start)
        else:
            yield from read_separated(unpacked, limit=limit, separator=separator.encode(), **start)

    def _stretch_rows(self, stream: BufferedIOBase, start: int, stop: int | None) -> Iterator[Row]:
        lines = Lines(stream) if self._unpacked is None else self._unpacked.lines
        lines.go_on(max(start, self._offset), stop=stop, can_seek=self._unpacked is None)
        limit, offset = self._reading.max_document_bytes, lines.offset
        yield from read_lines(lines, name=self._file.name, row=self._row, offset=offset, limit=limit)
        self.num_lines += lines.count


def find_files(spec: str | os.PathLike[str]) -> list[Path]:
    """The files that a path, directory or glob names, sorted. Raises FileNotFoundError or SourceError where there are none."""
    if not os.fspath(spec):
        raise SourceError("data.source is empty; expected 'embedded', a file, a directory or a glob.")
    path = Path(spec)
    if path.is_file():
        form_of(path.name, name=str(path))
        return [path]
    if path.is_dir():
        if files := sorted(file for file in path.rglob("*") if _is_visible(file, under=path) and file.is_file()):
            return files
        raise SourceError(f"The directory {path} holds no text file; expected {EXPECTED}.")
    matches = sorted(Path(match) for match in glob.glob(os.fspath(spec), recursive=True))  # noqa: PTH207 - Path.glob refuses absolute patterns
    files = [match for match in matches if match.is_file()]
    if not files:
        raise FileNotFoundError(
            f"{path} does not exist; expected 'embedded', a file, a directory or a glob that matches files."
        )
    for file in files:
        form_of(file.name, name=str(file))
    return files


def local_files(spec: str | os.PathLike[str]) -> list[DataFile]:
    """The same files, ready to be opened."""
    return [_local(path) for path in find_files(spec)]


def embedded_file(kind: Kind) -> DataFile:
    """The embedded corpus, conversations or preferences, as if they were a file."""
    if kind == "text":
        return DataFile(EMBEDDED, EMBEDDED, "", EMBEDDED_BYTES, BytesIO)
    rows = embedded_rows(kind)
    return DataFile(f"{EMBEDDED}-{kind}", ".jsonl", ".xz", len(rows), lambda: BytesIO(rows))


def form_of(file_name: str, *, name: str) -> tuple[Form, str]:
    """Form and compression of a file, by its endings. Raises SourceError, which calls it `name`, for others."""
    suffixes = [suffix.lower() for suffix in Path(file_name).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    for form in _FORMS:
        if suffixes[-1:] == [form] and not (compression and form == ".parquet"):
            return form, compression
    raise SourceError(f"{name} has an unknown kind; expected a name that ends in {EXPECTED}.")


def require_modules(file: DataFile) -> None:
    """Raises SourceError that names the extra to install where a file needs a module that is missing."""
    if file.compression == ".zst":
        require_zstandard(file.name)
    if file.form == ".parquet":
        require_pyarrow(file.name)


def _local(path: Path) -> DataFile:
    form, compression = form_of(path.name, name=str(path))
    return DataFile(str(path), form, compression, path.stat().st_size, lambda: path.open("rb"))


def _is_visible(file: Path, *, under: Path) -> bool:
    """Whether a directory's entry is of a kind that is read, and not hidden or within something hidden."""
    if any(part.startswith(".") for part in file.relative_to(under).parts):
        return False
    try:
        form_of(file.name, name=file.name)
    except SourceError:
        return False
    return True


def _embedded_rows(row: int, first: int, stop: int | None) -> Iterator[Row]:
    """The documents after the first `row` that start at byte `first` or later, and before `stop`."""
    end = 0
    for number, document in enumerate(embedded_documents(), start=1):
        start, end = end, end + len(document.encode())
        if stop is not None and start >= stop:
            return
        if number > row and start >= first:
            yield Row(document, number, end, f"{EMBEDDED}, document {number}")
