"""How several ranks share the reading of sources: files are divided into blocks, and each block is one rank's.

A block is a stretch of about 32 MiB of JSON lines, of a table or of the embedded corpus, and any other file as a whole: where a row starts
in compressed text, or behind separators, is only known by reading up to there. Files that come through the network stay whole, too.
JSON lines are divided as Hadoop's TextInputFormat divides them: a line belongs to the block that holds its first byte.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from anarcho_tokenize.files import EMBEDDED, DataFile, FileReader, Form, embedded_between
from anarcho_tokenize.lines import line_start
from anarcho_tokenize.reading import Reading
from anarcho_tokenize.tables import rows_between

LARGEST_BLOCK = 2**25
SMALLEST_BLOCK = 2**18
_BLOCKS_PER_RANK = 16
_DIVISIBLE: tuple[Form, ...] = (".jsonl", ".parquet", EMBEDDED)


@dataclass(frozen=True, slots=True)
class ListedFile:
    """What is known of a file without opening it."""

    name: str
    form: Form
    compression: str
    size: int | None
    """Bytes as stored, None where unknown."""
    is_remote: bool


@dataclass(frozen=True, slots=True)
class Block:
    """A stretch of a file, from byte `start` up to `stop`, or to its end."""

    source: int
    file: int
    start: int
    stop: int | None
    size: int | None
    """Bytes as stored, None where unknown."""
    rank: int
    """Whose it is."""
    counts_anew: bool
    """Whether its rows are numbered from its own start, since nobody has counted the lines before it."""


def divide(sources: Sequence[Sequence[ListedFile]], *, world: int) -> list[list[Block]]:
    """The blocks of each source, in order; each goes to the rank that has had the fewest bytes so far."""
    total = sum(file.size or 0 for files in sources for file in files)
    step = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, total // (_BLOCKS_PER_RANK * world)))
    loads = [(0, rank) for rank in range(world)]
    divided: list[list[Block]] = []
    for source, files in enumerate(sources):
        divided.append([])
        for number, file in enumerate(files):
            for start, stop in _stretches(file, step):
                size = file.size if stop is None else stop - start
                load, rank = loads[0]
                heapq.heapreplace(loads, (load + max(1, size or 0), rank))
                counts_anew = file.form == ".jsonl" and start > 0
                divided[-1].append(Block(source, number, start, stop, size, rank, counts_anew))
    return divided


def open_block(
    file: DataFile, reading: Reading, block: Block, *, row: int | None = None, offset: int = 0
) -> FileReader:
    """The rows of a block; or with `row` those after the row of this number, behind which the byte `offset` is."""
    if block.stop is None:
        return FileReader(file, reading, row=row or 0, offset=offset)
    if file.form == ".jsonl":
        if row is None:
            with file.open() as stream:
                offset = line_start(stream, block.start)
        return FileReader(file, reading, row=row or 0, offset=offset, stop_offset=block.stop)
    if file.form == EMBEDDED:
        first, last = embedded_between(block.start, block.stop)
    else:
        with file.open() as stream:
            first, last = rows_between(stream, block.start, block.stop)
    return FileReader(file, reading, row=max(first, row or 0), stop_row=last)


def _stretches(file: ListedFile, step: int) -> Iterator[tuple[int, int | None]]:
    is_whole = file.form not in _DIVISIBLE or bool(file.compression) or file.is_remote
    if is_whole or file.size is None or file.size <= step:
        yield 0, None
        return
    for start in range(0, file.size, step):
        yield start, min(file.size, start + step)
