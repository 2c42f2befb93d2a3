"""Best-fit rows: no piece lost or doubled, no row too long, documents whole, and next to nothing left empty."""

import numpy as np
import numpy.typing as npt
import pytest
from anarcho_tokenize.best_fit import Rows, cut, pack
from anarcho_tokenize.subset_sum import refined
from hypothesis import given, settings
from hypothesis import strategies as st

capacities = st.one_of(st.integers(1, 12), st.integers(1, 300))


def array(values: list[int]) -> npt.NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def row_tokens(rows: Rows, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.diff(np.concatenate([[0], np.cumsum(lengths[rows.order])])[rows.bounds])


@settings(max_examples=100, deadline=None)
@given(capacity=capacities, data=st.data())
def test_every_piece_is_in_one_row_and_no_row_is_too_long(capacity: int, data: st.DataObject) -> None:
    lengths = array(data.draw(st.lists(st.integers(1, capacity), max_size=80)))
    rows = pack(lengths, capacity)
    assert sorted(rows.order.tolist()) == list(range(len(lengths)))
    used = row_tokens(rows, lengths)
    assert ((used > 0) & (used <= capacity)).all()
    assert used.sum() == lengths.sum()


@settings(max_examples=100, deadline=None)
@given(capacity=capacities, documents=st.lists(st.integers(0, 1000), max_size=20))
def test_documents_are_cut_only_where_they_are_longer_than_a_row(capacity: int, documents: list[int]) -> None:
    lengths = array(documents)
    starts = 7 + np.cumsum(lengths) - lengths
    piece_starts, piece_lengths = cut(starts, lengths, capacity)
    pieces = list(zip(piece_starts.tolist(), piece_lengths.tolist(), strict=True))
    expected = []
    for start, length in zip(starts.tolist(), documents, strict=True):
        expected += [(start + at, min(capacity, length - at)) for at in range(0, length, capacity)]
    assert pieces == expected


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60))
def test_rows_depend_on_the_lengths_alone_and_hold_their_pieces_in_order(lengths: list[int]) -> None:
    rows, again = (pack(array(lengths), 100) for _ in range(2))
    assert np.array_equal(rows.order, again.order)
    assert np.array_equal(rows.bounds, again.bounds)
    for first, end in zip(rows.bounds[:-1], rows.bounds[1:], strict=True):
        assert (np.diff(rows.order[first:end]) > 0).all()


def best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """Rows that the textbook's algorithm takes, piece by piece."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    return len(rooms)


@settings(max_examples=80, deadline=None)
@given(capacity=st.integers(5, 60), data=st.data())
def test_there_are_never_more_rows_than_by_best_fit_decreasing(capacity: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=60))
    assert len(pack(array(lengths), capacity).bounds) - 1 <= best_fit_decreasing(lengths, capacity)


@pytest.mark.parametrize(("mean", "count", "capacity"), [(20, 9000, 512), (195, 2500, 2048), (600, 500, 4096)])
def test_rows_of_conversations_are_full(mean: int, count: int, capacity: int) -> None:
    """As many, and as long, as those of three public data sets; the last row alone is not full."""
    lengths = np.random.default_rng(mean).normal(mean, mean / 3, count).clip(mean // 4, 3 * mean).astype(np.int64)
    rows = len(pack(lengths, capacity).bounds) - 1
    assert rows == -(-int(lengths.sum()) // capacity)


def test_few_pieces_a_row_are_filled_where_best_fit_decreasing_fails() -> None:
    lengths = np.random.default_rng(0).normal(616, 160, 499).clip(305, 1340).astype(np.int64)
    rows, least = len(pack(lengths, 2048).bounds) - 1, -(-int(lengths.sum()) // 2048)
    assert best_fit_decreasing(lengths.tolist(), 2048) > 1.02 * least
    assert lengths.sum() / (rows * 2048) >= 0.99


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=15))
def test_refined_rows_hold_the_same_pieces_in_no_more_rows(rows: list[list[int]]) -> None:
    capacity = max(sum(row) for row in rows)
    better = refined([tuple(sorted(row, reverse=True)) for row in rows], capacity, enough=1, attempts=20)
    assert sorted(length for row in better for length in row) == sorted(length for row in rows for length in row)
    assert len(better) <= len(rows)
    assert all(sum(row) <= capacity for row in better)


def test_a_million_pieces_fill_their_rows() -> None:
    lengths = np.random.default_rng(1).lognormal(5.5, 1.2, 1_000_000).clip(1, 2048).astype(np.int64)
    rows = len(pack(lengths, 2048).bounds) - 1
    assert lengths.sum() / (rows * 2048) > 0.998
