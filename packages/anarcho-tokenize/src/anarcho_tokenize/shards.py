"""Token shards: the ids of many documents on disk, read by memory map, also while a producer still appends to them.

A directory holds, for each shard, little-endian and without headers:

* `shard-00000.bin`: the ids one after another, uint16, or uint32 for vocabularies of 65,536 or more;
* `shard-00000.idx`: where each document starts, in tokens from the start of the shard, and the shard's length last, uint64;
* `shard-00000.mask`, for conversations and preferences alone: for each token 1 where it counts as a target, else 0, uint8;

and one `index.json`, which is replaced as a whole, after the files that it lists:

    {"format": "anarcho-token-shards", "version": 2, "kind", "complete", "tokenizer_sha256", "vocab_size", "eot_id", "pad_id", "source",
     "plan_sha256", "tokens", "documents", "bytes",
     "shards": [{"name", "tokens", "documents", "bytes", "sha256", "index_sha256", "mask_sha256", "evicted"}, ...]}

A text ends in end-of-text; a conversation is its rendered ids alone; the documents 2i and 2i + 1 of preferences are the chosen and the
rejected answer to one prompt. Documents are never split between shards. `bytes` counts the UTF-8 bytes of the documents, for bits per byte.
Of an evicted shard, `.bin` and `.mask` are gone. A shard of which one of these is damaged can be lost without the others: its tokens
then read as end-of-text and none of them counts, so every other token has the place that it had.
"""

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anarcho_tokenize.config import Kind
from anarcho_tokenize.errors import ShardError

