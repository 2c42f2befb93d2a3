"""How several ranks share the reading of sources: files are divided into blocks, and each block is one rank's.

A block is a stretch of JSON lines, of a table or of the embedded corpus, and any other file as a whole. Stretches of JSON lines are those
of Hadoop's TextInputFormat: a line belongs to the block that holds its first byte. Where lines are compressed and files are few, each rank
unpacks all of a file, which takes a twentieth of the time of encoding it or less, and goes past the blocks of others; how long the file is
unpacked need not be known, since blocks behind its end are empty. Files that come through the network stay whole.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from anarcho_tokenize.files import EMBEDDED, DataFile, FileReader, Form, UnpackedFile
from anarcho_tokenize.reading import Reading
from anarcho_tokenize.tables import rows_between

LARGEST_BLOCK = 2**25
SMALLEST_BLOCK = 2**18
_BLOCKS_PER_RANK = 16
_DIVISIBLE: tuple[Form, ...] = (".jsonl", ".parquet", EMBEDDED)
_TYPICALLY_UNPACKED = 3
MOST_UNPACKED = 8
"""Bytes of text for a compressed byte, as a rule at most; the last block of a file has what is beyond."""
_UNPACKING_SHARE = 0.05


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
    """A stretch of a file."""

    source: int
    file: int
    start: int
    """Byte of the file at which it starts; of the unpacked file, where that is compressed JSON lines."""
    stop: int | None
    """Byte at which the next one starts; None where it goes to the end."""
    size: int | None
    """Bytes as stored, None where unknown; a share of the file's where that is compressed."""
    is_stretch: bool
    """Whether it is not all of the file."""
    rank: int
    """Whose it is."""

    def bytes_read(self, file: ListedFile, *, offset: int, stored_bytes: int) -> int:
        """How much of `size` lies before a place: the byte `offset`, up to which so many stored bytes were read."""
        done = stored_bytes - self.start
        if file.compression and self.is_stretch:
            done = (offset - self.start) // MOST_UNPACKED
        return max(0, done if self.size is None else min(done, self.size))


def divide(sources: Sequence[Sequence[ListedFile]], *, world: int) -> list[list[Block]]:
    """The blocks of each source, in order; each goes to the rank that has had the fewest bytes so far."""
    total = sum(file.size or 0 for files in sources for file in files)
    step = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, total // (_BLOCKS_PER_RANK * world)))
    loads = [(0, rank) for rank in range(world)]
    divided: list[list[Block]] = []
    for source, files in enumerate(sources):
        divided.append([])
        unpacks = _is_worth_unpacking(files, world=world)
        for number, file in enumerate(files):
            stretches = list(_stretches(file, step, world=world, unpacks=unpacks))
            for start, stop, size in stretches:
                load, rank = loads[0]
                heapq.heapreplace(loads, (load + max(1, size or 0), rank))
                divided[-1].append(Block(source, number, start, stop, size, len(stretches) > 1, rank))
    return divided


class BlockReaders:
    """Opens blocks; those of a compressed file in their order, so that it is unpacked once."""

    def __init__(self) -> None:
        self._unpacked: tuple[DataFile, UnpackedFile] | None = None

    def open(
        self, file: DataFile, reading: Reading, block: Block, *, row: int | None = None, offset: int = 0
    ) -> FileReader:
        """The rows of a block; or with `row` those after the row of this number, behind which the byte `offset` is."""
        if not block.is_stretch:
            return FileReader(file, reading, row=row or 0, offset=offset)
        if file.form in (".jsonl", EMBEDDED):
            unpacked = self._unpacked_file(file) if file.compression else None
            stretch = (block.start, block.stop)
            return FileReader(file, reading, row=row or 0, offset=offset, stretch=stretch, unpacked=unpacked)
        assert block.stop is not None
        with file.open() as stream:
            first, last = rows_between(stream, block.start, block.stop)
        return FileReader(file, reading, row=max(first, row or 0), stop_row=last)

    def close(self) -> None:
        """Close what is open."""
        if self._unpacked is not None:
            self._unpacked[1].close()
        self._unpacked = None

    def _unpacked_file(self, file: DataFile) -> UnpackedFile:
        if self._unpacked is None or self._unpacked[0] is not file:
            self.close()
            self._unpacked = file, UnpackedFile(file)
        return self._unpacked[1]


def _is_worth_unpacking(files: Sequence[ListedFile], *, world: int) -> bool:
    """Whether ranks are sooner done if each unpacks all compressed files, than if each takes some of them."""
    count = sum(1 for file in files if file.compression)
    return count > 0 and -(-count // world) / count > 1 / world + _UNPACKING_SHARE


def _stretches(
    file: ListedFile, step: int, *, world: int, unpacks: bool
) -> Iterator[tuple[int, int | None, int | None]]:
    """Start, end and stored bytes of each block of a file."""
    size = file.size
    if file.form == EMBEDDED and size is not None:
        step = max(step, -(-size // world))  # to find a place in it, all of it is unpacked
    is_whole = file.form not in _DIVISIBLE or file.is_remote or (bool(file.compression) and not unpacks)
    if is_whole or size is None or size <= step:
        yield 0, None, size
        return
    if file.compression:
        end, step = size * MOST_UNPACKED, step * _TYPICALLY_UNPACKED
        for start in range(0, end, step):
            stop = min(end, start + step)
            yield start, None if stop == end else stop, (stop - start) // MOST_UNPACKED
        return
    for start in range(0, size, step):
        yield start, min(size, start + step), min(size, start + step) - start
