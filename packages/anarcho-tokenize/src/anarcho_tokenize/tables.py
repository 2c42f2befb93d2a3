"""Rows of Parquet files, of which only the columns that are needed are read, and few rows at a time.

Row groups before the place to start from are skipped by what the file's footer says of them. Batches begin anew in each row group, so that
the rows that can be read of a damaged file are the same wherever reading starts. Needs pyarrow (`anarcho-tokenize[parquet]`).
"""

from collections.abc import Iterator
from io import BufferedIOBase
from typing import Any

from anarcho_tokenize.errors import SourceError
from anarcho_tokenize.reading import Fault, Reading, Row

_BATCH_BYTES = 2**23
_BATCH_ROWS = 512
_LARGEST_CHUNK = 2**26
_BUFFER_BYTES = 2**20


def require_pyarrow(name: str) -> Any:
    """The module. Raises SourceError where it is missing."""
    try:
        import pyarrow
    except ImportError as error:
        raise SourceError(f"{name} needs pyarrow to be read; install anarcho-tokenize[parquet].") from error
    return pyarrow


def read_table(stream: BufferedIOBase, *, name: str, reading: Reading, row: int) -> Iterator[Row]:
    """The rows after the first `row`, each with the columns that are needed."""
    pyarrow = require_pyarrow(name)
    try:
        yield from _rows(stream, name=name, reading=reading, row=row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # The last of names of columns.
        if getattr(error, "errno", None) is not None:
            raise
        yield Row(Fault(f"cannot be read as Parquet ({error}); expected a whole, valid file."), 0, None, name)


def rows_between(stream: BufferedIOBase, start: int, stop: int) -> tuple[int, int | None]:
    """How many rows are before the row groups that start at these bytes, counted as stored, and up to their end; of a damaged file all."""
    pyarrow = require_pyarrow(getattr(stream, "name", "A table"))
    from pyarrow import parquet

    try:
        metadata = parquet.read_metadata(stream)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        return 0, None
    place = row = 0
    rows: list[int] = []
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        rows += [row, row + group.num_rows] if start <= place < stop else []
        place += sum(group.column(number).total_compressed_size for number in range(group.num_columns))
        row += group.num_rows
    return (rows[0], rows[-1]) if rows else (row, row)


def _rows(stream: BufferedIOBase, *, name: str, reading: Reading, row: int) -> Iterator[Row]:
    from pyarrow import parquet

    metadata = parquet.read_metadata(stream)
    columns, missing = _columns(metadata.schema.to_arrow_schema(), reading)
    if missing is not None:
        yield from (
            Row(missing, number, 0, f"{name}, row {number}") for number in range(row + 1, metadata.num_rows + 1)
        )
        return
    largest_chunk, row_bytes = _sizes(metadata, set(columns))
    # Page by page, which for several columns means to go to and fro, and for remote files a request each time: only for large chunks.
    is_by_page = len(columns) == 1 or largest_chunk > _LARGEST_CHUNK
    batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, row_bytes)))
    stream.seek(0)
    table = parquet.ParquetFile(
        stream,
        metadata=metadata,
        buffer_size=_BUFFER_BYTES if is_by_page else 0,
        pre_buffer=False,
        page_checksum_verification=True,
    )
    number = 0
    for group in range(metadata.num_row_groups):
        group_rows = metadata.row_group(group).num_rows
        if number + group_rows <= row:
            number += group_rows
            continue
        for batch in table.iter_batches(batch_rows, row_groups=[group], columns=columns, use_threads=False):
            skipped = min(batch.num_rows, max(0, row - number))
            number += skipped
            for value in _values(batch.slice(skipped)):
                number += 1
                yield Row(value, number, 0, f"{name}, row {number}")


def _columns(schema: Any, reading: Reading) -> tuple[list[str], Fault | None]:
    """The columns to read, and what is wrong with every row where the text's is not among them."""
    from pyarrow import types

    def holds_text(kind: Any) -> bool:
        return (
            types.is_string(kind) or types.is_large_string(kind) or types.is_nested(kind) or types.is_dictionary(kind)
        )

    if reading.text_columns is None:
        texts = [field.name for field in schema if holds_text(field.type)]
    else:
        texts = [name for name in reading.text_columns if name in schema.names]
        if not texts:
            wanted = " or ".join(map(repr, reading.text_columns))
            reason = f"has no column {wanted} but {schema.names}; set text_field to the text's column."
            return [], Fault(reason)
    return texts + [name for name in reading.other_columns if name in schema.names and name not in texts], None


def _sizes(metadata: Any, columns: set[str]) -> tuple[int, int]:
    """Bytes of the largest chunk of a column, as stored, and of a row of the largest rows."""
    largest_chunk = row_bytes = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        chunks = [group.column(number) for number in range(group.num_columns)]
        needed = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
        largest_chunk = max([largest_chunk, *(chunk.total_compressed_size for chunk in needed)])
        unpacked = sum(chunk.total_uncompressed_size for chunk in needed)
        row_bytes = max(row_bytes, unpacked // max(1, group.num_rows))
    return largest_chunk, row_bytes


def _values(batch: Any) -> Iterator[dict[str, object] | Fault]:
    """The rows of a batch; where one is not UTF-8, only that one is a fault."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        yield from (_value(batch.slice(number, 1)) for number in range(batch.num_rows))


def _value(batch: Any) -> dict[str, object] | Fault:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        return Fault(f"is not UTF-8: byte 0x{byte:02X} at offset {error.start} of a text; expected UTF-8.")
