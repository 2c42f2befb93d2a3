"""The making of token shards: chunks of rows are encoded and appended, and an interrupted attempt goes on.

Shards are closed only between chunks. Then everything is brought to disk in this order: the shards' files, the quarantine, the hashes of
seen rows, `production.json` with the source's position, and the indexes by which readers see the new shards. So whatever is lost in a
kill is made again from the same position, equal to the byte.

A directory of prepared data:

    train/  validation/      token shards, see `shards`
    production.json          plan (what the tokens follow from), position, counts, shards of both parts
    quarantine.jsonl         one object for each row that could not be used: place, reason, excerpt
    seen.sqlite              hashes of the rows so far, with data.deduplicate
    consumed.json            where a reader notes what it does not need any more, see `release`
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from anarcho_tokenize.bpe import Tokenizer
from anarcho_tokenize.chunks import TRAIN, VALIDATION, Chunk, ChunkReader, Counts, RowSource
from anarcho_tokenize.config import DataConfig
from anarcho_tokenize.deduplication import SeenRows
from anarcho_tokenize.durable import replace_file
from anarcho_tokenize.errors import ShardError, SourceError
from anarcho_tokenize.rows import Content, Preference, texts_of
from anarcho_tokenize.shard_writer import ShardWriter
from anarcho_tokenize.shards import FORMAT, VERSION
from anarcho_tokenize.sources import BadRow
from anarcho_tokenize.workers import EncodedDocument, Encoder

PARTS = (TRAIN, VALIDATION)
STATE_FILE = "production.json"
QUARANTINE_FILE = "quarantine.jsonl"
SEEN_FILE = "seen.sqlite"
CONSUMED_FILE = "consumed.json"
LOCK_FILE = ".lock"
_LEAST_ROWS = 1000
_STREAMED_VALIDATION_TOKENS = 2**18
_SMALL_SOURCE_BYTES = 8 * 2**20
_LOCK_SECONDS = 10
_POLL_SECONDS = 0.05

OpenSource = Callable[[dict[str, Any] | None, Callable[[bytes], bool] | None], RowSource]
"""(position, is_duplicate) -> the rows behind the position."""


@dataclass(frozen=True, kw_only=True)
class PreparationReport:
    """How far a preparation is, or how it ended; counts are over all attempts."""

    rows: int
    """Rows read."""
    documents: int
    """Documents written, those of validation included; a preference counts two."""
    tokens: int
    """Their tokens."""
    bytes: int
    """Their UTF-8 bytes."""
    bytes_per_token: float
    """Bytes of text for each token; 0 where there are none."""
    validation_tokens: int
    """Tokens of these that are kept from training."""
    quarantined: int
    """Rows that could not be used; quarantine.jsonl tells why."""
    duplicates: int
    """Rows left out because they were seen before."""
    filtered: dict[str, int]
    """Rows left out, by filter."""
    seconds: float
    """Wall time of all attempts."""
    source_bytes: int
    """Bytes of the source read so far, as they are stored."""
    source_total_bytes: int | None
    """Bytes of the whole source; None where that is not known."""


class Production:
    """One attempt at preparing a directory; a context manager that holds its lock."""

    def __init__(
        self,
        directory: Path,
        tokenizer: Tokenizer,
        config: DataConfig,
        *,
        open_source: OpenSource,
        budget: int | None = None,
    ) -> None:
        self._directory = directory
        self._tokenizer = tokenizer
        self._config = config
        self._plan = plan_of(config, tokenizer)
        self._open_source = open_source
        self._budget = budget
        self._validation_bound = validation_bound(config)
        self._reader: ChunkReader | None = None

    def __enter__(self) -> "Production":
        _require_own_directory(self._directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self._directory / LOCK_FILE)
        try:
            self._lock.acquire(timeout=_LOCK_SECONDS)
        except Timeout as error:
            raise ShardError(
                f"{self._directory} is being prepared by another process; wait for it, or choose another directory."
            ) from error
        try:
            self._restore()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers.values():
            writer.discard()
        self._quarantine.close()
        if self._seen is not None:
            self._seen.close()
        self._lock.release()

    def run(self, on_progress: Callable[[PreparationReport], None] | None = None) -> PreparationReport:
        """Read, encode and write to the end; returns at once where that was done before."""
        if self._complete:
            return self.report()
        source = self._open_source(self._position, None if self._seen is None else self._is_duplicate)
        self._write_indexes()
        self._reader = ChunkReader(
            source,
            counts=self._counts,
            first=self._num_chunks,
            shard_tokens=self._config.shard_tokens,
            validation_fraction=self._config.validation_fraction,
        )
        with Encoder(self._tokenizer, num_workers=self._num_workers(source)) as encoder:
            for chunk, documents in encoder.encode((chunk, chunk.contents) for chunk in self._reader):
                self._take(chunk, documents)
                if self._is_due():
                    self._commit()
                if on_progress is not None:
                    on_progress(self.report())
                if self._has_enough():
                    break
        self._check_rate(at_end=True)
        self._check_parts()
        self._complete = True
        self._commit()
        return self.report()

    def report(self) -> PreparationReport:
        """How far it is."""
        dropped = dict(self._counts.dropped)
        tokens, num_bytes = self._written("tokens"), self._written("bytes")
        return PreparationReport(
            rows=self._counts.rows,
            documents=self._written("documents"),
            tokens=tokens,
            bytes=num_bytes,
            bytes_per_token=num_bytes / tokens if tokens else 0.0,
            validation_tokens=self._writers[VALIDATION].num_tokens,
            quarantined=self._counts.quarantined,
            duplicates=dropped.pop("duplicate", 0),
            filtered=dropped,
            seconds=self._seconds(),
            source_bytes=self._progress[0],
            source_total_bytes=self._progress[1],
        )

    def _restore(self) -> None:
        """Take up the state after the last commit, or that before the first."""
        file = self._directory / STATE_FILE
        state = _read_state(file, plan=self._plan) if file.exists() else {}
        self._complete: bool = state.get("complete", False)
        self._position: dict[str, Any] | None = state.get("position")
        self._progress: tuple[int, int | None] = tuple(state.get("progress", (0, None)))
        self._num_chunks: int = state.get("chunks", 0)
        self._counts = Counts(**state.get("counts", {}))
        self._earlier_seconds: float = state.get("seconds", 0.0)
        self._started = time.monotonic()
        header = self._header()
        parts = state.get("parts", {})
        self._writers = {part: ShardWriter(self._directory / part, header=header, shards=parts.get(part, [])) for part in PARTS}
        self._quarantine = (self._directory / QUARANTINE_FILE).open("ab")
        self._quarantine.truncate(state.get("quarantine_bytes", 0))
        self._seen: SeenRows | None = None
        if self._config.deduplicate and not self._complete:
            self._seen = SeenRows(self._directory / SEEN_FILE, chunks=self._num_chunks)

    def _header(self) -> dict[str, Any]:
        """What the indexes say about all shards alike."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "kind": self._config.kind,
            "tokenizer_sha256": self._tokenizer.sha256,
            "vocab_size": self._tokenizer.vocab_size,
            "eot_id": self._tokenizer.eot_id,
            "pad_id": self._tokenizer.pad_id,
            "source": self._config.name,
            "plan_sha256": hashlib.sha256(json.dumps(self._plan, sort_keys=True).encode()).hexdigest(),
        }

    def _num_workers(self, source: RowSource) -> int:
        if self._config.num_workers is not None:
            return self._config.num_workers
        total = source.progress[1]
        return 0 if total is not None and total < _SMALL_SOURCE_BYTES else num_cores()

    def _is_duplicate(self, key: bytes) -> bool:
        assert self._seen is not None
        assert self._reader is not None
        return self._seen.add(key, chunk=self._reader.number)

    def _take(self, chunk: Chunk, rows: list[tuple[EncodedDocument, ...]]) -> None:
        """Append a chunk's documents; what holds behind it is what a commit would note now."""
        for content, part, documents in zip(chunk.contents, chunk.parts, rows, strict=True):
            if part == TRAIN or not self._validation_is_full():
                for document, num_bytes in zip(documents, _document_bytes(content), strict=True):
                    self._writers[part].add(document.ids, document.mask, num_bytes=num_bytes)
        for bad in chunk.bad:
            self._quarantine.write((json.dumps(asdict(bad), ensure_ascii=True) + "\n").encode())
        self._position, self._progress, self._counts = chunk.position, chunk.progress, chunk.counts
        self._num_chunks = chunk.number + 1
        self._check_rate(at_end=False)

    def _validation_is_full(self) -> bool:
        bound = self._validation_bound
        return bound is not None and self._writers[VALIDATION].num_tokens >= bound

    def _has_enough(self) -> bool:
        most = self._config.max_tokens
        return most is not None and self._writers[TRAIN].num_tokens >= most

    def _is_due(self) -> bool:
        pending = {part: writer.pending_tokens for part, writer in self._writers.items()}
        validation_done = pending[VALIDATION] > 0 and self._validation_is_full()
        return validation_done or max(pending.values()) >= self._config.shard_tokens

    def _commit(self) -> None:
        for writer in self._writers.values():
            writer.close_shard()
        self._quarantine.flush()
        os.fsync(self._quarantine.fileno())
        if self._seen is not None:
            self._seen.flush()
        self._write_state()
        self._write_indexes()
        if not self._complete and self._budget is not None:
            self._make_room(self._budget)

    def _write_state(self) -> None:
        state = {
            "format": "anarcho-production",
            "version": VERSION,
            "plan": self._plan,
            "complete": self._complete,
            "position": self._position,
            "progress": self._progress,
            "chunks": self._num_chunks,
            "counts": vars(self._counts),
            "seconds": self._seconds(),
            "quarantine_bytes": self._quarantine.tell(),
            "parts": {part: writer.shards for part, writer in self._writers.items()},
        }
        replace_file(self._directory / STATE_FILE, (json.dumps(state, indent=1) + "\n").encode())

    def _write_indexes(self) -> None:
        done = {TRAIN: self._complete, VALIDATION: self._complete or self._validation_is_full()}
        for part, writer in self._writers.items():
            writer.write_index(complete=done[part])

    def _make_room(self, budget: int) -> None:
        """Delete training shards that nobody needs any more, oldest first, or wait until there are such, so that one more shard fits."""
        writer = self._writers[TRAIN]
        excess = sum(map(writer.shard_bytes, range(len(writer.shards)))) - budget
        excess += self._config.shard_tokens * writer.token_bytes
        while excess > 0:
            consumed, end = _consumed_tokens(self._directory), 0
            for number, shard in enumerate(writer.shards):
                end += shard["tokens"]
                if excess > 0 and not shard["evicted"] and end <= consumed:
                    excess -= writer.shard_bytes(number)
                    shard["evicted"] = True
            self._write_state()
            self._write_indexes()
            writer.delete_evicted()
            if excess > 0:
                time.sleep(_POLL_SECONDS)

    def _check_rate(self, *, at_end: bool) -> None:
        counts, most = self._counts, self._config.max_bad_share
        enough = at_end or counts.rows >= _LEAST_ROWS
        if not enough or not counts.quarantined or counts.quarantined <= most * counts.rows:
            return
        self._quarantine.flush()
        with (self._directory / QUARANTINE_FILE).open("rb") as stream:
            first = BadRow(**json.loads(stream.readline()))
        raise SourceError(
            f"{counts.quarantined} of {counts.rows} rows of {self._config.name} cannot be used, more than the share of {most} that "
            f"data.max_bad_share allows; the first: {first}"
        )

    def _check_parts(self) -> None:
        tokens = {part: writer.num_tokens for part, writer in self._writers.items()}
        if not any(tokens.values()):
            left_out = sum(self._counts.dropped.values())
            hint = f" (filters left out {left_out} rows)" if left_out else ""
            raise ShardError(f"{self._config.name} holds no document{hint}; expected at least one that is not empty.")
        if not tokens[TRAIN] or (not tokens[VALIDATION] and self._config.validation_fraction):
            empty = VALIDATION if tokens[TRAIN] else TRAIN
            raise ShardError(
                f"None of the {self._written('documents')} documents fell into {empty} with data.validation_fraction "
                f"{self._config.validation_fraction}; give more documents (data.document_separator splits a .txt file), or set "
                "data.validation_fraction to 0 to train on all of them."
            )

    def _written(self, count: str) -> int:
        return sum(writer.total(count) for writer in self._writers.values())

    def _seconds(self) -> float:
        return self._earlier_seconds + time.monotonic() - self._started