FORMAT = "anarcho-token-shards"
VERSION = 2
INDEX_FILE = "index.json"
OFFSET_TYPE = np.dtype("<u8")
MASK_TYPE = np.dtype("u1")
_NAME = re.compile(r"shard-[0-9]{5,}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COUNTS = ("tokens", "documents", "bytes")


def token_type(vocab_size: int) -> np.dtype[Any]:
    """How ids of such a vocabulary are stored."""
    return np.dtype("<u2") if vocab_size < 65536 else np.dtype("<u4")


class TokenShards:
    """The tokens of a part of prepared data as one long sequence."""

    def __init__(
        self,
        directory: Path,
        index: dict[str, Any],
        *,
        growing: bool,
        max_damaged_share: float | None = None,
        on_damage: Callable[[str], None] | None = None,
    ) -> None:
        """Used by `open`, which has checked the index."""
        self.directory = directory
        self.kind: Kind = index["kind"]
        self.vocab_size: int = index["vocab_size"]
        self.eot_id: int = index["eot_id"]
        self.pad_id: int = index["pad_id"]
        self.tokenizer_sha256: str = index["tokenizer_sha256"]
        self.source: str = index["source"]
        self.plan_sha256: str = index["plan_sha256"]
        """Over what the tokens follow from: sources, filters, tokenizer; known before there is any token."""
        self._growing = growing
        self._max_damaged_share = max_damaged_share
        self._on_damage = on_damage or (lambda message: None)
        self._damaged: dict[int, str] = {}
        self._maps: dict[tuple[int, str], npt.NDArray[Any]] = {}
        self._verified: set[str] = set()
        self._shards: list[dict[str, Any]] = []

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        *,
        growing: bool = False,
        max_damaged_share: float | None = None,
        on_damage: Callable[[str], None] | None = None,
    ) -> "TokenShards":
        """Open a directory with an index.json; with `growing`, also one that is not complete yet.

        With `max_damaged_share`, damaged shards are no error but lost, each told to `on_damage` in one sentence, until they hold more
        than this share of the tokens. What says where documents start (`.idx`) is never done without.

        Raises FileNotFoundError for a missing file, ShardError for a wrong or unfinished one.
        """
        folder = Path(directory)
        index, version = _read_index(folder)
        if not (index["complete"] or growing):
            raise ShardError(f"{folder} is not complete: its preparation was interrupted; run it again to continue it.")
        shards = cls(folder, index, growing=growing, max_damaged_share=max_damaged_share, on_damage=on_damage)
        shards._take(index, version)
        return shards

    def refresh(self) -> None:
        """Take up what was appended since; tokens that were there stay what they are.

        Raises ShardError where they are not, because the directory was prepared anew.
        """
        if self._growing and _version((self.directory / INDEX_FILE).stat()) != self._index_version:
            self._take(*_read_index(self.directory))

    @property
    def fingerprint(self) -> str:
        """Over the tokens' hashes but the name of their source; so equal data has equal fingerprints wherever its text was."""
        hashed = [{key: value for key, value in shard.items() if key != "evicted"} for shard in self._shards]
        header = [self.kind, self.tokenizer_sha256, self.vocab_size, self.eot_id, self.pad_id]
        return hashlib.sha256(json.dumps([header, hashed], sort_keys=True).encode()).hexdigest()

    @property
    def shard_starts(self) -> list[int]:
        """Where each shard starts in the sequence, and the end of the last one; one more than there are shards."""
        return self._starts

    def is_evicted(self, number: int) -> bool:
        """Whether a shard's tokens were deleted to keep a budget."""
        return self._shards[number]["evicted"]

    @property
    def damaged(self) -> dict[int, str]:
        """Numbers of the shards that are lost, as far as is known, and what is wrong with each."""
        return dict(self._damaged)

    @property
    def damaged_tokens(self) -> int:
        """Tokens of the shards that are lost."""
        return sum(self._shards[number]["tokens"] for number in self._damaged)

    def tokens(self, start: int, stop: int) -> npt.NDArray[Any]:
        """The ids from `start` up to `stop`, as stored (uint16 or uint32): a read-only view where one shard holds them all."""
        return self._read(start, stop, suffix=".bin", dtype=token_type(self.vocab_size), lost=self.eot_id)

    def loss_mask(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """For each token from `start` up to `stop`, 1 where it counts as a target, else 0; every token of a text counts."""
        if self.kind != "text":
            return self._read(start, stop, suffix=".mask", dtype=MASK_TYPE, lost=0)
        mask = np.ones(stop - start, dtype=MASK_TYPE)
        for number, first, end in self._parts(start, stop):
            if self._is_lost(number):
                mask[first - start : end - start] = 0
        return mask

    def shard_documents(self, number: int) -> npt.NDArray[np.int64]:
        """Where each document of one shard starts in the whole sequence, and the shard's end; one more than it has documents."""
        name = f"{self._shards[number]['name']}.idx"
        self._require_intact(number, name)
        return np.fromfile(self.directory / name, dtype=OFFSET_TYPE).astype(np.int64) + self._starts[number]

    def document_starts(self) -> npt.NDArray[np.int64]:
        """Where each document starts, and the end of the last one; shape (num_documents + 1,)."""
        starts = [self.shard_documents(number)[:-1] for number in range(len(self._shards))]
        return np.concatenate([*starts, np.array([self.num_tokens], dtype=np.int64)])

    def verify(self) -> None:
        """Read every file that is there; raises ShardError that names each one whose sha256 is not the index's, unless it may be lost."""
        wrong = [
            (number, name)
            for number, shard in enumerate(self._shards)
            for name, sha256 in _files(shard)
            if self._sha256(name) != sha256
        ]
        if self._max_damaged_share is None or any(name.endswith(".idx") for _, name in wrong):
            if wrong:
                names = ", ".join(name for _, name in wrong)
                raise ShardError(
                    f"{self.directory} is damaged: the sha256 of {names} is not the one in {INDEX_FILE}; prepare the data anew."
                )
            return
        for number, name in wrong:
            self._lose(number, f"the sha256 of {name} is not the one in {INDEX_FILE}")

    def _take(self, index: dict[str, Any], version: "_Version") -> None:
        self._require_continued(index)
        try:
            wrong = self._check_sizes(index)
        except FileNotFoundError:
            # A shard may have been evicted since the index was read, which then says so.
            again, latest = _read_index(self.directory)
            if latest == version:
                raise
            return self._take(again, latest)
        self._index_version = version
        self.complete: bool = index["complete"]
        """Whether nothing will be appended any more."""
        self.num_tokens: int = index["tokens"]
        self.num_documents: int = index["documents"]
        self.num_bytes: int = index["bytes"]
        """UTF-8 bytes of the documents."""
        self._shards = index["shards"]
        self._starts = [0, *accumulate(shard["tokens"] for shard in self._shards)]
        self._maps = {key: view for key, view in self._maps.items() if not self._shards[key[0]]["evicted"]}
        for number, problem in wrong:
            self._lose(number, problem)
        return None

    def _require_continued(self, index: dict[str, Any]) -> None:
        known = [(shard["name"], shard["sha256"]) for shard in self._shards]
        found = [(shard["name"], shard["sha256"]) for shard in index["shards"][: len(known)]]
        if found != known or index["plan_sha256"] != self.plan_sha256:
            raise ShardError(f"{self.directory} was prepared anew while it was read; open it again, in a new run.")

    def _check_sizes(self, index: dict[str, Any]) -> list[tuple[int, str]]:
        """The new shards of which a file has another size, where they may be lost; raises ShardError where they may not."""
        known = {file for shard in self._shards for file, _ in _files(shard)}
        found = []
        for number, shard in enumerate(index["shards"]):
            if {file for file, _ in _files(shard)} <= known:
                continue
            for name, problem in _wrong_sizes(self.directory, shard, token_bytes=token_type(self.vocab_size).itemsize):
                if self._max_damaged_share is None or name.endswith(".idx"):
                    raise ShardError(f"{problem}, so prepare the data anew.")
                found.append((number, problem))
        return found

    def _lose(self, number: int, problem: str) -> None:
        """Do without a shard; raises ShardError where too many are lost."""
        if number in self._damaged:
            return
        self._damaged[number] = problem
        lost, share = self.damaged_tokens, self._max_damaged_share
        assert share is not None, "shards are lost only where that is allowed"
        if lost > share * self.num_tokens:
            raise ShardError(
                f"{self.directory} is damaged: {'; '.join(self._damaged.values())}: {lost} of {self.num_tokens} tokens are lost, more than "
                f"the share of {share} that data.max_bad_share allows; prepare the data anew."
            )
        self._on_damage(
            f"{self.directory / self._shards[number]['name']} is damaged and left out: {problem}; "
            f"{lost} of {self.num_tokens} tokens are lost"
        )

    def _is_lost(self, number: int) -> bool:
        """Whether a shard is left out; of one that came too late for `verify`, the files are read now."""
        if self._max_damaged_share is None or number in self._damaged or not self._growing:
            return number in self._damaged
        for name, sha256 in _files(self._shards[number]):
            if name not in self._verified and not name.endswith(".idx"):
                if self._sha256(name) != sha256:
                    self._lose(number, f"the sha256 of {name} is not the one in {INDEX_FILE}")
                    return True
                self._verified.add(name)
        return False

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The shards that hold the tokens from `start` up to `stop`, each with the first of these and the end."""
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            end = min(stop, self._starts[number + 1])
            yield number, start, end
            start, number = end, number + 1

    def _read(self, start: int, stop: int, *, suffix: str, dtype: np.dtype[Any], lost: int) -> npt.NDArray[Any]:
        """The values of a range, of which those in lost shards are `lost`."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise ShardError(
                f"Tokens {start} to {stop} were asked for; expected a range within 0 to {self.num_tokens}."
            )
        parts = []
        for number, begin, end in self._parts(start, stop):
            if self._is_lost(number):
                parts.append(np.full(end - begin, lost, dtype=dtype))
            else:
                first = self._starts[number]
                parts.append(self._map(number, suffix, dtype)[begin - first : end - first])
        if not parts:
            return np.empty(0, dtype=dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _map(self, number: int, suffix: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        if (view := self._maps.get((number, suffix))) is not None:
            return view
        shard = self._shards[number]
        if shard["evicted"]:
            raise ShardError(
                f"{shard['name']} of {self.directory} was deleted to keep data.disk_budget; a run that needs it again cannot go on: "
                "start a new run with a larger budget."
            )
        name = f"{shard['name']}{suffix}"
        self._require_intact(number, name)
        view = np.memmap(self.directory / name, dtype=dtype, mode="r")
        self._maps[number, suffix] = view
        return view

    def _require_intact(self, number: int, name: str) -> None:
        """Check a file at its first use, where it came too late for `verify`."""
        if self._growing and name not in self._verified:
            if self._sha256(name) != dict(_files(self._shards[number]))[name]:
                raise ShardError(
                    f"{self.directory / name} is damaged: its sha256 is not the one in {INDEX_FILE}; prepare the data anew."
                )
            self._verified.add(name)

    def _sha256(self, name: str) -> str:
        with (self.directory / name).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


def _files(shard: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and sha256 of a shard's files, without those that were evicted."""
    hashes = {".bin": shard["sha256"], ".idx": shard["index_sha256"], ".mask": shard["mask_sha256"]}
    return [
        (f"{shard['name']}{suffix}", sha256)
        for suffix, sha256 in hashes.items()
        if sha256 is not None and (suffix == ".idx" or not shard["evicted"])
    ]


def _wrong_sizes(folder: Path, shard: dict[str, Any], *, token_bytes: int) -> list[tuple[str, str]]:
    """The files that have another size than the index says, and the sentence for each; raises FileNotFoundError for one that is missing."""
    wrong = []
    sizes = {
        ".bin": shard["tokens"] * token_bytes,
        ".idx": (shard["documents"] + 1) * OFFSET_TYPE.itemsize,
        ".mask": shard["tokens"],
    }
    for name, _ in _files(shard):
        file, expected = folder / name, sizes[Path(name).suffix]
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, but {INDEX_FILE} lists it; prepare the data anew.")
        if (found := file.stat().st_size) != expected:
            wrong.append((name, f"{file} has {found} bytes; expected {expected} by {INDEX_FILE}"))
    return wrong


_Version = tuple[int, int, int]


def _version(status: os.stat_result) -> _Version:
    """Tells one replacement of a file from the next."""
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read_index(folder: Path) -> tuple[dict[str, Any], _Version]:
    file = folder / INDEX_FILE
    if not file.is_file():
        inner = [name for name in ("train", "validation") if (folder / name / INDEX_FILE).is_file()]
        hint = f"open {folder / inner[0]}" if inner else "prepare the data first"
        raise FileNotFoundError(f"{file} is missing; expected a directory of token shards, so {hint}.")
    with file.open("rb") as stream:
        version, data = _version(os.fstat(stream.fileno())), stream.read()
    try:
        index = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{file} is not JSON ({error}); prepare the data anew.") from error
    _check_index(index, file=file)
    return index, version


def _check_index(index: object, *, file: Path) -> None:
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ShardError(f"{file} is not an index of token shards; expected the format {FORMAT!r}.")
    if index.get("version") != VERSION:
        raise ShardError(f"{file} has version {index.get('version')!r}; expected {VERSION}, so prepare the data anew.")
    whole = (*_COUNTS, "vocab_size", "eot_id", "pad_id")
    _check_values(index, file=file, whole=whole, hashes=("tokenizer_sha256", "plan_sha256"), flags=("complete",))
    if index.get("kind") not in ("text", "chat", "preference"):
        raise ShardError(f"{file} has {index.get('kind')!r} as 'kind'; expected text, chat or preference.")
    shards = index.get("shards")
    if not isinstance(index.get("source"), str) or not isinstance(shards, list):
        raise ShardError(f"{file} lacks 'source' or 'shards'; prepare the data anew.")
    for shard in shards:
        if not isinstance(shard, dict) or not _NAME.fullmatch(str(shard.get("name"))):
            raise ShardError(f"{file} lists the shard {shard!r}; expected plain names such as 'shard-00000'.")
        hashes = ("sha256", "index_sha256") if index["kind"] == "text" else ("sha256", "index_sha256", "mask_sha256")
        _check_values(shard, file=file, whole=_COUNTS, hashes=hashes, flags=("evicted",))
        shard.setdefault("mask_sha256", None)
    for count in _COUNTS:
        if index[count] != sum(shard[count] for shard in shards):
            raise ShardError(
                f"{file} has {index[count]} as '{count}', not the sum over its shards; prepare the data anew."
            )
    if any(shard["tokens"] == 0 for shard in shards) or max(index["eot_id"], index["pad_id"]) >= index["vocab_size"]:
        raise ShardError(f"{file} lists an empty shard or a token outside the vocabulary; prepare the data anew.")


def _check_values(
    values: dict[str, Any], *, file: Path, whole: tuple[str, ...], hashes: tuple[str, ...], flags: tuple[str, ...]
) -> None:
    for key in whole:
        if type(values.get(key)) is not int or values[key] < 0:
            raise ShardError(f"{file} has {values.get(key)!r} as '{key}'; expected a whole number of at least 0.")
    for key in hashes:
        if not isinstance(values.get(key), str) or not _SHA256.fullmatch(values[key]):
            raise ShardError(f"{file} has {values.get(key)!r} as '{key}'; expected a sha256 of 64 hexadecimal digits.")
    for key in flags:
        if not isinstance(values.get(key), bool):
            raise ShardError(f"{file} has {values.get(key)!r} as '{key}'; expected true or false.")
