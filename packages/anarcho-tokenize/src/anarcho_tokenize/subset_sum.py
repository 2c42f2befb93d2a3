"""Rows that are filled to the last token: what best-fit decreasing leaves open where only few pieces fit into a row.

Each row starts with the longest piece left and takes the other pieces that together fill it best ("minimum bin slack"). Which sums
can be reached is a set of bits of one integer, so a whole set of pieces is tried by a few shifts; the row that is found is repeated as
often as there are pieces for it, so that the work depends on how many lengths there are and not on how many pieces.

`refined` then takes the emptiest row and some others apart and fills them anew in a random order, and keeps what leaves the room in
fewer rows ("ruin and recreate"). The random numbers are those of `random.Random(0).random()`, which Python keeps the same.

Sources: Gupta and Ho 1999, "A new heuristic algorithm for the one-dimensional bin-packing problem",
https://doi.org/10.1080/095372899232894; Schrimpf et al. 2000, "Record breaking optimization results using the ruin and recreate
principle", https://doi.org/10.1006/jcph.1999.6413.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

Row = tuple[int, ...]
"""The lengths of a row's pieces, in descending order."""

_ROWS_TAKEN_APART = 8
_ROWS_REFINED = 4096
_BITS_PER_ROW = 2**22
"""Work for one row at most; it matters to rows of tens of thousands of tokens, where the first pieces tried are many and so enough."""


def filled(counts: Counter[int], capacity: int) -> Iterator[tuple[Row, int]]:
    """Rows of `capacity`, and how often each is repeated, that use up counts[n] pieces of each length n."""
    return _filled(counts, capacity, order=iter)


def refined(rows: list[Row], capacity: int, *, enough: int, attempts: int) -> list[Row]:
    """As many rows of the same pieces, or fewer; it ends after so many attempts, a quarter of them in vain, or with `enough` rows."""
    rows = sorted(rows, key=sum)
    full = rows[_ROWS_REFINED:]
    open_rows = [row for row in rows[:_ROWS_REFINED] if row[0] < capacity]
    full += [row for row in rows[:_ROWS_REFINED] if row[0] == capacity]
    draw = random.Random(0).random
    vain = 0
    for _ in range(attempts):
        if len(full) + len(open_rows) <= enough or len(open_rows) < 2 or vain > attempts // 4:
            break
        vain = 0 if _retry(open_rows, capacity, draw) else vain + 1
    return full + open_rows


def _retry(rows: list[Row], capacity: int, draw: Callable[[], float]) -> bool:
    """Take the emptiest row and some others apart, and put back what concentrates the room more, or these; whether it does."""
    emptiest = min(range(len(rows)), key=lambda number: sum(rows[number]))
    taken = [rows.pop(emptiest)]
    for _ in range(min(_ROWS_TAKEN_APART, len(rows))):
        taken.append(rows.pop(int(draw() * len(rows))))
    pieces = Counter(length for row in taken for length in row)
    found = [
        row
        for row, times in _filled(pieces, capacity, order=lambda lengths: sorted(lengths, key=lambda _: draw()))
        for _ in range(times)
    ]
    before, after = _concentration(taken), _concentration(found)
    rows += found if after >= before else taken
    return after > before


def _concentration(rows: list[Row]) -> tuple[int, int]:
    """Grows with fewer rows, and with room that is in fewer of them."""
    return -len(rows), sum(sum(row) ** 2 for row in rows)


def _filled(
    counts: Counter[int], capacity: int, *, order: Callable[[Iterator[int]], Iterable[int]]
) -> Iterator[tuple[Row, int]]:
    left = dict(sorted(counts.items(), reverse=True))
    while left:
        longest = next(iter(left))
        left[longest] -= 1
        room = capacity - longest
        others = order(length for length in left if length <= room and left[length])
        row = (longest, *sorted(_best_sum(others, left, room), reverse=True))
        left[longest] += 1
        used = Counter(row)
        times = min(left[length] // number for length, number in used.items())
        for length, number in used.items():
            left[length] -= number * times
            if not left[length]:
                del left[length]
        yield row, times


def _best_sum(lengths: Iterable[int], available: dict[int, int], room: int) -> list[int]:
    """Pieces of these lengths with the largest sum up to `room`, of which those that come first are tried first."""
    within, goal = (2 << room) - 1, 1 << room
    sums, tried = 1, []  # bit n of `sums` is set where the pieces tried so far have a subset of n tokens
    for length in lengths:
        for _ in range(min(available[length], room // length)):
            more = (sums | sums << length) & within
            if more == sums:
                break
            tried.append((length, sums))
            sums = more
        if sums & goal or len(tried) * room > _BITS_PER_ROW:
            break
    rest, chosen = sums.bit_length() - 1, []
    for length, before in reversed(tried):
        if not before >> rest & 1:
            chosen.append(length)
            rest -= length
    return chosen
