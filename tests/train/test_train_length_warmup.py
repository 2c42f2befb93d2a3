"""Sequences that grow: the same tokens in the same order, cut shorter at first, and exactly so after an interruption."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from anarcho_train import Loop, TrainConfig
from anarcho_train.micro_batch import Rows

from .conftest import LENGTH, Bigram, CountingText, make_step, run_until


def lengths(sequence_length: int, **settings: object) -> list[int]:
    config = TrainConfig(**settings)
    return [config.length_at(step, sequence_length) for step in range(config.steps)]


def test_lengths_double_at_equal_intervals_of_their_share_of_the_steps():
    assert lengths(64, steps=10, length_warmup=0.6, first_length=8) == [8] * 2 + [16] * 2 + [32] * 2 + [64] * 4
    assert lengths(2048, steps=20, length_warmup=0.3) == [256] * 2 + [512] * 2 + [1024] * 2 + [2048] * 14
    assert lengths(4, steps=3, length_warmup=1, first_length=2) == [2] * 3
    assert lengths(4, steps=2, length_warmup=0.01, first_length=1) == [1, 4]
    assert lengths(4, steps=2, first_length=3) == [4, 4]


@pytest.mark.parametrize("first", [64, 128, 3, 0, -8, 24])
def test_lengths_that_do_not_double_to_the_whole_one_are_refused(first):
    config = TrainConfig(length_warmup=0.5, first_length=first)
    with pytest.raises(
        ValueError, match=rf"first_length is {first}, .* of 64 tokens; expected one of 32, 16, 8, 4, 2, 1"
    ):
        config.length_at(0, 64)
    with pytest.raises(ValueError, match=r"of 65 tokens; expected train\.length_warmup = 0"):
        config.length_at(0, 65)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_from_0_to_1(share):
    with pytest.raises(ValueError, match=r"train\.length_warmup is .*; expected a share of the steps, from 0 to 1"):
        TrainConfig(length_warmup=share)


def test_rows_are_cut_into_sequences_that_follow_each_other():
    numbers = np.arange(24).reshape(2, 12)
    batch = Rows(tokens=numbers, targets=numbers + 1, weights=numbers * 0.5, segments=numbers // 5)
    cut = Rows.cut(batch, 3)
    assert cut.tokens.tolist() == numbers.reshape(8, 3).tolist()
    assert (cut.targets == cut.tokens + 1).all()
    assert (cut.weights == cut.tokens * 0.5).all()
    assert (cut.segments == cut.tokens // 5).all()
    assert cut.positions is None


def recorded(run) -> list[list[Rows]]:
    """What the step of a run is given from here on."""
    steps, inner = [], run.loop.step.train

    def train(micro_batches, *, schedule):
        steps.append(list(micro_batches))
        return inner(micro_batches, schedule=schedule)

    run.loop.step.train = train
    return steps


def test_a_run_reads_the_same_tokens_in_more_sequences_and_says_so(make_loop, tmp_path):
    whole, growing = make_loop(tmp_path / "whole"), make_loop(tmp_path / "growing", length_warmup=0.5, first_length=1)
    expected, found = recorded(whole), recorded(growing)
    assert whole.loop.run().tokens == growing.loop.run().tokens
    assert [step[0].tokens.shape for step in found] == [(16, 1)] * 3 + [(8, 2)] * 3 + [(4, LENGTH)] * 6
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            for name in ("tokens", "targets", "weights"):
                assert (getattr(a, name).ravel() == getattr(b, name).ravel()).all()
    told = [(line["step"], line["message"]) for line in growing.sink.of("event")]
    assert told == [(n, f"sequences have {size} tokens from here on") for n, size in ((0, 1), (3, 2), (6, LENGTH))]
    assert whole.sink.of("event") == []
    assert growing.text.consumed == whole.text.consumed
    # A model without attention does not care how its text is cut.
    torch.testing.assert_close(list(whole.loop.step.model.parameters()), list(growing.loop.step.model.parameters()))


@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_an_interrupted_run_goes_on_with_sequences_of_the_length_of_its_step(make_loop, tmp_path, stop_after):
    settings = {"length_warmup": 0.5, "first_length": 1, "checkpoint_every": 1}
    whole = make_loop(tmp_path / "whole", **settings)
    expected = recorded(whole)
    whole.loop.run()

    first = make_loop(tmp_path / "parts", **settings)
    run_until(first.loop, stop_after)
    second = make_loop(tmp_path / "parts", step=make_step(Bigram()), **settings)
    second.loop.resume(second.store.latest_valid())
    found = recorded(second)
    second.loop.run()
    assert [b.tokens.tolist() for s in found for b in s] == [
        b.tokens.tolist() for s in expected[stop_after:] for b in s
    ]
    pairs = zip(whole.loop.step.model.parameters(), second.loop.step.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_loop_refuses_before_the_first_step(make_loop):
    with pytest.raises(ValueError, match=r"train\.first_length is 256"):
        make_loop(length_warmup=0.5)
    run = make_loop().loop
    fields = {
        name: getattr(run, name) for name in ("step", "validation", "schedule", "checkpoints", "sink", "early_stopping")
    }
    config = TrainConfig(length_warmup=0.5, first_length=1)
    with pytest.raises(ValueError, match=r"length_warmup is 0\.5, but samples are whole batches.*expected 0"):
        Loop(batches=CountingText(), config=config, sequence_length=LENGTH, samples_per_step=2, **fields)
