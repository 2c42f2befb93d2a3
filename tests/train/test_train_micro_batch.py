"""The cut of a step: any split has the same gradient, pairs stay together, and sizes follow from measured peaks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from anarcho_train import LinearPeak, MicroBatches, PreferenceConfig, StepSchedule, divisors, next_smaller
from anarcho_train.losses.torch_preference import PreferenceLoss
from anarcho_train.micro_batch import Rows
from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import LENGTH, VOCABULARY, CountingText, make_step

ROWS = 24
SIZES = (24, 12, 8, 6, 3)
"""In 1, 2, 3, 4 and 8 micro-batches."""
SCHEDULE = StepSchedule(lr_scale=1.0)


def make_rows(stage: str) -> Rows:
    """Rows of random tokens whose weights differ: any, those of conversations, or those of pairs with their reference."""
    numbers = np.random.default_rng(5)
    ids = numbers.integers(VOCABULARY, size=(ROWS, LENGTH + 1)).astype(np.int32)
    weights = numbers.random((ROWS, LENGTH)).astype(np.float32)
    if stage != "pre-training":
        weights = (weights > 0.4).astype(np.float32)
        weights[:, -1] = 1
    weights[4:6] = 0  # Padding.
    reference = numbers.normal(-8, 1, ROWS).astype(np.float32) if stage == "preference" else None
    return Rows(tokens=ids[:, :-1], targets=ids[:, 1:], weights=weights, reference=reference)


def cut(rows: Rows, size: int) -> list[Rows]:
    return [Rows.of(rows, first, first + size) for first in range(0, ROWS, size)]


def sizes_of(stage: str) -> list[int]:
    return [size for size in SIZES if stage != "preference" or size % 2 == 0]


@pytest.mark.parametrize("stage", ["pre-training", "tuning", "preference"])
def test_any_split_of_the_batch_has_the_same_gradient(stage):
    gradients = {}
    for size in sizes_of(stage):
        loss = PreferenceLoss(PreferenceConfig()) if stage == "preference" else None
        step = make_step(grad_clip=0.0, optimizer="sgd", loss=loss)
        step.train(cut(make_rows(stage), size), schedule=SCHEDULE)
        gradients[size] = [p.grad for p in step.model.parameters()]
    assert any(g.abs().max() > 1e-3 for g in gradients[ROWS])
    for size in gradients:
        for own, whole in zip(gradients[size], gradients[ROWS], strict=True):
            torch.testing.assert_close(own, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage", ["pre-training", "tuning", "preference"])
def test_any_split_of_the_batch_has_the_same_gradient_in_mlx(stage):
    pytest.importorskip("mlx.core")
    from anarcho_train.losses import mlx_preference

    from . import mlx_bigram

    moved = {}
    for size in sizes_of(stage):
        loss = mlx_preference.PreferenceLoss(PreferenceConfig()) if stage == "preference" else None
        step = mlx_bigram.make_step(optimizer="plain", grad_clip=0.0, loss=loss)
        before = {name: np.array(value) for name, value in mlx_bigram.flat(step.model.parameters()).items()}
        step.train(cut(make_rows(stage), size), schedule=SCHEDULE)
        after = mlx_bigram.flat(step.model.parameters())
        moved[size] = {name: (np.array(after[name]) - before[name]) / 0.05 for name in before}
    assert any(abs(change).max() > 1e-3 for change in moved[ROWS].values())
    for size in moved:
        for name, change in moved[size].items():
            np.testing.assert_allclose(change, moved[ROWS][name], atol=1e-5, rtol=0)


def test_the_next_smaller_size_divides_the_step_and_is_at_most_half():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert [next_smaller(size, sequences=12) for size in divisors(12)] == [None, 1, 1, 2, 3, 6]
    assert next_smaller(15, sequences=30) == 6


@given(rows=st.integers(1, 40), length=st.integers(1, 6), most=st.integers(1, 200))
@settings(max_examples=30, deadline=None)
def test_parts_of_a_batch_are_its_rows_in_order_and_part_no_pair(rows, length, most):
    ids = np.arange(rows * length).reshape(rows, length)
    parts = MicroBatches(samples=1, length=length, whole=True, tokens=most).parts(
        Rows(tokens=ids, targets=ids, weights=ids)
    )
    assert np.array_equal(np.concatenate([part.tokens for part in parts]), ids)
    assert all(len(part.tokens) % 2 == 0 for part in parts[:-1])
    assert all(part.tokens.size <= max(most, 2 * length) for part in parts)
    assert len({len(part.tokens) for part in parts[:-1]}) <= 1


@given(rows=st.lists(st.sampled_from([2, 4, 6, 8, 16, 24, 32]), min_size=1, max_size=4), length=st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_shrinking_halves_the_largest_batch_until_only_pairs_are_left(rows, length):
    batches = [
        Rows(tokens=ids, targets=ids, weights=ids) for ids in (np.zeros((n, length + i)) for i, n in enumerate(rows))
    ]
    micro = MicroBatches(samples=len(rows), length=64, whole=True)
    parts, largest = batches, max(b.tokens.size for b in batches if len(b.tokens) > 2) if max(rows) > 2 else 0
    while micro.shrink(parts):
        parts = [part for batch in batches for part in micro.parts(batch)]
        splittable = [part.tokens.size for part in parts if len(part.tokens) > 2]
        assert max(splittable, default=0) <= largest / 2
        largest = max(splittable, default=0)
    assert all(len(part.tokens) <= 2 for part in parts)


def test_micro_batches_of_sequences_read_the_same_samples_whatever_their_size():
    text, micro = CountingText(), MicroBatches(samples=8, length=LENGTH, size=8)
    whole = micro.of(text, 16, 8)
    assert micro.shrink(whole)
    assert [len(batch.tokens) for batch in micro.of(text, 16, 8)] == [4, 4]
    assert text.consumed == 2 * list(range(16, 24))
    assert str(micro) == "4 of 8 sequences"


def test_a_smaller_size_is_taken_up_again_unless_the_run_begins_with_another():
    shrunk = MicroBatches(samples=8, length=LENGTH, size=8)
    shrunk.shrink([])
    for begins, ends in ((8, 4), (2, 2)):
        again = MicroBatches(samples=8, length=LENGTH, size=begins)
        again.load_state(shrunk.state())
        assert again.size == ends
    unchanged = MicroBatches(samples=8, length=LENGTH, size=8)
    unchanged.load_state({})
    assert unchanged.size == 8


def test_the_line_through_two_peaks_says_what_a_size_takes():
    line = LinearPeak.fit({2: 1200, 4: 1400})
    assert (line.fixed_bytes, line.sequence_bytes, line(8)) == (1000, 100, 1800)
    assert LinearPeak.fit({2: 1500, 4: 1400})(64) == 1500  # Memory never falls: that was noise.
    with pytest.raises(ValueError, match="peaks of 1 micro-batches; expected two sizes at least"):
        LinearPeak.fit({2: 1})
