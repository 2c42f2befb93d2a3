"""Documents from files: plain text, JSON lines and Parquet, each perhaps compressed.

Files of a directory or glob are read in the order of their sorted paths, so that a source gives the same documents each time. Nothing is
skipped in silence but what holds no text: a line that is not JSON, a text that is not UTF-8 or a missing column is an error that names
the place. Parquet needs pyarrow (`anarcho-tokenize[parquet]`); .zst needs Python 3.14 or zstandard (`anarcho-tokenize[zstd]`).
"""

import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from anarcho_tokenize.corpus import embedded_documents
from anarcho_tokenize.errors import SourceError
from anarcho_tokenize.unpacking import COMPRESSIONS, open_unpacked, unpacking_errors

EMBEDDED = "embedded"
_FORMATS = (".txt", ".jsonl", ".parquet")
_EXPECTED = ".txt, .jsonl (each perhaps with .gz, .xz, .bz2 or .zst) or .parquet"
_CHUNK_BYTES = 2**20


def read_documents(
    spec: str | os.PathLike[str], *, text_field: str = "text", document_separator: str | None = None
) -> Iterator[str]:
    """Yield the documents of a source: `embedded`, a file, a glob, or a directory (searched to any depth).

    A .txt file is one document, unless `document_separator` splits it. `text_field` is the key (jsonl) or column (parquet) of the text.
    Documents without any text are left out.

    Raises FileNotFoundError for what does not exist, SourceError for content that cannot be read as expected or holds no document;
    both while iterating.
    """
    if spec == EMBEDDED:
        yield from embedded_documents()
        return
    if document_separator == "":
        raise SourceError("document_separator is empty; expected a text that separates documents, or none.")
    files = find_files(spec)
    found = False
    for file in files:
        for document in _documents(file, text_field=text_field, document_separator=document_separator):
            if document:
                found = True
                yield document
    if not found:
        raise SourceError(f"{os.fspath(spec)} holds no text; expected at least one document that is not empty.")


def find_files(spec: str | os.PathLike[str]) -> list[Path]:
    """The files that a path, directory or glob names, sorted. Raises FileNotFoundError or SourceError where there are none."""
    if not os.fspath(spec):
        raise SourceError("data.source is empty; expected 'embedded', a file, a directory or a glob.")
    path = Path(spec)
    if path.is_file():
        _format(path)
        return [path]
    if path.is_dir():
        if files := sorted(file for file in path.rglob("*") if _is_visible(file, under=path) and file.is_file()):
            return files
        raise SourceError(f"The directory {path} holds no text file; expected {_EXPECTED}.")
    matches = sorted(Path(match) for match in glob.glob(os.fspath(spec), recursive=True))  # noqa: PTH207 - Path.glob refuses absolute patterns
    files = [match for match in matches if match.is_file()]
    if not files:
        raise FileNotFoundError(
            f"{path} does not exist; expected 'embedded', a file, a directory or a glob that matches files."
        )
    for file in files:
        _format(file)
    return files


def _format(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
        if suffixes and suffixes[-1] == ".parquet":
            suffixes = []
    if not suffixes or suffixes[-1] not in _FORMATS:
        raise SourceError(f"{path} has an unknown kind; expected a name that ends in {_EXPECTED}.")
    return suffixes[-1]


def _is_visible(path: Path, *, under: Path) -> bool:
    """Whether a directory's entry is of a kind that is read, and not hidden or within something hidden."""
    if any(part.startswith(".") for part in path.relative_to(under).parts):
        return False
    try:
        return bool(_format(path))
    except SourceError:
        return False


def _documents(file: Path, *, text_field: str, document_separator: str | None) -> Iterator[str]:
    kind = _format(file)
    if kind == ".parquet":
        yield from _parquet(file, text_field=text_field)
        return
    try:
        with open_unpacked(file) as stream:
            if kind == ".jsonl":
                yield from _json_lines(file, stream, text_field=text_field)
            elif document_separator is None:
                yield _decode(stream.read(), file=file, offset=0)
            else:
                yield from _separated(file, stream, separator=document_separator.encode())
    except PermissionError as error:
        raise SourceError(f"{file} cannot be read: permission denied; make it readable.") from error
    except unpacking_errors() as error:
        raise SourceError(f"{file} cannot be read ({error}); expected a whole, valid {file.suffix} file.") from error


def _decode(data: bytes, *, file: Path, offset: int) -> str:
    """Text of `data`, which starts at byte `offset` of the (unpacked) file; a byte order mark at the start is not text."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = offset + error.start
        raise SourceError(
            f"{file} is not UTF-8: byte 0x{data[error.start]:02X} at offset {place}; convert the file to UTF-8."
        ) from error
    return text.removeprefix("\ufeff") if offset == 0 else text


def _separated(file: Path, stream: IO[bytes], *, separator: bytes) -> Iterator[str]:
    """Split at the bytes of the separator, which UTF-8 allows, holding one document at a time."""
    pending, offset = b"", 0
    while chunk := stream.read(_CHUNK_BYTES):
        *whole, pending = (pending + chunk).split(separator)
        for data in whole:
            yield _decode(data, file=file, offset=offset)
            offset += len(data) + len(separator)
    yield _decode(pending, file=file, offset=offset)


def _json_lines(file: Path, stream: IO[bytes], *, text_field: str) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(stream, start=1):
        text = _decode(line, file=file, offset=offset)
        offset += len(line)
        if text.strip():
            yield _json_text(text, place=f"{file}:{number}", text_field=text_field)


def _json_text(line: str, *, place: str, text_field: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{place} is not JSON ({error}); expected one object a line.") from error
    if not isinstance(row, dict):
        raise SourceError(f"{place} holds a {type(row).__name__}; expected an object with the key {text_field!r}.")
    if text_field not in row:
        raise SourceError(
            f"{place} has no key {text_field!r} but {sorted(row)}; set text_field to the key of the text."
        )
    return _checked(row[text_field], place=place, text_field=text_field)


def _checked(text: object, *, place: str, text_field: str) -> str:
    if not isinstance(text, str):
        raise SourceError(f"{place} has {type(text).__name__} as {text_field!r}; expected text.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{place} holds the lone surrogate U+{ord(text[error.start]):04X}, which UTF-8 cannot represent; repair the line."
        ) from error
    return text


def _parquet(file: Path, *, text_field: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise SourceError(f"{file} needs pyarrow to be read; install anarcho-tokenize[parquet].") from error
    try:
        with parquet.ParquetFile(file) as table:
            columns = table.schema_arrow.names
            if text_field not in columns:
                raise SourceError(
                    f"{file} has no column {text_field!r} but {columns}; set text_field to the text's column."
                )
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield _checked(text, place=f"{file}, row {row},", text_field=text_field)
    except (pyarrow.ArrowException, OSError) as error:
        raise SourceError(f"{file} cannot be read as Parquet ({error}); expected a whole, valid file.") from error
