"""Writes token shards: documents are split into training and validation, tokenized, and laid down whole or not at all.

A document belongs to validation by the sha256 of its text alone, so neither its place, nor the tokenizer, nor other documents move it:
the same text never is in both parts. Everything is written into a hidden directory beside the final one and renamed when it is complete and
flushed to disk; what an interrupted attempt left is removed by the next.
"""

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anarcho_tokenize.bpe import Tokenizer
from anarcho_tokenize.errors import ShardError
from anarcho_tokenize.shards import FORMAT, INDEX_FILE, OFFSET_TYPE, VERSION, token_type

TRAIN = "train"
VALIDATION = "validation"


def prepare_shards(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    directory: str | os.PathLike[str],
    *,
    validation_fraction: float = 0.05,
    shard_tokens: int = 2**26,
    source: str = "",
    num_threads: int | None = None,
) -> None:
    """Write `directory/train` and `directory/validation`, each for `TokenShards.open`; the directory must be new or empty.

    `source` is a note of where the documents are from. Documents without text are left out.
    Raises ShardError where the directory is in use, or a part that is wanted would hold no document.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ShardError(f"{target} already exists and is not an empty directory; remove it or choose another one.")
    staging = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        writers = {
            part: ShardWriter(staging / part, tokenizer, shard_tokens=shard_tokens, source=source)
            for part in (TRAIN, VALIDATION)
        }
        _write(documents, tokenizer, writers, validation_fraction=validation_fraction, num_threads=num_threads)
        _check_parts(writers, validation_fraction=validation_fraction)
        for writer in writers.values():
            writer.close()
        _sync(staging)
        staging.replace(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def is_validation(document: str, *, fraction: float) -> bool:
    """Whether a document is kept from training: its sha256, read as a number below 1, is below the fraction."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8]) < fraction * 2**64


class ShardWriter:
    """Appends documents to shards in a directory of its own; `close` writes the index."""

    def __init__(self, directory: Path, tokenizer: Tokenizer, *, shard_tokens: int, source: str) -> None:
        directory.mkdir(parents=True)
        self._directory = directory
        self._dtype = token_type(tokenizer.vocab_size)
        self._shard_tokens = shard_tokens
        self._header = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "eot_id": tokenizer.eot_id,
            "pad_id": tokenizer.pad_id,
            "source": source,
        }
        self._finished: list[dict[str, Any]] = []
        self._pending: list[npt.NDArray[Any]] = []
        self._pending_tokens = 0
        self._pending_bytes = 0
        self.num_documents = 0

    def add(self, ids: npt.NDArray[np.int32], *, num_bytes: int) -> None:
        """Append one document of `num_bytes` UTF-8 bytes; end-of-text is added here."""
        self._pending.append(np.append(ids, self._header["eot_id"]).astype(self._dtype))
        self._pending_tokens += len(ids) + 1
        self._pending_bytes += num_bytes
        self.num_documents += 1
        if self._pending_tokens >= self._shard_tokens:
            self._finish_shard()

    def close(self) -> None:
        """Write the last shard and the index; the directory is then complete."""
        if self._pending:
            self._finish_shard()
        totals = {key: sum(shard[key] for shard in self._finished) for key in ("tokens", "documents", "bytes")}
        index = {**self._header, **totals, "shards": self._finished}
        _write_synced(self._directory / INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode())
        _sync(self._directory)

    def _finish_shard(self) -> None:
        name = f"shard-{len(self._finished):05d}"
        tokens = np.concatenate(self._pending).tobytes()
        starts = np.cumsum([0, *(len(document) for document in self._pending)]).astype(OFFSET_TYPE).tobytes()
        _write_synced(self._directory / f"{name}.bin", tokens)
        _write_synced(self._directory / f"{name}.idx", starts)
        self._finished.append(
            {
                "name": name,
                "tokens": self._pending_tokens,
                "documents": len(self._pending),
                "bytes": self._pending_bytes,
                "sha256": hashlib.sha256(tokens).hexdigest(),
                "index_sha256": hashlib.sha256(starts).hexdigest(),
            }
        )
        self._pending, self._pending_tokens, self._pending_bytes = [], 0, 0


def _write(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    writers: dict[str, ShardWriter],
    *,
    validation_fraction: float,
    num_threads: int | None,
) -> None:
    # The encoder reads ahead, so what is known of a document waits in a queue for its ids.
    waiting: deque[tuple[str, int]] = deque()

    def noted() -> Iterator[str]:
        for part, document in _assign(documents, fraction=validation_fraction):
            waiting.append((part, len(document.encode())))
            yield document

    for ids in tokenizer.encode_documents(noted(), num_threads=num_threads):
        part, num_bytes = waiting.popleft()
        writers[part].add(ids, num_bytes=num_bytes)


def _assign(documents: Iterable[str], *, fraction: float) -> Iterator[tuple[str, str]]:
    """Each document with text, and the part it belongs to by its hash.

    A few documents, or a single book, may all hash into the training part: then the end of the last one is kept from training instead.
    """
    validated = False
    held: str | None = None
    for document in documents:
        if not document:
            continue
        if held is not None:
            yield TRAIN, held
        held = None
        if is_validation(document, fraction=fraction):
            validated = True
            yield VALIDATION, document
        else:
            held = document
    if held is None:
        return
    head, tail = (held, "") if validated or not fraction else _cut_tail(held, fraction=fraction)
    yield from ((part, text) for part, text in ((TRAIN, head), (VALIDATION, tail)) if text)


def _cut_tail(document: str, *, fraction: float) -> tuple[str, str]:
    """The document without about its last ``fraction``, and that; cut at a line's end where there is one, so that no word is cut."""
    place = round(len(document) * (1 - fraction))
    line_end = document.rfind("\n", 0, place) + 1
    cut = line_end if line_end > place // 2 else place
    return document[:cut], document[cut:]


def _check_parts(writers: dict[str, ShardWriter], *, validation_fraction: float) -> None:
    counts = {part: writer.num_documents for part, writer in writers.items()}
    total = sum(counts.values())
    if total == 0:
        raise ShardError("The source holds no document; expected at least one that is not empty.")
    if counts[TRAIN] == 0 or (counts[VALIDATION] == 0 and validation_fraction > 0):
        empty = TRAIN if counts[TRAIN] == 0 else VALIDATION
        raise ShardError(
            f"None of the {total} documents fell into {empty} with data.validation_fraction {validation_fraction}; give more documents "
            "(data.document_separator splits a .txt file), or set data.validation_fraction to 0 to train on all of them."
        )


def _write_synced(file: Path, data: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
