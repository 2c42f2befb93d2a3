"""Batches of whole conversations and preferences: nothing lost or doubled, few shapes, the same for any number of ranks."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from anarcho_tokenize import ShardError
from anarcho_tokenize.buckets import BucketBatches, SequentialBucketBatches
from anarcho_tokenize.ladder import fit_ladder, units_per_batch
from anarcho_tokenize.packing import Batch
from hypothesis import given, settings
from hypothesis import strategies as st

PAD = 2
LENGTH = 96
LADDER = [16, 32, 48, 64, LENGTH]


class Shards:
    """What the batches use of token shards, from arrays; the second token of a document is its number."""

    directory = Path("data/train")
    pad_id = PAD
    complete = True

    def __init__(self, masks: list[list[int]], *, kind: str) -> None:
        self.kind = kind
        self.masks = masks
        self._starts = np.cumsum([0, *map(len, masks)], dtype=np.int64)
        self._mask = np.array([bit for mask in masks for bit in mask], dtype=np.uint8)
        random = np.random.default_rng(len(masks))
        self._ids = random.integers(10, 1000, size=len(self._mask)).astype(np.uint16)
        self._ids[self._starts[:-1] + 1] = 1000 + np.arange(len(masks))
        self.num_documents, self.num_tokens = len(masks), len(self._ids)
        self.num_bytes = 4 * self.num_tokens

    def document_starts(self) -> npt.NDArray[np.int64]:
        return self._starts

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.uint16]:
        return self._ids[start:stop]

    def loss_mask(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        return self._mask[start:stop]


def document(length: int, answer: int) -> list[int]:
    """A mask of so many tokens, of which the last `answer` count."""
    return [0] * (length - answer) + [1] * answer


documents = st.builds(
    lambda length, answer: document(length, min(answer, length - 2)), st.integers(4, 140), st.integers(1, 60)
)
several = st.lists(documents, min_size=1, max_size=70)
kinds = st.sampled_from(["chat", "preference"])
ladders = st.sampled_from([None, LADDER])


def shards_of(masks: list[list[int]], kind: str) -> Shards:
    return Shards(masks + [[*mask[:-1], 1] for mask in reversed(masks)] if kind == "preference" else masks, kind=kind)


def batches_of(shards: Shards, *, batch_tokens: int = 400, ladder=None, seed: int = 7, **ranks: int) -> BucketBatches:
    return BucketBatches(shards, batch_tokens=batch_tokens, length=LENGTH, seed=seed, ladder=ladder, **ranks)  # type: ignore[arg-type]


def rows_of(batch: Batch) -> list[tuple[int, npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
    """The rows that are no padding, each with the number of its document."""
    return [
        (int(targets[0]) - 1000, tokens, targets, weights)
        for tokens, targets, weights in zip(batch.tokens, batch.targets, batch.weights, strict=True)
        if targets[0] != PAD
    ]


def lost(shards: Shards) -> set[int]:
    """Documents of units of which one has no target that counts within the length."""
    width = 2 if shards.kind == "preference" else 1
    empty = {number // width for number, mask in enumerate(shards.masks) if not any(mask[1 : LENGTH + 1])}
    return {number for number in range(shards.num_documents) if number // width in empty}


def is_trainable(shards: Shards) -> bool:
    return len(lost(shards)) < shards.num_documents


@settings(max_examples=80, deadline=None)
@given(several, kinds, ladders, st.integers(0, 3))
def test_an_epoch_has_every_unit_once_whole_or_its_beginning(masks, kind: str, ladder, epoch: int) -> None:
    shards = shards_of(masks, kind)
    if not is_trainable(shards):
        with pytest.raises(ShardError, match="holds no answer within 96 tokens"):
            batches_of(shards, ladder=ladder)
        return
    batches = batches_of(shards, ladder=ladder)
    seen = []
    for cursor in range(batches.num_batches):
        batch = batches.batch(epoch * batches.num_batches + cursor)
        for number, tokens, targets, weights in rows_of(batch):
            seen.append(number)
            start, stop = shards.document_starts()[number : number + 2]
            stop = min(int(stop), int(start) + LENGTH + 1)
            filled = stop - start - 1
            assert tokens.tolist() == [*shards.tokens(start, stop - 1)] + [PAD] * (len(tokens) - filled)
            assert targets.tolist() == [*shards.tokens(start + 1, stop)] + [PAD] * (len(tokens) - filled)
            assert weights.tolist() == [*shards.loss_mask(start + 1, stop)] + [0] * (len(tokens) - filled)
        assert batch.weights.sum() == sum(weights.sum() for *_, weights in rows_of(batch))
        assert batch.weights.sum() > 0
    assert sorted(seen) == sorted(set(range(shards.num_documents)) - lost(shards))


@settings(max_examples=60, deadline=None)
@given(several, kinds)
def test_truncated_and_dropped_units_are_counted(masks, kind: str) -> None:
    shards = shards_of(masks, kind)
    if not is_trainable(shards):
        return
    batches = batches_of(shards)
    width = 2 if kind == "preference" else 1
    cut = {number // width for number, mask in enumerate(shards.masks) if len(mask) - 1 > LENGTH}
    gone = {number // width for number in lost(shards)}
    assert (batches.num_truncated, batches.num_dropped) == (len(cut - gone), len(gone))
    assert batches.num_units == shards.num_documents // width - len(gone)


@settings(max_examples=60, deadline=None)
@given(several, kinds, ladders, st.integers(97, 2000))
def test_shapes_come_from_the_ladder_and_keep_the_budget(masks, kind: str, ladder, batch_tokens: int) -> None:
    shards = shards_of(masks, kind)
    if not is_trainable(shards):
        return
    batches = batches_of(shards, ladder=ladder, batch_tokens=batch_tokens)
    width = 2 if kind == "preference" else 1
    shapes = {batches.batch(number).tokens.shape for number in range(batches.num_batches)}
    assert len(shapes) == len({length for _, length in shapes}) <= len(batches.ladder)
    assert batches.ladder[-1] == LENGTH
    for rows, length in shapes:
        assert length in batches.ladder
        assert rows % width == 0
        assert rows * length <= batch_tokens or rows == width
        assert rows * length > batch_tokens / 2 - width * length
    for number in range(batches.num_batches):
        batch = batches.batch(number)
        shorter = max((step for step in batches.ladder if step < batch.tokens.shape[1]), default=0)
        units = np.array([(targets != PAD).sum() for targets in batch.targets]).reshape(-1, width).max(axis=1)
        assert all(shorter < needed for needed in units if needed)


@settings(max_examples=40, deadline=None)
@given(several, kinds, st.sampled_from([2, 3, 4, 8]), st.sampled_from([60, 400, 3000]))
def test_the_rows_of_all_ranks_are_the_global_batch(masks, kind: str, world_size: int, batch_tokens: int) -> None:
    shards = shards_of(masks, kind)
    if not is_trainable(shards):
        return
    alone = batches_of(shards, batch_tokens=batch_tokens)
    ranks = [
        batches_of(shards, batch_tokens=batch_tokens, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for number in range(min(alone.num_batches, 6)):
        parts = [rank.batch(number) for rank in ranks]
        whole = alone.batch(number)
        assert len({part.tokens.shape for part in parts}) == 1
        for name, filler in (("tokens", PAD), ("targets", PAD), ("weights", 0)):
            joined = np.concatenate([getattr(part, name) for part in parts])
            expected = getattr(whole, name)
            assert np.array_equal(joined[: len(expected)], expected)
            assert (joined[len(expected) :] == filler).all()
        if world_size in (2, 4, 8) and len(whole.tokens) % (world_size * (2 if kind == "preference" else 1)) == 0:
            assert len(whole.tokens) == world_size * len(parts[0].tokens)


def test_pairs_stand_side_by_side_on_one_rank() -> None:
    shards = shards_of([document(4 + n, 2) for n in range(50)], "preference")
    for rank in range(4):
        batches = batches_of(shards, rank=rank, world_size=4)
        for number in range(batches.num_batches):
            numbers = [row[0] for row in rows_of(batches.batch(number))]
            assert numbers[::2] == [other - 1 for other in numbers[1::2]]
            assert all(other % 2 for other in numbers[1::2])


def test_any_batch_can_be_asked_for_first() -> None:
    shards = shards_of([document(4 + n, 2) for n in range(120)], "chat")
    walked, skipped = batches_of(shards), batches_of(shards)
    total = 3 * walked.num_batches
    inorder = [walked.batch(number).tokens for number in range(total)]
    for number in reversed(range(total)):
        assert np.array_equal(skipped.batch(number).tokens, inorder[number])
    assert walked.position(2 * walked.num_batches + 5) == {"epoch": 2, "cursor": 5}


def test_order_differs_between_epochs_and_seeds_and_is_equal_for_equal_seeds() -> None:
    shards = shards_of([document(4 + n, 2) for n in range(130)], "chat")

    def order(seed: int, epoch: int) -> list[list[int]]:
        batches = batches_of(shards, seed=seed)
        first = epoch * batches.num_batches
        return [[row[0] for row in rows_of(batches.batch(first + n))] for n in range(batches.num_batches)]

    assert order(1, 0) == order(1, 0)
    different = [order(1, 0), order(1, 1), order(2, 0)]
    assert all(one != other for one in different for other in different if one is not other)
    assert {frozenset(batch) for batch in order(1, 0)} != {frozenset(batch) for batch in order(1, 1)}


def test_units_are_spread_evenly_over_the_batches_of_their_length() -> None:
    shards = shards_of([document(17, 5)] * 33, "chat")
    batches = batches_of(shards, batch_tokens=16 * 32, ladder=LADDER)
    assert sorted(len(rows_of(batches.batch(number))) for number in range(batches.num_batches)) == [16, 17]
    assert batches.fill == pytest.approx(33 / 64)


@settings(max_examples=40, deadline=None)
@given(several, kinds)
def test_fill_is_the_share_of_slots_that_are_not_padding(masks, kind: str) -> None:
    shards = shards_of(masks, kind)
    if not is_trainable(shards):
        return
    batches = batches_of(shards)
    targets = [batches.batch(number).targets for number in range(batches.num_batches)]
    assert batches.fill == pytest.approx(sum((t != PAD).sum() for t in targets) / sum(t.size for t in targets))


@settings(max_examples=40, deadline=None)
@given(several, kinds, st.integers(1, 20))
def test_evaluation_has_every_unit_once_or_a_spread_part_of_the_batches(masks, kind: str, limit: int) -> None:
    shards = shards_of(masks, kind)
    if not is_trainable(shards):
        return
    batches = SequentialBucketBatches(shards, batch_tokens=400, length=LENGTH)  # type: ignore[arg-type]
    all_batches = list(batches.batches())
    numbers = [row[0] for batch in all_batches for row in rows_of(batch)]
    assert sorted(numbers) == sorted(set(range(shards.num_documents)) - lost(shards))
    assert batches.num_tokens == sum(int(batch.weights.sum()) for batch in all_batches)
    assert batches.num_bytes == pytest.approx(4 * batches.num_tokens, abs=1)
    limited = list(batches.batches(1, max_windows=limit))
    assert len(limited) == min(limit, batches.num_windows)
    places = [n * batches.num_windows // len(limited) for n in range(len(limited))]
    for batch, place in zip(limited, places, strict=True):
        assert np.array_equal(batch.tokens, all_batches[place].tokens)


def test_evaluation_with_the_ladder_of_training_has_no_other_shapes() -> None:
    masks = [document(4 + n, 2) for n in range(90)]
    train = batches_of(shards_of(masks, "chat"))
    validation = SequentialBucketBatches(
        shards_of(masks[::7], "chat"),  # type: ignore[arg-type]
        batch_tokens=400,
        length=LENGTH,
        ladder=train.ladder,
    )
    shapes = {train.batch(number).tokens.shape for number in range(train.num_batches)}
    assert {batch.tokens.shape for batch in validation.batches()} <= shapes


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 256), min_size=1, max_size=60), st.integers(256, 4000), st.integers(1, 2))
def test_a_fitted_ladder_needs_the_fewest_slots_of_all_with_its_number_of_lengths(
    needed: list[int], batch_tokens: int, rows_per_unit: int
) -> None:
    def slots(ladder: list[int]) -> int:
        total, rest = 0, sorted(needed)
        for rung in ladder:
            held = [need for need in rest if need <= rung]
            rest = rest[len(held) :]
            units = units_per_batch(rung, batch_tokens=batch_tokens, rows_per_unit=rows_per_unit)
            total += -(len(held) // -units) * units * rows_per_unit * rung
        return total

    fitted = fit_ladder(
        np.array(needed), batch_tokens=batch_tokens, length=256, rows_per_unit=rows_per_unit, num_lengths=2
    )
    tops = sorted({-(need // -8) * 8 for need in needed})
    least = min(slots(sorted({first, tops[-1]})) for first in tops)
    assert slots(fitted) <= max(least / 0.99, least)
    assert len([rung for rung in fitted if rung != 256]) <= 2


@pytest.mark.parametrize(("batch_tokens", "units"), [(10, 1), (300, 2), (799, 4), (800, 8), (1599, 8), (1700, 16)])
def test_units_of_a_batch_can_be_shared_by_one_two_four_and_eight_ranks(batch_tokens: int, units: int) -> None:
    assert units_per_batch(100, batch_tokens=batch_tokens, rows_per_unit=1) == units
    assert units_per_batch(50, batch_tokens=batch_tokens, rows_per_unit=2) == units


def test_what_cannot_be_batched_is_refused() -> None:
    chat = shards_of([document(9, 3)], "chat")
    with pytest.raises(ShardError, match="holds texts; expected conversations or preferences"):
        batches_of(Shards([document(9, 3)], kind="text"))
    with pytest.raises(ShardError, match="holds 3 documents; expected pairs"):
        batches_of(Shards([document(9, 3)] * 3, kind="preference"))
    with pytest.raises(ShardError, match="holds no answer within 96 tokens"):
        batches_of(Shards([], kind="chat"))
    with pytest.raises(ShardError, match=r"lengths is \[16, 97\]; expected lengths from 1 to 96"):
        batches_of(chat, ladder=[16, 97])
    with pytest.raises(ShardError, match="The rank is 2 of 2; expected 0 to 1"):
        batches_of(chat, rank=2, world_size=2)
    with pytest.raises(ShardError, match="2 batches from 0 on were asked for; expected one"):
        batches_of(chat).batch(0, 2)
    with pytest.raises(ShardError, match="batch_size is 4, max_windows None; expected 1"):
        next(SequentialBucketBatches(chat, batch_tokens=9, length=9).batches(4))  # type: ignore[arg-type]
    chat.complete = False
    with pytest.raises(ShardError, match="is not complete"):
        batches_of(chat)
