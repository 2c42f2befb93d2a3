"""One rank's share of a preparation: its blocks of the sources, judged, encoded and recorded for the merge.

Ranks may run at any time, in any order and on any machine that sees the directory; a rank that was killed goes on behind its last segment.
What depends on the rows of other ranks (duplicates, the order of a mixture, where shards end) is left to the merge, which so writes what
one process would have written. Whatever a rank guesses about the others decides only how much it encodes, see `forecast`.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from anarcho_tokenize.blocks import Block, BlockReaders
from anarcho_tokenize.chunks import CHUNK_BYTES, CHUNK_ROWS, Counts, is_validation
from anarcho_tokenize.config import DataConfig
from anarcho_tokenize.directory import LOCK_FILE, plan_of, read_state, require_own
from anarcho_tokenize.encoded import EncodedDocument, EncodedRow
from anarcho_tokenize.errors import ShardError
from anarcho_tokenize.feeds import Feed
from anarcho_tokenize.files import FileReader
from anarcho_tokenize.forecast import Forecast
from anarcho_tokenize.judging import Judged, Taken, Verdict, judge
from anarcho_tokenize.loading import AnyTokenizer
from anarcho_tokenize.production import (
    PreparationReport,
    document_bytes,
    finished_report,
    num_workers_for,
    report_of,
)
from anarcho_tokenize.reading import Fault, Row
from anarcho_tokenize.rows import Content
from anarcho_tokenize.segments import SegmentWriter
from anarcho_tokenize.shared_work import RankState, Segment, SharedWork, agree, read_work
from anarcho_tokenize.sources import check_source, open_feed
from anarcho_tokenize.workers import Encoder

_SEGMENT_TOKENS = 2**22
_LOCK_SECONDS = 10
_FILTERED = "filtered by "


def prepare_share(
    config: DataConfig,
    tokenizer: AnyTokenizer,
    directory: str | os.PathLike[str],
    *,
    rank: int,
    world: int,
    on_progress: Callable[[PreparationReport], None] | None = None,
    notify: Callable[[str], None] | None = None,
) -> PreparationReport:
    """Do the part of rank `rank`, from 0, of `world` that prepare `directory` together, or go on with it; `merge_shares` is the last step.

    Ranks need nothing but the directory in common, may run side by side or one after the other, and are refused where they were given
    other data, another tokenizer or another `world`. The report counts what this rank has read; it reads nothing where the directory is
    merged already. `on_progress` and `notify` are as for `prepare_shards`.

    Raises FileNotFoundError or SourceError for a source that cannot be read, NetworkError where the network stays away, ShardError for a
    directory that holds something else, was begun otherwise, or in which another process is this rank.
    """
    if world < 1 or not 0 <= rank < world:
        expected = f"a number from 0 to {world - 1}" if world > 0 else "a world of at least 1"
        raise ShardError(f"The rank is {rank} of {world}; expected {expected}.")
    target = Path(directory)
    plan = plan_of(config, tokenizer)
    require_own(target)
    work = read_work(target)
    state = read_state(target, plan=plan)
    if state.get("complete") and work is None:
        return finished_report(state)
    if work is None and state:
        raise ShardError(f"{target} was begun by one process; go on without a rank, or prepare into a new directory.")
    if work is None:
        check_source(config)  # a source that is not there leaves no directory behind
    feeds = [open_feed(config, number, on_retry=notify) for number in range(len(config.mixture))]
    work = agree(target, config, tokenizer, plan=plan, world=world, feeds=feeds)
    with _Share(work, feeds, config, tokenizer, rank=rank) as share:
        return share.run(on_progress)


@dataclass(slots=True)
class _Chunk:
    """Some rows of a block."""

    block: Block
    rows: list[tuple[Row, Verdict, int]] = field(default_factory=list)
    """With the bytes of the file read up to there."""
    contents: list[Content] = field(default_factory=list)
    num_bytes: int = 0
    is_last: bool = False
    """Whether it ends the block."""
    num_lines: int = 0
    stored_bytes: int = 0
    """Bytes of the file read up to its end, as stored."""
    block_bytes: int = 0
    """How much of the block's size is before its first row; once it is sealed, before its end."""
    read_bytes: int = 0
    """How much of the block's size it has."""

    def add(self, row: Row, verdict: Verdict, stored_bytes: int) -> None:
        """Append a row, of which its value is needed no more."""
        self.rows.append((row._replace(value=""), verdict, stored_bytes))
        if isinstance(verdict, Taken):
            assert not isinstance(verdict.content, EncodedRow), "nothing was recorded"
            self.contents.append(verdict.content)
            self.num_bytes += verdict.num_bytes

    @property
    def place(self) -> tuple[int, int | None] | None:
        """Number of the last row and the byte behind it; None where there is no row."""
        return (self.rows[-1][0].number, self.rows[-1][0].end) if self.rows else None

    @property
    def is_full(self) -> bool:
        return self.num_bytes >= CHUNK_BYTES or len(self.rows) >= CHUNK_ROWS


