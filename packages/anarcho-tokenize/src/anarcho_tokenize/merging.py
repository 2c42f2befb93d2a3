"""The merge of what ranks have recorded: the rows of all blocks, in the order of the sources, go through the preparation of one process.

So duplicates, weights of a mixture, the validation part, limits and the ends of shards fall where they fall for one process, and what it
would have written is written to the byte: only reading, judging and encoding are behind already. Where a rank has stopped before a row
that is needed, because its guess of the others was low, the preparation goes on from the source itself.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from anarcho_tokenize.blocks import Block, ListedFile
from anarcho_tokenize.chunks import RowSource
from anarcho_tokenize.directory import read_state
from anarcho_tokenize.encoded import NotRecordedError
from anarcho_tokenize.errors import ShardError
from anarcho_tokenize.feeds import Catalog, Place
from anarcho_tokenize.files import DataFile
from anarcho_tokenize.production import PreparationReport, Production, finished_report
from anarcho_tokenize.reading import Row
from anarcho_tokenize.segments import read_segment
from anarcho_tokenize.shared_work import RankState, Segment, SharedWork, read_work, remove_shares
from anarcho_tokenize.sources import Examples, start_of


@dataclass(frozen=True, kw_only=True)
class ShareStatus:
    """How far a rank is."""

    rank: int
    has_begun: bool
    is_done: bool
    share: float | None
    """Of its blocks that it has encoded, by bytes as stored; None where their size is unknown."""


def share_statuses(directory: str | os.PathLike[str]) -> list[ShareStatus]:
    """How far each rank is that prepares the directory; none where no ranks do, or where it is merged."""
    work = read_work(Path(directory))
    return [] if work is None else [_status(work, work.state(rank)) for rank in range(work.world)]


def missing_ranks(directory: str | os.PathLike[str]) -> str:
    """Which ranks have not begun or are not done, for people; empty where none is missing."""
    work = read_work(Path(directory))
    return "" if work is None else _missing(work, [work.state(rank) for rank in range(work.world)])


def merge_shares(
    directory: str | os.PathLike[str],
    *,
    max_bad_share: float | None = None,
    on_progress: Callable[[PreparationReport], None] | None = None,
    notify: Callable[[str], None] | None = None,
) -> PreparationReport:
    """Make of what all ranks have done the directory that `prepare_shards` would have made, equal to the byte, and remove their files.

    Needs no more than the directory, save the source where ranks have stopped too early, or where a few texts all fell into training.
    One process merges at a time; killed, the next one goes on. `max_bad_share` replaces that of the ranks' configuration.

    Raises ShardError while ranks are missing, naming them, and whatever `prepare_shards` raises.
    """
    target = Path(directory)
    work = read_work(target)
    if work is None:
        if (state := read_state(target)).get("complete"):
            remove_shares(target)
            return finished_report(state)
        raise ShardError(f"{target} holds nothing to merge; expected the directory of `prepare_shards` with ranks.")
    states = [work.state(rank) for rank in range(work.world)]
    if missing := _missing(work, states):
        raise ShardError(f"{target} cannot be merged yet: {missing}; run what is missing, and merge then.")
    config = work.config if max_bad_share is None else replace(work.config, max_bad_share=max_bad_share)
    recording = _Recording(work, states)

    def recorded(position: dict[str, Any] | None, is_duplicate: Callable[[bytes], bool] | None) -> RowSource:
        position = start_of(work.identities) if position is None else position
        return Examples(config, position=position, is_duplicate=is_duplicate, recording=recording)

    def source(position: dict[str, Any] | None, is_duplicate: Callable[[bytes], bool] | None) -> RowSource:
        position = start_of(work.identities) if position is None else position
        return Examples(config, position=position, is_duplicate=is_duplicate, on_retry=notify)

    seconds = max(state.seconds for state in states)
    with Production(
        target, work.tokenizer, config, open_source=source, recorded=recorded, earlier_seconds=seconds
    ) as production:
        report = production.run(on_progress)
        remove_shares(target)
    return report


class _Recording:
    """The segments of all ranks, by file."""

    def __init__(self, work: SharedWork, states: Sequence[RankState]) -> None:
        self._work = work
        self._segments: dict[tuple[int, int, int], list[tuple[Path, Segment]]] = defaultdict(list)
        for state in states:
            for segment in state.segments:
                file = work.folder(state.rank) / segment.name
                self._segments[segment.source, segment.file, segment.start].append((file, segment))
        self._blocks: dict[tuple[int, int], list[Block]] = defaultdict(list)
        for blocks in work.blocks:
            for block in blocks:
                self._blocks[block.source, block.file].append(block)

    def catalog(self, source: int) -> Callable[[str | None], Catalog]:
        files = [DataFile(one.name, one.form, one.compression, one.size, BytesIO) for one in self._work.files[source]]
        revision, text_field = self._work.identities[source]["revision"], self._work.text_fields[source]
        return lambda _: Catalog(files, revision=revision, text_field=text_field)

    def files(self, source: int) -> Callable[[int, Place], "_RecordedFile"]:
        def opened(file: int, place: Place) -> _RecordedFile:
            blocks = [self._segments.get((source, file, block.start), []) for block in self._blocks[source, file]]
            return _RecordedFile(self._work.files[source][file], blocks, row=place.row)

        return opened


class _RecordedFile:
    """The rows of a file behind the first so many, as ranks have recorded them block by block."""

    def __init__(self, file: ListedFile, blocks: Sequence[list[tuple[Path, Segment]]], *, row: int) -> None:
        """`blocks` are the segments of each block."""
        self._file = file
        self._blocks = blocks
        self._row = row
        self.stored_bytes = 0

    def __iter__(self) -> Iterator[Row]:
        """The rows; raises NotRecordedError where a rank has stopped before the end of its block."""
        before = 0  # lines, which each block has counted from its own start
        for segments in self._blocks:
            for file, segment in segments:
                if segment.offset is not None and before + segment.row <= self._row:
                    continue
                for row, self.stored_bytes in read_segment(file):
                    if row.end is None:
                        yield row
                        return
                    if before + row.number > self._row:
                        yield self._numbered(row, before)
            if not segments or not segments[-1][1].is_last:
                raise NotRecordedError
            before += segments[-1][1].num_lines if self._file.form == ".jsonl" else 0
            self.stored_bytes = segments[-1][1].stored_bytes

    def _numbered(self, row: Row, before: int) -> Row:
        """The row with the number that it has in the file."""
        if not before:
            return row
        number = before + row.number
        return row._replace(number=number, place=row.place and f"{self._file.name}:{number}")


def _status(work: SharedWork, state: RankState) -> ShareStatus:
    sizes = [block.size for blocks in work.blocks for block in blocks if block.rank == state.rank]
    read = sum(segment.counts["stored_bytes"] for segment in state.segments)
    total = sum(size or 0 for size in sizes)
    share = None if None in sizes else min(1.0, read / total) if total else 1.0
    return ShareStatus(rank=state.rank, has_begun=state.has_begun, is_done=state.is_done, share=share)


def _missing(work: SharedWork, states: Sequence[RankState]) -> str:
    """Which ranks are not done, as a part of a sentence; empty where all are."""
    absent = [state.rank for state in states if not state.has_begun]
    parts = [f"{_ranks(absent)} {'has' if len(absent) == 1 else 'have'} not begun"] if absent else []
    for state in states:
        if state.has_begun and not state.is_done:
            share = _status(work, state).share
            parts.append(f"rank {state.rank} is not done" + ("" if share is None else f" ({share:.0%})"))
    return f"of {work.world} ranks, {', '.join(parts)}" if parts else ""


def _ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0, 2-5`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
