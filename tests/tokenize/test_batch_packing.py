"""Packing: every token is a target exactly once an epoch, in an order that integers describe."""

from collections.abc import Callable

import numpy as np
import pytest
from anarcho_tokenize import Batch, ConcatBatches, SequentialBatches, ShardError, Tokenizer, TokenShards
from anarcho_tokenize.permutation import Permutation
from hypothesis import given, settings
from hypothesis import strategies as st

DOCUMENTS = [f"{number}: the whale and the sea. " * (number % 5 + 1) for number in range(25)]


@pytest.fixture
def shards(prepare: Callable[..., TokenShards]) -> TokenShards:
    return prepare(DOCUMENTS, shard_tokens=70)


def stream_of(shards: TokenShards) -> np.ndarray:
    return np.concatenate([[shards.eot_id], shards.tokens(0, shards.num_tokens)])


@settings(max_examples=100, deadline=None)
@given(size=st.one_of(st.integers(1, 300), st.integers(1, 20_000)), seed=st.integers(), epoch=st.integers(0, 2**40))
def test_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    items = Permutation(size, seed=seed, epoch=epoch)(np.arange(size))
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


def test_permutations_of_other_seeds_and_epochs_differ() -> None:
    orders = {
        tuple(Permutation(50, seed=seed, epoch=epoch)(np.arange(50)).tolist())
        for seed in range(20)
        for epoch in range(20)
    }
    assert len(orders) == 400


@pytest.mark.parametrize("size", [2, 8, 50])
def test_permutation_sends_every_position_everywhere_about_equally(size: int) -> None:
    trials = 1000
    for position in (0, size - 1):
        counts = np.bincount(
            [int(Permutation(size, seed=seed, epoch=0)(position)) for seed in range(trials)], minlength=size
        )
        expected = trials / size
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < (size - 1) + 6 * np.sqrt(2 * size)


def test_order_is_the_same_on_every_machine() -> None:
    assert Permutation(10, seed=0, epoch=0)(np.arange(10)).tolist() == [2, 5, 9, 4, 8, 1, 0, 7, 3, 6]


