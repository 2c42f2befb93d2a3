"""The shuffle without memory: a bijection of any size, alike everywhere, another one for each seed, epoch and block."""

import numpy as np
import pytest
from anarcho_tokenize.permutation import Permutation
from hypothesis import given, settings
from hypothesis import strategies as st

blocks = st.one_of(st.none(), st.integers(0, 2**40))


@settings(max_examples=100, deadline=None)
@given(
    size=st.one_of(st.integers(1, 300), st.integers(1, 20_000)),
    seed=st.integers(),
    epoch=st.integers(0, 2**40),
    block=blocks,
)
def test_permutation_is_a_bijection(size: int, seed: int, epoch: int, block: int | None) -> None:
    items = Permutation(size, seed=seed, epoch=epoch, block=block)(np.arange(size))
    assert np.array_equal(np.sort(items), np.arange(size))


def test_permutation_of_every_small_size_is_a_bijection() -> None:
    for size in range(1, 130):
        assert sorted(Permutation(size, seed=5, epoch=2)(np.arange(size)).tolist()) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 2**62), seed=st.integers(0, 9), data=st.data())
def test_permutation_of_huge_sizes_stays_within_them(size: int, seed: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5, unique=True))
    items = Permutation(size, seed=seed, epoch=0)(positions)
    assert ((items >= 0) & (items < size)).all()
    assert len(set(items.tolist())) == len(positions)


def test_permutation_does_not_depend_on_what_is_asked_together() -> None:
    permutation = Permutation(1000, seed=1, epoch=1)
    together = permutation(np.arange(1000))
    assert [int(permutation(position)) for position in range(0, 1000, 37)] == together[::37].tolist()


def test_permutations_of_other_seeds_epochs_and_blocks_differ() -> None:
    orders = {
        tuple(Permutation(50, seed=seed, epoch=epoch, block=block)(np.arange(50)).tolist())
        for seed in range(8)
        for epoch in range(8)
        for block in (None, *range(7))
    }
    assert len(orders) == 8 * 8 * 8


@pytest.mark.parametrize("size", [2, 8, 50])
@pytest.mark.parametrize("block", [None, 3])
def test_permutation_sends_every_position_everywhere_about_equally(size: int, block: int | None) -> None:
    trials = 250
    for position in (0, size - 1):
        items = [int(Permutation(size, seed=seed, epoch=0, block=block)(position)) for seed in range(trials)]
        expected = trials / size
        chi_square = ((np.bincount(items, minlength=size) - expected) ** 2 / expected).sum()
        assert chi_square < (size - 1) + 6 * np.sqrt(2 * size)


def test_order_is_the_same_on_every_machine() -> None:
    assert Permutation(10, seed=0, epoch=0)(np.arange(10)).tolist() == [2, 5, 9, 4, 8, 1, 0, 7, 3, 6]


def test_order_of_a_block_is_the_same_on_every_machine() -> None:
    assert Permutation(10, seed=0, epoch=0, block=1)(np.arange(10)).tolist() == [1, 9, 7, 8, 0, 6, 2, 3, 5, 4]
