"""Best-fit packing: documents are kept whole and put into rows that they fill best.

A document longer than a row is cut into full pieces and one remainder; nothing else is cut and nothing is dropped. The pieces then go into
rows from the longest to the shortest, each into the row with the least room that still holds it ("best-fit decreasing"); a row is
opened where none does.

Notable: there are at most `capacity` different lengths and as many different rooms, so rows of equal room are kept together and all
pieces of one length are placed at once. A row that takes a piece takes as many more of that length as fit, because it then has the least
room of all; so each step either uses up the pieces of a length or all rows of a room. The work beside sorting is some steps of NumPy
per length, and ten million pieces take seconds. Where this leaves a row in a thousand more than the tokens need, which happens where only
few pieces fit into a row, the rows are filled by sums instead (see `subset_sum`), if that gives fewer.

Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling", https://arxiv.org/abs/2404.10830.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from anarcho_tokenize.subset_sum import Row, filled, refined

_ATTEMPTS_PER_ROW = 15
_MOST_ATTEMPTS = 2000
"""To save a row by filling others anew; each takes about a millisecond, and so there are fewer for rows beyond 4096 tokens."""


class Rows(NamedTuple):
    """Which pieces make up each row: row r holds the pieces order[bounds[r] : bounds[r + 1]], in ascending order."""

    order: npt.NDArray[np.int64]
    """Numbers of the pieces, row by row; shape (pieces,)."""
    bounds: npt.NDArray[np.int64]
    """Where each row starts in `order`, and the end of the last one; shape (rows + 1,)."""


def cut(
    starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], capacity: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Starts and lengths of the pieces, 1 to `capacity` tokens each, that these documents are cut into; an empty one has none."""
    counts = -(-lengths // capacity)
    if counts.size == 0 or (counts.min() == 1 and counts.max() == 1):
        return starts, lengths
    offsets = np.arange(counts.sum(), dtype=np.int64)
    offsets -= np.repeat(np.cumsum(counts) - counts, counts)
    offsets *= capacity
    pieces = np.minimum(np.repeat(lengths, counts) - offsets, capacity)
    offsets += np.repeat(starts, counts)
    return offsets, pieces


def pack(lengths: npt.NDArray[np.int64], capacity: int) -> Rows:
    """Put pieces of 1 to `capacity` tokens into rows of `capacity`; equal lengths give equal rows on every machine."""
    counts = np.bincount(lengths, minlength=capacity + 1)
    least = -(-int(lengths.sum()) // capacity)
    enough = least + least // 1000
    rows, num_rows = _best_fit_decreasing(counts, capacity)
    if num_rows > enough:
        other = _filled_by_sums(counts, capacity)
        rows, num_rows = min((rows, num_rows), other, key=lambda found: found[1])
    if num_rows > enough:
        rows, num_rows = _refined(rows, num_rows, counts, capacity, enough=enough)
    row_of = np.empty(len(lengths), dtype=np.int64)
    row_of[_from_longest(lengths, capacity)] = rows
    bounds = np.zeros(num_rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of, minlength=num_rows), out=bounds[1:])
    return Rows(order=np.argsort(row_of, kind="stable"), bounds=bounds)


def _from_longest(lengths: npt.NDArray[np.int64], capacity: int) -> npt.NDArray[np.int64]:
    """The order of the pieces from the longest to the shortest; numbers of 16 bits are sorted by counting."""
    return np.argsort((capacity - lengths).astype(np.uint16 if capacity < 2**16 else np.int64), kind="stable")


_Assignment = tuple[npt.NDArray[np.int64], int]
"""The row of each piece, from the longest piece to the shortest, and how many rows there are."""


def _best_fit_decreasing(counts: npt.NDArray[np.int64], capacity: int) -> _Assignment:
    """Assign counts[n] pieces of each length n."""
    rows = np.empty(int(counts.sum()), dtype=np.int64)
    open_rows = _OpenRows(capacity)
    placed = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            room, numbers = open_rows.take(length, limit=left)
            each = room // length
            taken = np.repeat(numbers, each)[:left]
            rows[placed : placed + len(taken)] = taken
            placed, left = placed + len(taken), left - len(taken)
            short = len(numbers) * each - len(taken)
            open_rows.put(room % length, numbers[:-1] if short else numbers)
            if short:  # the last row had room for more pieces of this length than there are
                open_rows.put(room % length + short * length, numbers[-1:])
    return rows, open_rows.opened


def _filled_by_sums(counts: npt.NDArray[np.int64], capacity: int) -> _Assignment:
    present = np.flatnonzero(counts)
    number_of = Counter(dict(zip(present.tolist(), counts[present].tolist(), strict=True)))
    return _assigned(list(filled(number_of, capacity)), capacity)


def _refined(
    rows: npt.NDArray[np.int64], num_rows: int, counts: npt.NDArray[np.int64], capacity: int, *, enough: int
) -> _Assignment:
    lengths = np.repeat(np.arange(capacity, -1, -1), counts[::-1])
    by_row = np.split(lengths[np.argsort(rows, kind="stable")], np.cumsum(np.bincount(rows, minlength=num_rows))[:-1])
    attempts = min(_ATTEMPTS_PER_ROW * num_rows, _MOST_ATTEMPTS * 4096 // max(capacity, 4096))
    better = refined([tuple(row.tolist()) for row in by_row], capacity, enough=enough, attempts=attempts)
    return _assigned([(row, 1) for row in better], capacity)


def _assigned(rows: list[tuple[Row, int]], capacity: int) -> _Assignment:
    """Rows, each repeated so many times, as the row of each piece from the longest to the shortest."""
    times = np.array([number for _, number in rows], dtype=np.int64)
    firsts = np.cumsum(times) - times
    pieces = np.array([len(row) for row, _ in rows], dtype=np.int64)
    lengths = np.array([length for row, _ in rows for length in row], dtype=np.int64)
    firsts, times_of_piece = np.repeat(firsts, pieces), np.repeat(times, pieces)
    within = np.arange(times_of_piece.sum()) - np.repeat(np.cumsum(times_of_piece) - times_of_piece, times_of_piece)
    numbers = np.repeat(firsts, times_of_piece) + within
    return numbers[_from_longest(np.repeat(lengths, times_of_piece), capacity)], int(times.sum())


class _OpenRows:
    """Rows by the room that they have left."""

    def __init__(self, capacity: int) -> None:
        self.opened = 0
        self._capacity = capacity
        self._rows: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(capacity + 1)]
        self._rooms = 0  # bit n is set where rows with room for n tokens exist

    def take(self, length: int, *, limit: int) -> tuple[int, npt.NDArray[np.int64]]:
        """Remove rows with the least room for `length`, at most as many as `limit` pieces of it need; new ones where there are none."""
        rooms = self._rooms >> length
        if not rooms:
            first, self.opened = self.opened, self.opened + -(-limit // (self._capacity // length))
            return self._capacity, np.arange(first, self.opened, dtype=np.int64)
        room = length + (rooms & -rooms).bit_length() - 1
        rows = self._rows[room]
        numbers = rows.pop()
        needed = -(-limit // (room // length))
        if len(numbers) > needed:
            numbers, rest = numbers[:needed], numbers[needed:]
            rows.append(rest)
        if not rows:
            self._rooms ^= 1 << room
        return room, numbers

    def put(self, room: int, numbers: npt.NDArray[np.int64]) -> None:
        """Add rows that have this room left."""
        if len(numbers) and room:
            self._rows[room].append(numbers)
            self._rooms |= 1 << room