class _Share:
    """One attempt at a rank's part; a context manager that holds the rank's lock."""

    def __init__(
        self, work: SharedWork, feeds: Sequence[Feed], config: DataConfig, tokenizer: AnyTokenizer, *, rank: int
    ) -> None:
        self._work = work
        self._feeds = feeds
        self._config = config
        self._tokenizer = tokenizer
        self._rank = rank
        self._folder = work.folder(rank)
        self._started = time.monotonic()

    def __enter__(self) -> "_Share":
        self._folder.mkdir(exist_ok=True)
        with ExitStack() as resources:
            try:
                resources.enter_context(FileLock(self._folder / LOCK_FILE).acquire(timeout=_LOCK_SECONDS))
            except Timeout as error:
                raise ShardError(
                    f"Rank {self._rank} of {self._work.directory} is running in another process; wait for it, or start another rank."
                ) from error
            self._restore()
            self._readers = BlockReaders()
            resources.callback(self._readers.close)
            self._resources = resources.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def run(self, on_progress: Callable[[PreparationReport], None] | None) -> PreparationReport:
        """Read and encode to the end; returns at once where that was done before."""
        if self._state.is_done:
            return self._report()
        with Encoder(self._tokenizer, num_workers=num_workers_for(self._config, self._share_bytes())) as encoder:
            chunk = None
            for chunk, rows in encoder.encode((chunk, chunk.contents) for chunk in self._chunks()):
                self._take(chunk, rows)
                if chunk.is_last or self._writer.num_tokens >= _SEGMENT_TOKENS:
                    self._commit(chunk)
                if on_progress is not None:
                    on_progress(self._report())
            if chunk is not None and self._writer.num_rows:
                self._commit(chunk)
        self._note(self._state.segments, is_done=True)
        return self._report()

    def _restore(self) -> None:
        """Take up the state after the last segment."""
        self._state = self._work.state(self._rank)
        listed = {segment.name for segment in self._state.segments}
        for file in self._folder.glob("segment-*"):
            if file.name not in listed:
                file.unlink()
        self._forecast = Forecast(self._config, self._work.blocks, rank=self._rank)
        self._blocks = {
            (block.source, block.file, block.start): block for blocks in self._work.blocks for block in blocks
        }
        self._counts: Counter[str] = Counter()
        for segment in self._state.segments:
            counts, block = Counter(segment.counts), self._blocks[segment.source, segment.file, segment.start]
            taken_bytes = counts["taken_bytes"]
            self._counts.update(counts)
            self._forecast.begin(block)
            self._forecast.read(segment.source, taken_bytes=taken_bytes, stored_bytes=counts["stored_bytes"])
            self._forecast.encoded(segment.source, taken_bytes=taken_bytes, train_tokens=counts["train_tokens"])
            if segment.is_last:
                self._forecast.end(block)
        self._begin_segment()

    def _begin_segment(self) -> None:
        self._writer = SegmentWriter(vocab_size=self._tokenizer.vocab_size)
        self._segment_counts = Counter[str]()

    def _chunks(self) -> Iterator[_Chunk]:
        """What is to be encoded, block by block; the place to go on from is behind the last segment."""
        last = self._state.segments[-1] if self._state.segments else None
        if last is not None and not last.is_last:
            yield from self._read(self._blocks[last.source, last.file, last.start], last)
        while (block := self._forecast.next_block()) is not None:
            yield from self._read(block, None)

    def _read(self, block: Block, last: Segment | None) -> Iterator[_Chunk]:
        """The chunks of a block, behind the segment `last` of it; not all of them where there is enough before its end."""
        feed = self._feeds[block.source]
        place = {} if last is None else {"row": last.row, "offset": last.offset or 0}
        reader = self._readers.open(feed.files[block.file], feed.reading(), block, **place)
        done = 0 if last is None else last.block_bytes
        chunk = _Chunk(block, block_bytes=done)
        for row in reader:
            assert not isinstance(row.value, Judged), "nothing was recorded"
            verdict = judge(self._config, feed.source, row.value, text_field=feed.text_field)
            chunk.add(row, verdict, reader.stored_bytes)
            if row.end is None:
                break
            if chunk.is_full:
                yield self._seal(chunk, reader)
                if self._forecast.is_enough():
                    return
                chunk = _Chunk(block, block_bytes=chunk.block_bytes)
        chunk.is_last = True
        self._seal(chunk, reader)
        self._forecast.end(block)
        yield chunk

    def _seal(self, chunk: _Chunk, reader: FileReader) -> _Chunk:
        """Note where reading is behind the last row."""
        block, before = chunk.block, chunk.block_bytes
        chunk.stored_bytes, chunk.num_lines = reader.stored_bytes, reader.num_lines
        if chunk.is_last and block.size is not None:
            chunk.block_bytes = block.size
        elif chunk.place is not None:
            file, offset = self._work.files[block.source][block.file], chunk.place[1] or 0
            chunk.block_bytes = max(before, block.bytes_read(file, offset=offset, stored_bytes=chunk.stored_bytes))
        chunk.read_bytes = chunk.block_bytes - before
        self._forecast.read(block.source, taken_bytes=chunk.num_bytes, stored_bytes=chunk.read_bytes)
        return chunk

    def _take(self, chunk: _Chunk, encoded: Sequence[tuple[EncodedDocument, ...]]) -> None:
        """Append the rows of a chunk to the segment."""
        counts = Counter(stored_bytes=chunk.read_bytes, taken_bytes=chunk.num_bytes, rows=len(chunk.rows))
        contents = iter(zip(chunk.contents, encoded, strict=True))
        for row, verdict, stored_bytes in chunk.rows:
            documents = None
            if isinstance(verdict, Taken):
                content, encoded_documents = next(contents)
                documents = EncodedRow(encoded_documents, tuple(document_bytes(content)))
                num_tokens = sum(len(document.ids) for document in encoded_documents)
                is_held_out = is_validation(verdict.digest, fraction=self._config.validation_fraction)
                counts["validation_tokens" if is_held_out else "train_tokens"] += num_tokens
                counts["documents"] += len(encoded_documents)
                counts["bytes"] += sum(documents.num_bytes)
            elif isinstance(verdict, Fault):
                counts["quarantined"] += 1
            else:
                counts[_FILTERED + verdict] += 1
            self._writer.add(row, verdict, stored_bytes, documents)
        self._forecast.encoded(chunk.block.source, taken_bytes=chunk.num_bytes, train_tokens=counts["train_tokens"])
        self._segment_counts.update(counts)
        self._counts.update(counts)

    def _commit(self, chunk: _Chunk) -> None:
        """Bring the segment to disk, which ends with this chunk."""
        done = self._state.segments
        row, offset = self._writer.place or _place_behind(done[-1] if done else None, chunk.block)
        segment = Segment(
            name=f"segment-{len(done):05d}.npz",
            source=chunk.block.source,
            file=chunk.block.file,
            start=chunk.block.start,
            rows=self._writer.num_rows,
            row=row,
            offset=offset,
            is_last=chunk.is_last,
            num_lines=chunk.num_lines,
            stored_bytes=chunk.stored_bytes,
            block_bytes=chunk.block_bytes,
            counts=dict(self._segment_counts),
        )
        self._writer.write(self._folder / segment.name)
        self._note((*done, segment), is_done=False)
        self._begin_segment()

    def _note(self, segments: tuple[Segment, ...], *, is_done: bool) -> None:
        seconds = self._state.seconds + time.monotonic() - self._started
        self._started = time.monotonic()
        self._state = RankState(rank=self._rank, has_begun=True, is_done=is_done, seconds=seconds, segments=segments)
        self._work.write_state(self._state)

    def _share_bytes(self) -> int | None:
        """Bytes of this rank's blocks, as stored; None where unknown."""
        sizes = [block.size for block in self._blocks.values() if block.rank == self._rank]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def _report(self) -> PreparationReport:
        counts = self._counts
        dropped = {name.removeprefix(_FILTERED): count for name, count in counts.items() if name.startswith(_FILTERED)}
        return report_of(
            Counts(rows=counts["rows"], quarantined=counts["quarantined"], dropped=dropped),
            {
                "documents": counts["documents"],
                "tokens": counts["train_tokens"] + counts["validation_tokens"],
                "bytes": counts["bytes"],
            },
            validation_tokens=counts["validation_tokens"],
            seconds=self._state.seconds + time.monotonic() - self._started,
            progress=(counts["stored_bytes"], self._share_bytes()),
        )


def _place_behind(segment: Segment | None, block: Block) -> tuple[int, int | None]:
    """The place behind the last segment, if it is of this block; that before any row otherwise."""
    if segment is None or (segment.source, segment.file, segment.start) != (block.source, block.file, block.start):
        return 0, 0
    return segment.row, segment.offset
