"""Which pieces each row holds, and which rows are shuffled together, while shards may still grow.

The rows of an epoch are numbered, and consecutive ones make up a block: all rows, which are known when the shards are complete, or a
stretch of about `shuffle_tokens` tokens, which is known as soon as its tokens are there and is the same whatever comes after it. Blocks are
* of joined documents: windows [b * n, (b + 1) * n) of the stream, n of them making up `shuffle_tokens`;
* of best-fit rows: consecutive whole shards with `shuffle_tokens` tokens or more, which are packed by themselves when they are first
  asked for. Only the sizes of earlier blocks are needed to find a row, and of the tokens none are read.
The last block holds the rest, and is known when the shards are complete.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from anarcho_tokenize.batch import Piece
from anarcho_tokenize.best_fit import cut, pack
from anarcho_tokenize.shards import TokenShards

Packing = Literal["concat", "best-fit"]


class Block(NamedTuple):
    """Consecutive rows that are shuffled together."""

    number: int | None
    """Counted from 0; None where all rows are one block."""
    first_row: int
    num_rows: int


class Layout(Protocol):
    """The rows of an epoch."""

    def block(self, row: int) -> Block | None:
        """The block that holds a row; None where it is not there, yet or at all."""
        ...

    def pieces(self, row: int) -> Sequence[Piece]:
        """What a row that is there holds."""
        ...

    def num_rows(self) -> int | None:
        """Rows of an epoch; None while the shards grow."""
        ...

    def num_targets(self) -> tuple[int, int]:
        """How many tokens the rows that are there hold in all, and how many rows these are."""
        ...

    def first_token(self, row: int) -> int:
        """Tokens before this one are in no row from the block of this row on."""
        ...

    def block_number(self, row: int) -> int | None:
        """The number of the block that holds a row, or that is to be known next; None where all rows are one block."""
        ...


def layout_of(shards: TokenShards, packing: Packing, *, length: int, shuffle_tokens: int | None) -> Layout:
    """The layout of rows of `length` tokens; without `shuffle_tokens`, all rows are one block."""
    if packing == "concat":
        return _Windows(shards, length=length, shuffle_tokens=shuffle_tokens)
    return _BestFit(shards, length=length, shuffle_tokens=shuffle_tokens)


class _Windows:
    """Documents joined and cut into windows: row k holds the tokens [k * length, (k + 1) * length)."""

    def __init__(self, shards: TokenShards, *, length: int, shuffle_tokens: int | None) -> None:
        self._shards = shards
        self._length = length
        self._block_rows = None if shuffle_tokens is None else max(1, shuffle_tokens // length)

    def block(self, row: int) -> Block | None:
        total = self.num_rows()
        if total is not None and row >= total:
            return None
        if self._block_rows is None:
            return Block(None, 0, total) if total else None
        number = row // self._block_rows
        first, end = number * self._block_rows, (number + 1) * self._block_rows
        if total is not None:
            return Block(number, first, min(end, total) - first)
        return Block(number, first, end - first) if end * self._length <= self._shards.num_tokens else None

    def pieces(self, row: int) -> Sequence[Piece]:
        return [(row * self._length, min((row + 1) * self._length, self._shards.num_tokens))]

    def num_rows(self) -> int | None:
        return -(-self._shards.num_tokens // self._length) if self._shards.complete else None

    def num_targets(self) -> tuple[int, int]:
        rows = self.num_rows()
        if rows is None:
            rows = self._shards.num_tokens // self._length
            return rows * self._length, rows
        return self._shards.num_tokens, rows

    def first_token(self, row: int) -> int:
        number = self.block_number(row)
        return 0 if not number or not self._block_rows else number * self._block_rows * self._length - 1

    def block_number(self, row: int) -> int | None:
        return None if self._block_rows is None else row // self._block_rows


class _Packed(NamedTuple):
    """The rows of a block: row r holds the pieces bounds[r] to bounds[r + 1]."""

    bounds: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int64]


class _BestFit:
    """Whole documents in rows that they fill best."""

    def __init__(self, shards: TokenShards, *, length: int, shuffle_tokens: int | None) -> None:
        self._shards = shards
        self._length = length
        self._shuffle_tokens = shuffle_tokens
        self._first_shards = [0]  # of each block that is known, and of the next one
        self._first_rows = [0]
        self._targets = 0
        self._packed = lru_cache(maxsize=8)(self._pack)

    def block(self, row: int) -> Block | None:
        while row >= self._first_rows[-1]:
            if not self._extend():
                return None
        number = bisect_right(self._first_rows, row) - 1
        first = self._first_rows[number]
        return Block(None if self._shuffle_tokens is None else number, first, self._first_rows[number + 1] - first)

    def pieces(self, row: int) -> Sequence[Piece]:
        number = bisect_right(self._first_rows, row) - 1
        packed = self._packed(number)
        first = row - self._first_rows[number]
        part = slice(packed.bounds[first], packed.bounds[first + 1])
        return list(zip(packed.starts[part].tolist(), packed.stops[part].tolist(), strict=True))

    def num_rows(self) -> int | None:
        if not self._shards.complete:
            return None
        while self._extend():
            pass
        return self._first_rows[-1]

    def num_targets(self) -> tuple[int, int]:
        while self._extend():
            pass
        return self._targets, self._first_rows[-1]

    def first_token(self, row: int) -> int:
        number = self.block_number(row)
        return 0 if number is None else self._shards.shard_starts[self._first_shards[number]]

    def block_number(self, row: int) -> int | None:
        if self._shuffle_tokens is None:
            return None
        self.block(row)
        return bisect_right(self._first_rows, row) - 1

    def _extend(self) -> bool:
        """Make the next block known, if its shards are there."""
        bounds, first = self._shards.shard_starts, self._first_shards[-1]
        end = len(bounds) - 1
        full = False
        if self._shuffle_tokens is not None:
            reached = bisect_left(bounds, bounds[first] + self._shuffle_tokens, lo=first)
            full, end = reached <= end, min(reached, end)
        if end == first or not (full or self._shards.complete):
            return False
        self._first_shards.append(end)
        packed = self._packed(len(self._first_shards) - 2)
        self._first_rows.append(self._first_rows[-1] + len(packed.bounds) - 1)
        self._targets += int((packed.stops - packed.starts).sum())
        return True

    def _pack(self, number: int) -> _Packed:
        first, end = self._first_shards[number], self._first_shards[number + 1]
        documents = [self._shards.shard_documents(shard) for shard in range(first, end)]
        starts = np.concatenate([shard[:-1] for shard in documents])
        lengths = np.concatenate([np.diff(shard) for shard in documents])
        if self._shards.kind != "text":  # the first token of a conversation is no target
            starts, lengths = starts + 1, lengths - 1
        starts, lengths = cut(starts, lengths, self._length)
        rows = pack(lengths, self._length)
        starts = starts[rows.order]
        return _Packed(bounds=rows.bounds, starts=starts, stops=starts + lengths[rows.order])
