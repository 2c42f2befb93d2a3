"""The making of token shards: chunks of rows are encoded and appended, and an interrupted attempt goes on.

Shards are closed only between chunks. Then everything is brought to disk in this order: the shards' files, the quarantine, the hashes of
seen rows, `production.json` with the source's position, and the indexes by which readers see the new shards. So whatever is lost in a
kill is made again from the same position, equal to the byte.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from anarcho_tokenize.chunks import TRAIN, VALIDATION, Chunk, ChunkReader, Counts, RowSource
from anarcho_tokenize.config import DataConfig
from anarcho_tokenize.deduplication import SeenRows
from anarcho_tokenize.directory import (
    LOCK_FILE,
    PARTS,
    QUARANTINE_FILE,
    SEEN_FILE,
    STATE_FILE,
    consumed_tokens,
    plan_of,
    read_state,
    require_own,
    validation_bound,
)
from anarcho_tokenize.durable import json_document, replace_file, sync
from anarcho_tokenize.encoded import EncodedDocument, EncodedRow, NotRecordedError
from anarcho_tokenize.errors import ShardError, SourceError
from anarcho_tokenize.loading import AnyTokenizer
from anarcho_tokenize.rows import Content, Preference, texts_of
from anarcho_tokenize.shard_writer import ShardWriter
from anarcho_tokenize.shards import FORMAT, VERSION
from anarcho_tokenize.sources import BadRow
from anarcho_tokenize.workers import Encoder

_LEAST_ROWS = 1000
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
        tokenizer: AnyTokenizer,
        config: DataConfig,
        *,
        open_source: OpenSource,
        recorded: OpenSource | None = None,
        budget: int | None = None,
        earlier_seconds: float = 0.0,
    ) -> None:
        """`recorded` gives rows that were encoded before, as far as there are such; `earlier_seconds` is how long that took."""
        self._directory = directory
        self._tokenizer = tokenizer
        self._config = config
        self._plan = plan_of(config, tokenizer)
        self._open_source = open_source
        self._recorded = recorded
        self._budget = budget
        self._earlier_seconds = earlier_seconds
        self._validation_bound = validation_bound(config)
        self._reader: ChunkReader | None = None

    def __enter__(self) -> "Production":
        require_own(self._directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._directory / LOCK_FILE)
        with ExitStack() as resources:
            try:
                resources.enter_context(lock.acquire(timeout=_LOCK_SECONDS))
            except Timeout as error:
                raise ShardError(
                    f"{self._directory} is being prepared by another process; wait for it, or choose another directory."
                ) from error
            self._restore(resources)
            self._resources = resources.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def run(self, on_progress: Callable[[PreparationReport], None] | None = None) -> PreparationReport:
        """Read, encode and write to the end; returns at once where that was done before."""
        if self._complete:
            return self.report()
        if self._recorded is not None:
            try:
                self._read(self._recorded, on_progress)
            except NotRecordedError:
                if self._seen is not None:
                    self._seen.rewind(self._num_chunks)
                self._read(self._open_source, on_progress)
        else:
            self._read(self._open_source, on_progress)
        self._check_rate(at_end=True)
        self._check_parts()
        self._complete = True
        self._commit()
        return self.report()

    def _read(self, open_source: OpenSource, on_progress: Callable[[PreparationReport], None] | None) -> None:
        """Read and encode what comes after the chunks so far."""
        source = open_source(self._position, None if self._seen is None else self._is_duplicate)
        self._publish()
        self._reader = ChunkReader(
            source,
            counts=self._counts,
            first=self._num_chunks,
            shard_tokens=self._config.shard_tokens,
            validation_fraction=self._config.validation_fraction,
        )
        num_workers = num_workers_for(self._config, source.progress[1]) if open_source is self._open_source else 0
        with Encoder(self._tokenizer, num_workers=num_workers) as encoder:
            chunks = encoder.encode((chunk, chunk.contents) for chunk in self._reader)
            while not self._has_enough() and (encoded := next(chunks, None)) is not None:
                self._take(*encoded)
                if self._is_due():
                    self._commit()
                if on_progress is not None:
                    on_progress(self.report())

    def report(self) -> PreparationReport:
        """How far it is."""
        return report_of(
            self._counts,
            {count: self._written(count) for count in ("documents", "tokens", "bytes")},
            validation_tokens=self._writers[VALIDATION].num_tokens,
            seconds=self._seconds(),
            progress=self._progress,
        )

    def _restore(self, resources: ExitStack) -> None:
        """Take up the state after the last commit, or that before the first."""
        state = read_state(self._directory, plan=self._plan)
        self._complete: bool = state.get("complete", False)
        self._position: dict[str, Any] | None = state.get("position")
        self._progress: tuple[int, int | None] = tuple(state.get("progress", (0, None)))
        self._num_chunks: int = state.get("chunks", 0)
        self._counts = Counts(**state.get("counts", {}))
        self._earlier_seconds: float = state.get("seconds", self._earlier_seconds)
        self._started = time.monotonic()
        header = self._header()
        self._writers: dict[str, ShardWriter] = {}
        for part in PARTS:
            self._writers[part] = ShardWriter(self._directory / part, header=header, shards=state.get(part, []))
            resources.callback(self._writers[part].discard)
        if state:
            self._publish()
        self._quarantine = _open_quarantine(self._directory, num_bytes=state.get("quarantine_bytes", 0))
        resources.callback(_close, self._quarantine)
        self._seen: SeenRows | None = None
        if self._config.deduplicate and not self._complete:
            self._seen = SeenRows(self._directory / SEEN_FILE, chunks=self._num_chunks)
            resources.callback(self._seen.close)

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

    def _is_duplicate(self, key: bytes) -> bool:
        assert self._seen is not None
        assert self._reader is not None
        return self._seen.add(key, chunk=self._reader.number)

    def _take(self, chunk: Chunk, rows: Sequence[tuple[EncodedDocument, ...]]) -> None:
        """Append a chunk's documents; what holds behind it is what a commit would note now."""
        for content, part, documents in zip(chunk.contents, chunk.parts, rows, strict=True):
            if part == TRAIN or not self._validation_is_full():
                for document, num_bytes in zip(documents, document_bytes(content), strict=True):
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
        sync(self._quarantine.fileno())
        if self._seen is not None:
            self._seen.flush()
        self._write_state()
        self._publish()
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
            **{part: writer.shards for part, writer in self._writers.items()},
        }
        replace_file(self._directory / STATE_FILE, json_document(state))

    def _publish(self) -> None:
        """Let readers see what `production.json` says; only then may tokens go that it says are gone."""
        done = {TRAIN: self._complete, VALIDATION: self._complete or self._validation_is_full()}
        for part, writer in self._writers.items():
            writer.write_index(complete=done[part])
            writer.delete_evicted()

    def _make_room(self, budget: int) -> None:
        """Delete training shards that nobody needs any more, oldest first, or wait until there are such, so that one more shard fits."""
        writer = self._writers[TRAIN]
        most = budget - self._config.shard_tokens * writer.token_bytes
        while (excess := writer.stored_bytes - most) > 0:
            consumed = consumed_tokens(self._directory)
            if writer.evict(excess, before=consumed):
                self._write_state()
                self._publish()
            elif self._is_awaited(consumed):
                return
            else:
                time.sleep(_POLL_SECONDS)

    def _is_awaited(self, consumed: int) -> bool:
        """Whether a reader may need more before it can release anything: the validation part, or the stretch that it shuffles next."""
        needs_validation = self._config.validation_fraction > 0 and self._validation_bound is not None
        if needs_validation and not self._validation_is_full():
            return True
        return self._writers[TRAIN].num_tokens - consumed < 2 * self._config.shuffle_tokens

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


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_workers_for(config: DataConfig, source_bytes: int | None) -> int:
    """Processes that encode a source of so many bytes, or of unknown size; 0 for none beside the reader."""
    if config.num_workers is not None:
        return config.num_workers
    return 0 if source_bytes is not None and source_bytes < _SMALL_SOURCE_BYTES else num_cores()


