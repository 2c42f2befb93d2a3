"""Appends documents to token shards. What is not committed does not exist: a shard's files get their names when it is closed, and the
index that lists them is replaced after the producer has noted how far it came."""

import hashlib
from array import array
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from anarcho_tokenize.durable import json_document, replace_file, sync, sync_directory
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
        index_file = directory / INDEX_FILE
        self._index = index_file.read_bytes() if index_file.is_file() else b""

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

    @property
    def stored_bytes(self) -> int:
        """Bytes of the closed shards' tokens and masks on disk."""
        return sum(shard["tokens"] for shard in self.shards if not shard["evicted"]) * self.token_bytes

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
        index = json_document({**self._header, "complete": complete, **self._closed, "shards": self.shards})
        if index != self._index:
            replace_file(self.directory / INDEX_FILE, index)
            self._index = index

    def evict(self, num_bytes: int, *, before: int) -> bool:
        """Mark the oldest shards that end by token `before` as evicted until so many bytes are free; returns whether there was one.

        `delete_evicted` deletes them, once the index is written.
        """
        end, found = 0, False
        for shard in self.shards:
            end += shard["tokens"]
            if num_bytes <= 0 or end > before:
                break
            if not shard["evicted"]:
                shard["evicted"] = found = True
                num_bytes -= shard["tokens"] * self.token_bytes
        return found

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
        self._files: dict[str, _HashedFile] = {}
        for suffix in (".bin", ".mask") if masked else (".bin",):
            self._create(suffix)

    def add(self, ids: npt.NDArray[Any], mask: npt.NDArray[np.uint8] | None, *, num_bytes: int) -> None:
        assert (mask is not None) == (".mask" in self._files)
        self._files[".bin"].write(ids.tobytes())
        if mask is not None:
            self._files[".mask"].write(mask.astype(MASK_TYPE).tobytes())
        self._starts.append(self._starts[-1] + len(ids))
        self._bytes += num_bytes

    def close(self) -> dict[str, Any]:
        """Finish the files, give them their names, and describe them as the index does."""
        self._create(".idx").write(np.array(self._starts, dtype=OFFSET_TYPE).tobytes())
        keys = {".bin": "sha256", ".idx": "index_sha256", ".mask": "mask_sha256"}
        hashes = {keys[suffix]: file.close() for suffix, file in self._files.items()}
        return {"name": self._name, **self.counts(), **hashes, "evicted": False}

    def counts(self) -> dict[str, int]:
        return {"tokens": self._starts[-1], "documents": len(self._starts) - 1, "bytes": self._bytes}

    def discard(self) -> None:
        for file in self._files.values():
            file.discard()

    def _create(self, suffix: str) -> "_HashedFile":
        self._files[suffix] = _HashedFile(self._directory / f"{self._name}{suffix}{_PARTIAL}")
        return self._files[suffix]


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
        sync(self._stream.fileno())
        self._stream.close()
        self._path.rename(self._path.with_suffix(""))
        return self._hash.hexdigest()

    def discard(self) -> None:
        with suppress(OSError):  # of a full disk: closing writes what is left
            self._stream.close()
        self._path.unlink(missing_ok=True)