@pytest.mark.parametrize("length", [1, 7, 16, 64])
@pytest.mark.parametrize("isolate_documents", [False, True])
def test_every_token_is_a_target_exactly_once_an_epoch(
    shards: TokenShards, length: int, isolate_documents: bool
) -> None:
    batches = ConcatBatches(shards, length=length, seed=3, isolate_documents=isolate_documents)
    assert batches.num_windows == -(-shards.num_tokens // length)
    stream = stream_of(shards)
    for epoch in range(2):
        first = epoch * batches.num_windows
        batch = batches.batch(first, batches.num_windows)
        order = np.argsort(batches.windows(first, batches.num_windows))
        kept = batch.weights[order].reshape(-1) == 1
        assert np.array_equal(batch.targets[order].reshape(-1)[kept], stream[1:])
        assert np.array_equal(batch.tokens[order].reshape(-1)[kept], stream[:-1])
        assert batch.weights.sum() == shards.num_tokens
        assert (batch.targets[batch.weights == 0] == shards.pad_id).all()


@settings(max_examples=60, deadline=None)
@given(first=st.integers(0, 10_000), counts=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_seeking_equals_reading_on(packed: ConcatBatches, first: int, counts: list[int]) -> None:
    whole = packed.batch(first, sum(counts))
    start = 0
    for count in counts:
        part = packed.batch(first + start, count)
        for name in ("tokens", "targets", "weights", "positions", "segments"):
            assert np.array_equal(getattr(part, name), getattr(whole, name)[start : start + count])
        start += count


@pytest.fixture(scope="session")
def packed(english: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> ConcatBatches:
    from anarcho_tokenize import prepare_shards

    folder = tmp_path_factory.mktemp("packed") / "data"
    prepare_shards(DOCUMENTS, english, folder, validation_fraction=0, shard_tokens=90)
    return ConcatBatches(TokenShards.open(folder / "train"), length=12, seed=9, isolate_documents=True)


def test_batch_has_the_documented_types_and_shapes(shards: TokenShards) -> None:
    plain = ConcatBatches(shards, length=16, seed=0).batch(0, 3)
    assert isinstance(plain, Batch)
    assert (plain.positions, plain.segments) == (None, None)
    isolated = ConcatBatches(shards, length=16, seed=0, isolate_documents=True).batch(0, 3)
    for name, dtype in (
        ("tokens", np.int32),
        ("targets", np.int32),
        ("weights", np.float32),
        ("positions", np.int32),
        ("segments", np.int32),
    ):
        array = getattr(isolated, name)
        assert (array.shape, array.dtype) == ((3, 16), dtype)
    assert np.array_equal(plain.tokens, isolated.tokens)


def test_another_seed_gives_another_order(shards: TokenShards) -> None:
    orders = [ConcatBatches(shards, length=8, seed=seed).windows(0, 40).tolist() for seed in (0, 1)]
    assert orders[0] != orders[1]


def test_epochs_are_ordered_differently(shards: TokenShards) -> None:
    batches = ConcatBatches(shards, length=8, seed=0)
    count = batches.num_windows
    assert batches.windows(0, count).tolist() != batches.windows(count, count).tolist()


def test_position_is_epoch_and_cursor(shards: TokenShards) -> None:
    batches = ConcatBatches(shards, length=8, seed=0)
    assert batches.position(0) == {"epoch": 0, "cursor": 0}
    assert batches.position(3 * batches.num_windows + 5) == {"epoch": 3, "cursor": 5}


@pytest.mark.parametrize("length", [9, 40, 500])
def test_segments_and_positions_start_anew_at_each_document(shards: TokenShards, length: int) -> None:
    for batch in SequentialBatches(shards, length=length, isolate_documents=True).batches(4):
        for tokens, weights, positions, segments in zip(
            batch.tokens.tolist(),
            batch.weights.tolist(),
            batch.positions.tolist(),
            batch.segments.tolist(),
            strict=True,
        ):
            segment, position = -1, 0
            for column, token in enumerate(tokens):
                padding_begins = column > 0 and weights[column] == 0 and weights[column - 1] == 1
                if column == 0 or token == shards.eot_id or padding_begins:
                    segment, position = segment + 1, 0
                assert (segments[column], positions[column]) == (segment, position)
                position += 1


@pytest.mark.parametrize(("length", "batch_size"), [(16, 4), (1, 3), (1000, 2), (7, 100)])
def test_sequential_batches_hold_every_token_once_in_fixed_shapes(
    shards: TokenShards, length: int, batch_size: int
) -> None:
    batches = SequentialBatches(shards, length=length)
    everything = list(batches.batches(batch_size))
    assert {batch.tokens.shape for batch in everything} == {(batch_size, length)}
    assert len(everything) == -(-batches.num_windows // batch_size)
    targets = np.concatenate([batch.targets[batch.weights == 1] for batch in everything])
    assert np.array_equal(targets, stream_of(shards)[1:])
    assert (batches.num_tokens, batches.num_bytes) == (shards.num_tokens, shards.num_bytes)


@pytest.mark.parametrize("limit", [1, 2, 5, 9, 10**6])
def test_limited_evaluation_spreads_its_windows_over_all_text(shards: TokenShards, limit: int) -> None:
    batches = SequentialBatches(shards, length=8)
    limited = list(batches.batches(2, max_windows=limit))
    rows = np.concatenate([batch.tokens[batch.weights[:, 0] == 1] for batch in limited])
    taken = min(limit, batches.num_windows)
    assert len(rows) == taken
    everything = np.concatenate([batch.tokens for batch in batches.batches(batches.num_windows)])
    numbers = [number * batches.num_windows // taken for number in range(taken)]
    assert np.array_equal(rows, everything[numbers])
    gaps = np.diff([*numbers, batches.num_windows])
    assert gaps.max() - gaps.min() <= 1


def test_corpus_shorter_than_a_sequence_is_refused(shards: TokenShards) -> None:
    with pytest.raises(
        ShardError, match=rf"holds {shards.num_tokens} tokens, less than one sequence of 5000; give more text"
    ):
        ConcatBatches(shards, length=5000, seed=0)


def test_empty_shards_cannot_be_evaluated_on(shards: TokenShards) -> None:
    with pytest.raises(ShardError, match="holds no token; expected some to evaluate on"):
        SequentialBatches(TokenShards.open(shards.directory.parent / "validation"), length=8)


def test_senseless_sizes_are_refused(shards: TokenShards) -> None:
    with pytest.raises(ShardError, match=r"train\.sequence_length is 0; expected at least 1 token"):
        ConcatBatches(shards, length=0, seed=0)
    batches = ConcatBatches(shards, length=8, seed=0)
    for first, count in ((-1, 1), (0, 0)):
        with pytest.raises(ShardError, match="expected at least 0 and 1"):
            batches.batch(first, count)
    sequential = SequentialBatches(shards, length=8)
    for batch_size, max_windows in ((0, None), (1, 0)):
        with pytest.raises(ShardError, match="expected at least 1"):
            next(sequential.batches(batch_size, max_windows=max_windows))