def plan_of(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the tokens follow from, as JSON: preparations with equal plans write equal shards."""
    names = ("mixture_end", "kind", "deduplicate", "max_document_bytes", "max_tokens", "validation_fraction")
    values = {name: getattr(config, name) for name in (*names, "shard_tokens")}
    sources = [asdict(source) | {"languages": list(source.languages)} for source in config.mixture]
    bound = {"validation_tokens": validation_bound(config)}
    return {"sources": sources, **values, **bound, "tokenizer_sha256": tokenizer.sha256}


def validation_bound(config: DataConfig) -> int | None:
    """Tokens at which the validation part is full; None where it never is."""
    if config.validation_tokens is None and config.streams:
        return _STREAMED_VALIDATION_TOKENS
    return config.validation_tokens


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _document_bytes(content: Content) -> list[int]:
    """UTF-8 bytes of each document that a row is stored as."""
    if not isinstance(content, Preference):
        return [sum(len(text.encode()) for text in texts_of(content))]
    answers = (content.chosen, content.rejected)
    return [sum(len(text.encode()) for text in texts_of(content.prompt + answer)) for answer in answers]


def _consumed_tokens(directory: Path) -> int:
    file = directory / CONSUMED_FILE
    return int(json.loads(file.read_bytes())["tokens"]) if file.exists() else 0


def _require_own_directory(directory: Path) -> None:
    """A new or empty directory, or one that a preparation has begun."""
    if not directory.exists() or (directory.is_dir() and (directory / STATE_FILE).is_file()):
        return
    own = {
        LOCK_FILE,
        QUARANTINE_FILE,
        SEEN_FILE,
        f"{SEEN_FILE}-wal",
        f"{SEEN_FILE}-shm",
        f"{STATE_FILE}.partial",
        *PARTS,
    }
    if not directory.is_dir() or {entry.name for entry in directory.iterdir()} - own:
        raise ShardError(f"{directory} already exists and holds no prepared data; remove it or choose another one.")


def _read_state(file: Path, *, plan: dict[str, Any]) -> dict[str, Any]:
    try:
        state = json.loads(file.read_bytes())
        version, begun = state["version"], state["plan"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{file} is damaged ({error!r}); remove {file.parent} and prepare the data anew.") from error
    if version != VERSION:
        raise ShardError(f"{file} has version {version!r}; expected {VERSION}, so prepare the data anew.")
    if begun != plan:
        keys = ", ".join(key for key in plan if begun.get(key) != plan[key])
        raise ShardError(
            f"{file.parent} was begun with other values of {keys}; go on with those, or prepare into a new directory."
        )
    return state
