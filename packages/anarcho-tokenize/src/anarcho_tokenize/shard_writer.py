"""Appends documents to token shards. What is not committed does not exist: a shard's files get their names when it is closed, and the
index that lists them is replaced after the producer has noted how far it came."""

import hashlib
import json
import os
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from anarcho_tokenize.durable import replace_file, sync_directory
from anarcho_tokenize.shards import INDEX_FILE, MASK_TYPE, OFFSET_TYPE, token_type

_PARTIAL = ".partial"
_COUNTS = ("tokens", "documents", "bytes")


class ShardWriter:
    """One part of prepared data (training or validation) in a directory of its own."""

    def __init__(self, directory: Path, *, header: dict[str, Any], shards: Iterable[dict[str, Any]]) -> None:
        """Go on behind the `shards` that were committed; whatever else an interrupted attempt left is removed.

        `header` holds the index's fields about the whole part: format, kind, tokenizer, plan.
        """
        self.directory = directory
        self.shards = list(shards)
        self._closed = {count: sum(shard[count] for shard in self.shards) for count in _COUNTS}
        self._header = header
        self._token_type = token_type(header["vocab_size"])
        self._masked = header["kind"] != "text"
        self.token_bytes = self._token_type.itemsize + self._masked
        """Bytes that a token takes on disk, its mask included."""
        self._open: _OpenShard | None = None
        directory.mkdir(parents=True, exist_ok=True)
        listed = {shard["name"] for shard in self.shards}
        for file in directory.glob("shard-*"):
            if file.suffix == _PARTIAL or file.stem not in listed:
                file.unlink()
        self.delete_evicted()

    @property
    def num_tokens(self) -> int:
        """Tokens so far, pending ones included."""
        return self.total("tokens")

    @property
    def pending_tokens(self) -> int:
        """Tokens of documents whose shard is not closed yet."""
        return 0 if self._open is None else self._open.counts()["tokens"]

    def total(self, count: str) -> int:
        """`tokens`, `documents` or `bytes` so far, pending ones included."""
        return self._closed[count] + (0 if self._open is None else self._open.counts()[count])

    def shard_bytes(self, number: int) -> int:
        """Bytes of a shard's tokens and mask on disk."""
        shard = self.shards[number]
        return 0 if shard["evicted"] else shard["tokens"] * self.token_bytes

    def add(self, ids: npt.NDArray[np.int32], mask: npt.NDArray[np.uint8] | None, *, num_bytes: int) -> None:
        """Append one document of `num_bytes` UTF-8 bytes; `mask` is None for a text."""
        if self._open is None:
            name = f"shard-{len(self.shards):05d}"
            self._open = _OpenShard(self.directory, name, masked=self._masked)
        self._open.add(ids.astype(self._token_type), mask, num_bytes=num_bytes)

    def close_shard(self) -> None:
        """Give the pending documents' files their names; nothing happens where there are none."""
        if self._open is not None:
            shard = self._open.close()
            self.shards.append(shard)
            for count in _COUNTS:
                self._closed[count] += shard[count]
            sync_directory(self.directory)
        self._open = None

    def write_index(self, *, complete: bool) -> None:
        """Let readers see the closed shards."""
        index = {**self._header, "complete": complete, **self._closed, "shards": self.shards}
        replace_file(self.directory / INDEX_FILE, (json.dumps(index, indent=1) + "\n").encode())

    def delete_evicted(self) -> None:
        """Delete the tokens of shards of which the index says that they are gone."""
        for shard in self.shards:
            if shard["evicted"]:
                for suffix in (".bin", ".mask"):
                    (self.directory / f"{shard['name']}{suffix}").unlink(missing_ok=True)

    def discard(self) -> None:
        """Drop the pending documents."""
        if self._open is not None:
            self._open.discard()
        self._open = None


class _OpenShard:
    """Files that are still written, under names that end in .partial; memory holds an integer for each document."""

    def __init__(self, directory: Path, name: str, *, masked: bool) -> None:
        self._directory = directory
        self._name = name
        self._starts = array("Q", [0])
        self._bytes = 0
        self._tokens = _HashedFile(directory / f"{name}.bin{_PARTIAL}")
        self._mask = _HashedFile(directory / f"{name}.mask{_PARTIAL}") if masked else None

    def add(self, ids: npt.NDArray[Any], mask: npt.NDArray[np.uint8] | None, *, num_bytes: int) -> None:
        assert (mask is None) == (self._mask is None)
        self._tokens.write(ids.tobytes())
        if self._mask is not None and mask is not None:
            self._mask.write(mask.astype(MASK_TYPE).tobytes())
        self._starts.append(self._starts[-1] + len(ids))
        self._bytes += num_bytes

    def close(self) -> dict[str, Any]:
        """Finish the files, give them their names, and describe them as the index does."""
        starts = _HashedFile(self._directory / f"{self._name}.idx{_PARTIAL}")
        starts.write(np.array(self._starts, dtype=OFFSET_TYPE).tobytes())
        hashes = {"sha256": self._tokens.close(), "index_sha256": starts.close()}
        hashes |= {"mask_sha256": self._mask.close()} if self._mask is not None else {}
        return {"name": self._name, **self.counts(), **hashes, "evicted": False}

    def counts(self) -> dict[str, int]:
        return {"tokens": self._starts[-1], "documents": len(self._starts) - 1, "bytes": self._bytes}

    def discard(self) -> None:
        for file in (self._tokens, self._mask):
            if file is not None:
                file.discard()


class _HashedFile:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: BinaryIO = path.open("wb", buffering=2**20)
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._stream.write(data)
        self._hash.update(data)

    def close(self) -> str:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._path.rename(self._path.with_suffix(""))
        return self._hash.hexdigest()

    def discard(self) -> None:
        self._stream.close()
        self._path.unlink(missing_ok=True)
