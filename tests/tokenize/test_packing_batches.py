"""Packed batches: every token a target once an epoch, documents whole, the same order for any ranks, growth and starting point."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from anarcho_tokenize import Batch, PackedBatches, SequentialBatches, ShardError, TokenShards
from hypothesis import given, settings
from hypothesis import strategies as st


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


packing_shards = _load("packing_shards")
MemoryShards, PAD, EOT = packing_shards.MemoryShards, packing_shards.PAD, packing_shards.EOT

PACKINGS = ["concat", "best-fit"]
FIELDS = ("tokens", "targets", "weights", "positions", "segments")
documents = st.lists(st.integers(1, 40), min_size=1, max_size=6)
lengths = st.integers(1, 40)
packings = st.sampled_from(PACKINGS)
kinds = st.sampled_from(["text", "chat", "preference"])
shuffles = st.one_of(st.none(), st.integers(1, 200))


def numbered(sizes: list[list[int]]) -> list[list[list[int]]]:
    """Documents of these sizes whose ids are all different, so that each token is known by its id."""
    following = iter(range(10, 60_000))
    return [[[next(following) for _ in range(size)] for size in shard] for shard in sizes]


@st.composite
def corpora(draw: st.DrawFn, *, kind: st.SearchStrategy[str] = kinds) -> Any:
    sizes = draw(st.lists(documents, min_size=1, max_size=12))
    return numbered([*sizes, [45]]), draw(kind)


def whole_epoch(batches: PackedBatches) -> Batch:
    assert batches.num_samples is not None
    return batches.batch(0, batches.num_samples)


def equal(left: Batch, right: Batch) -> bool:
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in FIELDS)


def joined(parts: list[Batch]) -> Batch:
    return Batch(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS})


@settings(max_examples=60, deadline=None)
@given(corpus=corpora(), length=lengths, packing=packings, shuffle=shuffles, epoch=st.integers(0, 2))
def test_every_token_is_a_target_exactly_once_an_epoch(
    corpus: Any, length: int, packing: Any, shuffle: int | None, epoch: int
) -> None:
    shards = MemoryShards(corpus[0], kind=corpus[1])
    batches = PackedBatches(shards, length=length, seed=1, packing=packing, shuffle_tokens=shuffle)
    assert batches.num_samples
    first = epoch * batches.num_samples
    batch = batches.batch(first, batches.num_samples)
    rows = batches.windows(first, batches.num_samples)
    assert sorted(rows.tolist()) == list(range(batches.num_samples))
    counted = [
        token
        for document in shards.documents
        for place, token in enumerate(document)
        if shards.kind == "text" or (place > 0 and token % 2)
    ]
    assert sorted(batch.targets[batch.weights == 1].tolist()) == sorted(counted)
    assert set(np.unique(batch.weights).tolist()) <= {0.0, 1.0}


@settings(max_examples=50, deadline=None)
@given(corpus=corpora(), length=lengths, packing=packings, shuffle=shuffles)
def test_every_target_follows_its_input_and_padding_has_no_weight(
    corpus: Any, length: int, packing: Any, shuffle: int | None
) -> None:
    shards = MemoryShards(corpus[0], kind=corpus[1])
    batch = whole_epoch(PackedBatches(shards, length=length, seed=0, packing=packing, shuffle_tokens=shuffle))
    before = {}
    for document in shards.documents:
        stream = [EOT, *document] if shards.kind == "text" else document
        before |= {token: previous for previous, token in pairwise(stream) if token != EOT}
    for token, target, weight in zip(*(getattr(batch, name).flat for name in FIELDS[:3]), strict=True):
        if target in before and weight:
            assert token == before[target]
        if target == PAD:
            assert (token, weight) == (PAD, 0)


@settings(max_examples=30, deadline=None)
@given(corpus=corpora(), length=lengths, packing=packings, shuffle=shuffles)
def test_segments_are_documents_and_positions_count_from_their_start_in_the_row(
    corpus: Any, length: int, packing: Any, shuffle: int | None
) -> None:
    shards = MemoryShards(corpus[0], kind=corpus[1])
    batches = PackedBatches(
        shards, length=length, seed=0, packing=packing, shuffle_tokens=shuffle, isolate_documents=True
    )
    batch = whole_epoch(batches)
    owner = {token: number for number, document in enumerate(shards.documents) for token in document if token != EOT}
    for tokens, targets, positions, segments in zip(
        batch.tokens.tolist(), batch.targets.tolist(), batch.positions, batch.segments, strict=True
    ):
        assert segments[0] == positions[0] == 0
        assert set(np.diff(segments).tolist()) <= {0, 1}
        assert np.array_equal(np.diff(positions)[np.diff(segments) == 0], np.ones((np.diff(segments) == 0).sum()))
        assert (positions[1:][np.diff(segments) == 1] == 0).all()
        segments_of: dict[int, set[int]] = {}
        for token, target, segment in zip(tokens, targets, segments.tolist(), strict=True):
            # An input belongs to its document; the end-of-text before a text to that text, which its target is of.
            name = -2 if target == PAD else owner.get(target, -1) if token == EOT else owner[token]
            segments_of.setdefault(segment, set()).add(name)
        for names in segments_of.values():
            assert len(names) == 1
        assert len(segments_of) == segments[-1] + 1


@settings(max_examples=50, deadline=None)
@given(corpus=corpora(), length=lengths, shuffle=shuffles)
def test_best_fit_cuts_only_documents_that_are_longer_than_a_row(corpus: Any, length: int, shuffle: int | None) -> None:
    shards = MemoryShards(corpus[0], kind=corpus[1])
    batches = PackedBatches(
        shards, length=length, seed=0, packing="best-fit", shuffle_tokens=shuffle, isolate_documents=True
    )
    batch = whole_epoch(batches)
    place = {
        target: (row, segment)
        for row, (targets, segments) in enumerate(zip(batch.targets.tolist(), batch.segments.tolist(), strict=True))
        for target, segment in zip(targets, segments, strict=True)
    }
    for document in shards.documents:
        predicted = [token for token in (document if shards.kind == "text" else document[1:]) if token != EOT]
        total = len(predicted) + (shards.kind == "text")
        places = {place[token] for token in predicted}
        if total <= length:
            assert len(places) <= 1
        elif length > 1:
            assert len(places) in {-(-total // length), -(-(total - 1) // length)}


@settings(max_examples=40, deadline=None)
@given(
    corpus=corpora(),
    length=lengths,
    packing=packings,
    shuffle=shuffles,
    first=st.integers(0, 10_000),
    eighths=st.integers(1, 4),
)
def test_the_batches_of_all_ranks_make_up_the_batch_of_one(
    corpus: Any, length: int, packing: Any, shuffle: int | None, first: int, eighths: int
) -> None:
    def batch(rank: int, world_size: int) -> Batch:
        batches = PackedBatches(
            MemoryShards(corpus[0], kind=corpus[1]),
            length=length,
            seed=3,
            packing=packing,
            shuffle_tokens=shuffle,
            isolate_documents=True,
            rank=rank,
            world_size=world_size,
        )
        return batches.batch(first, 8 * eighths)

    alone = batch(0, 1)
    for world_size in (2, 4, 8):
        assert equal(joined([batch(rank, world_size) for rank in range(world_size)]), alone)


@settings(max_examples=40, deadline=None)
@given(
    corpus=corpora(),
    length=lengths,
    packing=packings,
    shuffle=shuffles,
    first=st.integers(0, 10_000),
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
)
def test_skipping_to_a_sample_equals_reading_on(
    corpus: Any, length: int, packing: Any, shuffle: int | None, first: int, counts: list[int]
) -> None:
    def fresh() -> PackedBatches:
        shards = MemoryShards(corpus[0], kind=corpus[1])
        return PackedBatches(
            shards, length=length, seed=2, packing=packing, shuffle_tokens=shuffle, isolate_documents=True
        )

    walking, parts, start = fresh(), [], first
    for count in counts:
        parts.append(walking.batch(start, count))
        assert equal(fresh().batch(start, count), parts[-1])
        start += count
    assert equal(fresh().batch(first, sum(counts)), joined(parts))


@settings(max_examples=25, deadline=None)
@given(corpus=corpora(), length=st.integers(5, 40), packing=packings, shuffle=st.integers(1, 200), data=st.data())
def test_order_while_shards_grow_is_the_order_of_complete_ones(
    corpus: Any, length: int, packing: Any, shuffle: int, data: st.DataObject
) -> None:
    options: Any = {"length": length, "seed": 4, "packing": packing, "shuffle_tokens": shuffle}
    complete = PackedBatches(
        MemoryShards(corpus[0], kind=corpus[1]), **options, isolate_documents=True, single_epoch=True
    )
    shards = MemoryShards(corpus[0], kind=corpus[1], visible=0)
    growing = PackedBatches(shards, **options, isolate_documents=True, single_epoch=True)
    count, first = data.draw(st.integers(1, 12)), 0
    while (state := growing.state(first, count)) != "ended":
        if state == "waiting":
            with pytest.raises(ShardError, match="does not hold sample"):
                growing.batch(first, count)
            shards.append(data.draw(st.integers(1, 4)))
            continue
        assert equal(growing.batch(first, count), complete.batch(first, count))
        assert growing.windows(first, count).tolist() == complete.windows(first, count).tolist()
        assert growing.position(first) == complete.position(first)
        first += count
    assert first - count < complete.num_samples <= first
    assert growing.fill == complete.fill


@settings(max_examples=20, deadline=None)
@given(corpus=corpora(), length=lengths, packing=packings, shuffle=st.integers(1, 200))
def test_what_lies_before_the_first_token_of_a_sample_is_never_read_again(
    corpus: Any, length: int, packing: Any, shuffle: int
) -> None:
    shards = MemoryShards(corpus[0], kind=corpus[1])
    options: Any = {"length": length, "seed": 4, "packing": packing, "shuffle_tokens": shuffle, "single_epoch": True}
    batches = PackedBatches(shards, **options)
    for sample in range(batches.num_samples or 0):
        kept = batches.first_token(sample)
        shards.evicted |= {n for n, end in enumerate(shards.shard_starts[1:]) if end <= kept}
        PackedBatches(shards, **options).batch(sample, 1)
    assert PackedBatches(shards, **{**options, "single_epoch": False}).first_token(10**6) == 0


def test_growing_shards_are_waited_for_where_all_rows_are_shuffled_together_and_in_later_epochs() -> None:
    shards = MemoryShards(numbered([[30]] * 4), visible=3)
    together = PackedBatches(shards, length=5, seed=0)
    assert (together.state(0, 1), together.num_samples) == ("waiting", None)
    blocks = PackedBatches(shards, length=5, seed=0, shuffle_tokens=10)
    assert (blocks.state(0, 18), blocks.state(18, 1)) == ("ready", "waiting")
    assert blocks.position(18) == {"epoch": 0, "cursor": 18, "block": 9}
    shards.append(1)
    assert (blocks.state(18, 1), blocks.state(1000, 8), together.state(1000, 1)) == ("ready", "ready", "ready")
    assert blocks.position(25) == {"epoch": 1, "cursor": 0, "block": 0}


def test_a_single_epoch_ends_and_its_last_batch_is_filled_with_padding() -> None:
    shards = MemoryShards(numbered([[9] * 4]))
    batches = PackedBatches(shards, length=10, seed=0, single_epoch=True, isolate_documents=True)
    assert [batches.state(first, 3) for first in (0, 3, 4)] == ["ready", "ready", "ended"]
    last = batches.batch(3, 3)
    assert last.weights.sum(axis=1).tolist() == [10, 0, 0]
    assert batches.windows(3, 3)[1:].tolist() == [-1, -1]
    assert last.positions is not None
    assert last.positions[2].tolist() == list(range(10))
    assert batches.batch(6, 3).weights.sum() == 0


@pytest.mark.parametrize("packing", PACKINGS)
def test_blocks_are_shuffled_each_and_each_epoch_by_itself(packing: Any) -> None:
    shards = MemoryShards(numbered([[9] * 40, [9] * 40]))
    batches = PackedBatches(shards, length=10, seed=0, packing=packing, shuffle_tokens=400)
    assert batches.num_samples == 80
    orders = [batches.windows(start, 40) for start in (0, 40, 80, 120)]
    for number, order in enumerate(orders):
        assert sorted(order - 40 * (number % 2)) == list(range(40))
    assert len({tuple((order % 40).tolist()) for order in orders}) == 4


def test_fill_is_the_share_of_slots_with_a_token() -> None:
    shards = MemoryShards(numbered([[6, 6, 6]]))  # seven tokens each, with end-of-text
    assert PackedBatches(shards, length=10, seed=0, packing="best-fit").fill == pytest.approx(21 / 30)
    assert PackedBatches(shards, length=10, seed=0).fill == pytest.approx(21 / 30)
    assert PackedBatches(shards, length=7, seed=0).fill == 1
    assert PackedBatches(MemoryShards(numbered([[9]]), visible=0), length=7, seed=0).fill == 0


def test_order_of_joined_documents_is_the_same_in_every_version() -> None:
    batches = PackedBatches(MemoryShards(numbered([[9] * 10])), length=10, seed=0)
    assert batches.windows(0, 20).tolist() == [2, 5, 9, 4, 8, 1, 0, 7, 3, 6, 3, 6, 5, 8, 1, 0, 9, 2, 4, 7]
    assert (batches.position(0), batches.position(35)) == ({"epoch": 0, "cursor": 0}, {"epoch": 3, "cursor": 5})
    other = PackedBatches(MemoryShards(numbered([[9] * 10])), length=10, seed=1)
    assert other.windows(0, 10).tolist() != batches.windows(0, 10).tolist()


@settings(max_examples=40, deadline=None)
@given(corpus=corpora(), length=st.integers(1, 90), packing=packings, batch_size=st.integers(1, 7))
def test_sequential_batches_hold_every_token_once_in_fixed_shapes(
    corpus: Any, length: int, packing: Any, batch_size: int
) -> None:
    shards = MemoryShards(corpus[0], kind=corpus[1])
    batches = SequentialBatches(shards, length=length, packing=packing)
    everything = list(batches.batches(batch_size))
    assert {batch.tokens.shape for batch in everything} == {(batch_size, length)}
    assert len(everything) == -(-batches.num_windows // batch_size)
    assert sum(batch.weights.sum() for batch in everything) == batches.num_tokens
    targets = [token for batch in everything for token in batch.targets[batch.weights == 1].tolist()]
    if shards.kind == "text":
        assert sorted(targets) == sorted(shards.tokens(0, shards.num_tokens).tolist())
    if (shards.kind, packing) == ("text", "concat"):
        assert targets == shards.tokens(0, shards.num_tokens).tolist()
    assert batches.num_bytes == 3 * batches.num_tokens, (
        "a token has three bytes, and of conversations only targets count"
    )


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("limit", [1, 2, 5, 9, 10**6])
def test_limited_evaluation_spreads_its_rows_over_all(limit: int, packing: Any) -> None:
    batches = SequentialBatches(MemoryShards(numbered([[7, 5, 9, 3, 11] * 5])), length=12, packing=packing)
    limited = list(batches.batches(2, max_windows=limit))
    rows = np.concatenate([batch.tokens[batch.weights[:, 0] == 1] for batch in limited])
    taken = min(limit, batches.num_windows)
    assert len(rows) == taken
    everything = np.concatenate([batch.tokens for batch in batches.batches(batches.num_windows)])
    numbers = [number * batches.num_windows // taken for number in range(taken)]
    assert np.array_equal(rows, everything[numbers])
    gaps = np.diff([*numbers, batches.num_windows])
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("packing", PACKINGS)
def test_batches_of_shards_on_disk_have_the_documented_types_and_shapes(
    prepare: Callable[..., TokenShards], packing: Any
) -> None:
    shards = prepare([f"{number}: the whale and the sea. " * (number % 5 + 1) for number in range(25)], shard_tokens=70)
    plain = PackedBatches(shards, length=64, seed=0, packing=packing).batch(0, 3)
    assert (plain.positions, plain.segments) == (None, None)
    isolated = PackedBatches(shards, length=64, seed=0, packing=packing, isolate_documents=True).batch(0, 3)
    for name, dtype in zip(FIELDS, (np.int32, np.int32, np.float32, np.int32, np.int32), strict=True):
        assert (getattr(isolated, name).shape, getattr(isolated, name).dtype) == ((3, 64), dtype)
    assert np.array_equal(plain.tokens, isolated.tokens)
    targets = np.concatenate([b.targets[b.weights == 1] for b in SequentialBatches(shards, length=64).batches(2)])
    assert np.array_equal(targets, shards.tokens(0, shards.num_tokens))


def test_too_little_text_is_refused_also_where_it_ends_later() -> None:
    small = numbered([[4], [4]])
    with pytest.raises(ShardError, match="holds 10 tokens, less than one sequence of 50; give more text"):
        PackedBatches(MemoryShards(small), length=50, seed=0)
    shards = MemoryShards(small, visible=1)
    batches = PackedBatches(shards, length=50, seed=0, shuffle_tokens=10)
    assert batches.state(0, 1) == "waiting"
    shards.append(1)
    with pytest.raises(ShardError, match="less than one sequence of 50"):
        batches.state(0, 1)


def test_conversations_without_a_target_are_refused() -> None:
    shards = MemoryShards([[[10]] * 20], kind="chat")
    with pytest.raises(ShardError, match="holds no token that can be predicted"):
        PackedBatches(shards, length=8, seed=0, packing="best-fit").batch(0, 1)
    with pytest.raises(ShardError, match="holds no token; expected some to evaluate on"):
        SequentialBatches(shards, length=8)


def test_shards_that_are_empty_or_grow_cannot_be_evaluated_on() -> None:
    with pytest.raises(ShardError, match="holds no token; expected some to evaluate on"):
        SequentialBatches(MemoryShards([]), length=8)
    with pytest.raises(ShardError, match="still grows; expected complete shards"):
        SequentialBatches(MemoryShards(numbered([[30]]), visible=0), length=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, r"train\.sequence_length is 0; expected at least 1 token"),
        ({"shuffle_tokens": 0}, r"data\.shuffle_tokens is 0; expected at least 1 token"),
        ({"rank": 2, "world_size": 2}, "rank is 2 of world_size 2"),
        ({"rank": 0, "world_size": 0}, "rank is 0 of world_size 0"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ShardError, match=message):
        PackedBatches(MemoryShards(numbered([[30]])), **{"length": 8, "seed": 0, **options})


def test_senseless_requests_are_refused() -> None:
    shards = MemoryShards(numbered([[30]]))
    batches = PackedBatches(shards, length=8, seed=0, world_size=2)
    for first, count in ((-1, 2), (0, 0)):
        with pytest.raises(ShardError, match="expected at least 0 and 1"):
            batches.batch(first, count)
    with pytest.raises(ShardError, match="3 samples were asked for; expected a multiple of the world_size 2"):
        batches.batch(0, 3)
    for batch_size, max_windows in ((0, None), (1, 0)):
        with pytest.raises(ShardError, match="expected at least 1"):
            next(SequentialBatches(shards, length=8).batches(batch_size, max_windows=max_windows))
