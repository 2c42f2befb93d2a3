"""Token shards: the ids of many documents on disk, read by memory map.

A directory holds, for each shard, `shard-00000.bin` (the ids one after another, little-endian uint16, or uint32 for vocabularies of
65,536 or more; each document is followed by end-of-text) and `shard-00000.idx` (where each document starts, in tokens from the start
of the shard, and the shard's length last; little-endian uint64), and one `index.json`, written last:

    {"format": "anarcho-token-shards", "version": 1, "tokenizer_sha256", "vocab_size", "eot_id", "pad_id", "source",
     "tokens", "documents", "bytes", "shards": [{"name", "tokens", "documents", "bytes", "sha256", "index_sha256"}, ...]}

Documents are never split between shards. `bytes` counts the UTF-8 bytes of the documents, for bits per byte.
"""

import hashlib
import json
import os
import re
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anarcho_tokenize.config import DataConfig as DataConfig
from anarcho_tokenize.errors import ShardError

FORMAT = "anarcho-token-shards"
VERSION = 1
INDEX_FILE = "index.json"
OFFSET_TYPE = np.dtype("<u8")
_NAME = re.compile(r"shard-[0-9]{5,}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def token_type(vocab_size: int) -> np.dtype[Any]:
    """How ids of such a vocabulary are stored."""
    return np.dtype("<u2") if vocab_size < 65536 else np.dtype("<u4")


class TokenShards:
    """The tokens of a prepared directory as one long sequence."""

    def __init__(self, directory: Path, index: dict[str, Any]) -> None:
        """Used by `open`, which has checked the index."""
        self.directory = directory
        self.num_tokens: int = index["tokens"]
        self.num_documents: int = index["documents"]
        self.num_bytes: int = index["bytes"]
        """UTF-8 bytes of the documents."""
        self.vocab_size: int = index["vocab_size"]
        self.eot_id: int = index["eot_id"]
        self.pad_id: int = index["pad_id"]
        self.tokenizer_sha256: str = index["tokenizer_sha256"]
        self.source: str = index["source"]
        contents = {key: value for key, value in index.items() if key != "source"}
        self.fingerprint = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
        """Over the index but the name of its source; so equal tokens have equal fingerprints wherever their text was."""
        self._shards: list[dict[str, Any]] = index["shards"]
        self._starts = [0, *accumulate(shard["tokens"] for shard in self._shards)]

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> "TokenShards":
        """Open a directory with an index.json. Raises FileNotFoundError for a missing file, ShardError for a wrong one."""
        folder = Path(directory)
        shards = cls(folder, _read_index(folder))
        for shard in shards._shards:
            _check_size(folder / f"{shard['name']}.bin", shard["tokens"] * token_type(shards.vocab_size).itemsize)
            _check_size(folder / f"{shard['name']}.idx", (shard["documents"] + 1) * OFFSET_TYPE.itemsize)
        return shards

    def tokens(self, start: int, stop: int) -> npt.NDArray[Any]:
        """The ids from `start` up to `stop`, as stored (uint16 or uint32): a read-only view where one shard holds them all."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise ShardError(
                f"Tokens {start} to {stop} were asked for; expected a range within 0 to {self.num_tokens}."
            )
        parts = []
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            first = self._starts[number]
            end = min(stop, self._starts[number + 1])
            parts.append(self._maps[number][start - first : end - first])
            start, number = end, number + 1
        if not parts:
            return np.empty(0, dtype=token_type(self.vocab_size))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def document_starts(self) -> npt.NDArray[np.int64]:
        """Where each document starts, and the end of the last one; shape (num_documents + 1,)."""
        starts = [
            np.fromfile(self.directory / f"{shard['name']}.idx", dtype=OFFSET_TYPE)[:-1].astype(np.int64) + first
            for shard, first in zip(self._shards, self._starts, strict=False)
        ]
        return np.concatenate([*starts, np.array([self.num_tokens], dtype=np.int64)])

    def verify(self) -> None:
        """Read every file; raises ShardError that names each one whose sha256 is not the index's."""
        wrong = [
            f"{shard['name']}{suffix}"
            for shard in self._shards
            for suffix, key in ((".bin", "sha256"), (".idx", "index_sha256"))
            if _sha256(self.directory / f"{shard['name']}{suffix}") != shard[key]
        ]
        if wrong:
            raise ShardError(
                f"{self.directory} is damaged: the sha256 of {', '.join(wrong)} is not the one in {INDEX_FILE}; prepare the data anew."
            )

    @cached_property
    def _maps(self) -> list[np.memmap[Any, Any]]:
        dtype = token_type(self.vocab_size)
        return [np.memmap(self.directory / f"{shard['name']}.bin", dtype=dtype, mode="r") for shard in self._shards]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_size(file: Path, expected: int) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing, but {INDEX_FILE} lists it; prepare the data anew.")
    if (found := file.stat().st_size) != expected:
        raise ShardError(f"{file} has {found} bytes; expected {expected} by {INDEX_FILE}, so prepare the data anew.")


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX_FILE
    if not file.is_file():
        inner = [name for name in ("train", "validation") if (folder / name / INDEX_FILE).is_file()]
        hint = f"open {folder / inner[0]}" if inner else "prepare the data first"
        raise FileNotFoundError(f"{file} is missing; expected a directory of token shards, so {hint}.")
    try:
        index = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{file} is not JSON ({error}); prepare the data anew.") from error
    _check_index(index, file=file)
    return index


def _check_index(index: object, *, file: Path) -> None:
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ShardError(f"{file} is not an index of token shards; expected the format {FORMAT!r}.")
    if index.get("version") != VERSION:
        raise ShardError(f"{file} has version {index.get('version')!r}; expected {VERSION}, so prepare the data anew.")
    counts = ("tokens", "documents", "bytes")
    _check_values(index, file=file, whole=(*counts, "vocab_size", "eot_id", "pad_id"), hashes=("tokenizer_sha256",))
    shards = index.get("shards")
    if not isinstance(index.get("source"), str) or not isinstance(shards, list):
        raise ShardError(f"{file} lacks 'source' or 'shards'; prepare the data anew.")
    for shard in shards:
        if not isinstance(shard, dict) or not _NAME.fullmatch(str(shard.get("name"))):
            raise ShardError(f"{file} lists the shard {shard!r}; expected plain names such as 'shard-00000'.")
        _check_values(shard, file=file, whole=counts, hashes=("sha256", "index_sha256"))
    for count in counts:
        if index[count] != sum(shard[count] for shard in shards):
            raise ShardError(
                f"{file} has {index[count]} as '{count}', not the sum over its shards; prepare the data anew."
            )
    if any(shard["tokens"] == 0 for shard in shards) or max(index["eot_id"], index["pad_id"]) >= index["vocab_size"]:
        raise ShardError(f"{file} lists an empty shard or a token outside the vocabulary; prepare the data anew.")


def _check_values(values: dict[str, Any], *, file: Path, whole: tuple[str, ...], hashes: tuple[str, ...]) -> None:
    for key in whole:
        if type(values.get(key)) is not int or values[key] < 0:
            raise ShardError(f"{file} has {values.get(key)!r} as '{key}'; expected a whole number of at least 0.")
    for key in hashes:
        if not isinstance(values.get(key), str) or not _SHA256.fullmatch(values[key]):
            raise ShardError(f"{file} has {values.get(key)!r} as '{key}'; expected a sha256 of 64 hexadecimal digits.")