def report_of(
    counts: Counts,
    written: Mapping[str, int],
    *,
    validation_tokens: int,
    seconds: float,
    progress: tuple[int, int | None],
) -> PreparationReport:
    """The report of what was met in the sources, and written of it: `documents`, `tokens`, `bytes`."""
    dropped = dict(counts.dropped)
    tokens = written["tokens"]
    return PreparationReport(
        rows=counts.rows,
        documents=written["documents"],
        tokens=tokens,
        bytes=written["bytes"],
        bytes_per_token=written["bytes"] / tokens if tokens else 0.0,
        validation_tokens=validation_tokens,
        quarantined=counts.quarantined,
        duplicates=dropped.pop("duplicate", 0),
        filtered=dropped,
        seconds=seconds,
        source_bytes=progress[0],
        source_total_bytes=progress[1],
    )


def finished_report(state: Mapping[str, Any]) -> PreparationReport:
    """The report of a preparation that is complete, by its production.json."""
    shards = [shard for part in PARTS for shard in state[part]]
    return report_of(
        Counts(**state["counts"]),
        {count: sum(shard[count] for shard in shards) for count in ("documents", "tokens", "bytes")},
        validation_tokens=sum(shard["tokens"] for shard in state[VALIDATION]),
        seconds=state["seconds"],
        progress=tuple(state["progress"]),
    )


def document_bytes(content: Content | EncodedRow) -> Sequence[int]:
    """UTF-8 bytes of each document that a row is stored as."""
    if isinstance(content, EncodedRow):
        return content.num_bytes
    if not isinstance(content, Preference):
        return [sum(len(text.encode()) for text in texts_of(content))]
    answers = (content.chosen, content.rejected)
    return [sum(len(text.encode()) for text in texts_of(content.prompt + answer)) for answer in answers]


def _open_quarantine(directory: Path, *, num_bytes: int) -> BinaryIO:
    """The file with so many bytes, at its end. Raises ShardError where it is shorter."""
    file = directory / QUARANTINE_FILE
    stream = file.open("ab")
    if (found := stream.tell()) < num_bytes:
        stream.close()
        raise ShardError(f"{file} has {found} bytes; expected {num_bytes} by {STATE_FILE}, so prepare the data anew.")
    if found > num_bytes:
        stream.truncate(num_bytes)
        stream.seek(num_bytes)
    return stream


def _close(stream: BinaryIO) -> None:
    with suppress(OSError):  # of a full disk: closing writes what is left, which was not committed
        stream.close()
