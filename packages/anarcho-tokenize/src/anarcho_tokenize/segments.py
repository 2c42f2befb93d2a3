"""Segments: rows of a source that a rank has judged and encoded, as arrays in one file, for the merge to read in place of the source.

A segment is an uncompressed .npz without pickled objects. Of each row it has the number, the byte behind it, the bytes of the file read so
far, and what it came to; of rows that are taken also size, hash and documents; of rows that cannot be used, place, reason and excerpt.
zip's checksums tell when something in it was damaged.
"""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.lib.format import read_array

from anarcho_tokenize.durable import sync, sync_directory
from anarcho_tokenize.encoded import EncodedDocument, EncodedRow
from anarcho_tokenize.errors import ShardError
from anarcho_tokenize.filters import Reason
from anarcho_tokenize.judging import Judged, Taken, Verdict
from anarcho_tokenize.reading import Fault, Row
from anarcho_tokenize.shards import token_type

_TAKEN, _BAD = 0, 1
_REASONS: tuple[Reason, ...] = get_args(Reason)
_NO_END = -1
_DIGEST_BYTES = 32


class SegmentWriter:
    """Collects rows in memory, until they are written."""

    def __init__(self, *, vocab_size: int) -> None:
        self._token_type = token_type(vocab_size)
        self._rows: list[tuple[int, int, int, int]] = []
        self._faults: list[tuple[str, str, str]] = []
        self._sizes: list[int] = []
        self._digests: list[bytes] = []
        self._documents: list[EncodedDocument] = []
        self._document_counts: list[int] = []
        self._document_bytes: list[int] = []
        self.num_tokens = 0

    @property
    def num_rows(self) -> int:
        """Rows so far."""
        return len(self._rows)

    @property
    def place(self) -> tuple[int, int | None] | None:
        """Number of the last row, and the byte behind it; None before the first."""
        if not self._rows:
            return None
        number, end, *_ = self._rows[-1]
        return number, None if end == _NO_END else end

    def add(self, row: Row, verdict: Verdict, stored_bytes: int, encoded: EncodedRow | None) -> None:
        """Append a row, with its documents where it is taken."""
        kind = _BAD if isinstance(verdict, Fault) else _TAKEN
        if isinstance(verdict, Taken):
            assert encoded is not None
            self._sizes.append(verdict.num_bytes)
            self._digests.append(verdict.digest)
            self._document_counts.append(len(encoded.documents))
            self._document_bytes.extend(encoded.num_bytes)
            for ids, mask in encoded.documents:
                self._documents.append(EncodedDocument(ids.astype(self._token_type), mask))
                self.num_tokens += len(ids)
        elif isinstance(verdict, Fault):
            self._faults.append((row.place, verdict.reason, verdict.excerpt))
        else:
            kind = _BAD + 1 + _REASONS.index(verdict)
        self._rows.append((row.number, _NO_END if row.end is None else row.end, stored_bytes, kind))

    def write(self, file: Path) -> None:
        """Bring the rows to disk under a name that appears when all of them are there."""
        masks = [document.mask for document in self._documents if document.mask is not None]
        rows = np.array(self._rows, dtype=np.int64).reshape(-1, 4)
        arrays = {
            "numbers": rows[:, 0],
            "ends": rows[:, 1],
            "stored_bytes": rows[:, 2],
            "kinds": rows[:, 3],
            "faults": np.frombuffer(json.dumps(self._faults).encode(), dtype=np.uint8),
            "sizes": np.array(self._sizes, dtype=np.int64),
            "digests": np.frombuffer(b"".join(self._digests), dtype=np.uint8),
            "document_counts": np.array(self._document_counts, dtype=np.int64),
            "document_tokens": np.array([len(document.ids) for document in self._documents], dtype=np.int64),
            "document_bytes": np.array(self._document_bytes, dtype=np.int64),
            "ids": np.concatenate([np.empty(0, self._token_type), *(document.ids for document in self._documents)]),
            "mask": np.concatenate([np.empty(0, np.uint8), *masks]),
        }
        staging = file.with_name(f"{file.name}.partial")
        with staging.open("wb") as stream:
            np.savez(stream, **arrays)
            stream.flush()
            sync(stream.fileno())
        staging.replace(file)
        sync_directory(file.parent)


def read_segment(file: Path) -> Iterator[tuple[Row, int]]:
    """The rows of a segment, as they were added, each with the bytes of its file read so far. Raises ShardError where it is damaged."""
    arrays = _arrays(file)
    faults = iter(json.loads(arrays["faults"].tobytes()))
    taken = _taken(arrays)
    columns = (arrays[name].tolist() for name in ("numbers", "ends", "stored_bytes", "kinds"))
    for number, end, stored_bytes, kind in zip(*columns, strict=True):
        place, verdict = "", None
        if kind == _TAKEN:
            verdict = next(taken)
        elif kind == _BAD:
            place, *fault = next(faults)
            verdict = Fault(*fault)
        else:
            verdict = _REASONS[kind - _BAD - 1]
        yield Row(Judged(verdict), number, None if end == _NO_END else end, place), stored_bytes


def _taken(arrays: dict[str, Any]) -> Iterator[Taken]:
    digests, ids, mask = arrays["digests"].tobytes(), arrays["ids"], arrays["mask"]
    tokens, num_bytes = arrays["document_tokens"].tolist(), arrays["document_bytes"].tolist()
    start = first = 0
    for number, (size, count) in enumerate(
        zip(arrays["sizes"].tolist(), arrays["document_counts"].tolist(), strict=True)
    ):
        documents: list[EncodedDocument] = []
        for length in tokens[first : first + count]:
            part = slice(start, start + length)
            documents.append(EncodedDocument(ids[part], mask[part] if len(mask) else None))
            start += length
        encoded = EncodedRow(tuple(documents), tuple(num_bytes[first : first + count]))
        first += count
        yield Taken(encoded, size, digests[_DIGEST_BYTES * number : _DIGEST_BYTES * (number + 1)])


def _arrays(file: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(file) as archive:
            return {name.removesuffix(".npy"): _array(archive, name) for name in archive.namelist()}
    except FileNotFoundError:
        problem = "is missing"
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        problem = f"is damaged ({error})"
    rank = file.parent
    raise ShardError(f"{file} {problem}; remove {rank}, run that rank again, and merge then.")


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as stream:
        return read_array(stream)  # which reads no pickled objects
