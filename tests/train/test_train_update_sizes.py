"""The size of updates beside the weights: exact for small tensors, close for large ones, the same in both frameworks, only where logged."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from anarcho_train import StepSchedule
from anarcho_train.steps import weight_samples
from anarcho_train.steps.torch_updates import UpdateSizes
from hypothesis import given
from hypothesis import strategies as st

from .conftest import CountingText, make_step

MEASURED = StepSchedule(lr_scale=1.0, measure_update=True)


@given(size=st.integers(1, 10**9))
def test_every_tensor_is_sampled_evenly_and_never_more_than_the_limit(size):
    step = weight_samples.stride(size)
    count = len(range(0, size, step))
    assert step % 2 == 1
    assert min(size, weight_samples.SAMPLED_WEIGHTS) / 3.01 <= count <= weight_samples.SAMPLED_WEIGHTS


def test_the_ratio_is_that_of_the_norms_over_a_whole_group():
    step = make_step(optimizer="sgd")
    before = [p.detach().clone() for p in step.model.parameters()]
    ratios = step.train([CountingText().rows(range(8))], schedule=MEASURED).update_ratios
    after = list(step.model.parameters())
    moved = math.sqrt(sum(float((a - b).detach().square().sum()) for a, b in zip(after, before, strict=True)))
    assert ratios == {"group_0": pytest.approx(moved / math.sqrt(sum(float(b.square().sum()) for b in before)))}


def test_a_sample_of_a_large_tensor_gives_the_ratio_within_two_per_cent():
    torch.manual_seed(0)
    large, small = torch.nn.Parameter(torch.randn(1024, 768)), torch.nn.Parameter(torch.randn(512))
    sizes = UpdateSizes({"all": [large, small], "nothing but zeros": [torch.zeros(8)]})
    update = torch.randn(1024, 768) * torch.linspace(0, 0.02, 768)  # Another size in each column.
    norm = math.sqrt(float(large.detach().square().sum() + small.detach().square().sum()))
    with torch.no_grad():
        large += update
    assert sizes.ratios() == {"all": pytest.approx(float(update.norm()) / norm, rel=0.02)}


def test_nothing_is_measured_where_nobody_asks_and_nothing_is_reported_of_a_step_without_an_update():
    step = make_step()
    assert step.train([CountingText().rows(range(8))], schedule=StepSchedule(lr_scale=1.0)).update_ratios == {}
    batch = CountingText().rows(range(8))
    batch.weights[0, 0] = math.nan
    assert step.train([batch], schedule=MEASURED).update_ratios == {}


def test_measuring_changes_no_bit_of_the_training():
    plain, measured = make_step(), make_step()
    for number in range(3):
        batch = CountingText().rows(range(8 * number, 8 * number + 8))
        one = plain.train([batch], schedule=StepSchedule(lr_scale=1.0))
        two = measured.train([batch], schedule=MEASURED)
        assert dataclasses.replace(two, update_ratios={}) == one
    pairs = zip(plain.model.parameters(), measured.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_loop_asks_at_the_steps_that_it_logs_and_logs_them_by_group(make_loop):
    run = make_loop(steps=7, log_every=3)
    asked = []
    inner = run.loop.step.train

    def train(micro_batches, *, schedule):
        asked.append(schedule.measure_update)
        return inner(micro_batches, schedule=schedule)

    run.loop.step.train = train
    run.loop.run()
    assert asked == [False, False, True, False, False, True, True]
    assert [line["step"] for line in run.sink.of("train")] == [3, 6, 7]
    assert all(0 < line["update_ratio_group_0"] < 1 for line in run.sink.of("train"))


def test_both_frameworks_measure_the_same_update():
    pytest.importorskip("mlx.core")
    from . import mlx_bigram

    ours = mlx_bigram.make_step(optimizer="plain")
    theirs, start = make_step(optimizer="sgd"), mlx_bigram.flat(ours.model.parameters())
    with torch.no_grad():
        for name, parameter in theirs.model.named_parameters():
            parameter.copy_(torch.from_numpy(np.array(start[name])))
    batch = CountingText().rows(range(8))
    mine, others = (step.train([batch], schedule=MEASURED).update_ratios for step in (ours, theirs))
    assert mine == {"group_0": pytest.approx(others["group_0"], rel=1e-5)}


def test_mlx_compares_the_weights_of_before_and_after_by_group():
    mx = pytest.importorskip("mlx.core")
    from anarcho_train.steps import mlx_updates

    from . import mlx_bigram

    model = mlx_bigram.Bigram()
    model.embedding.freeze()
    groups = [{"params": ["hidden.weight", "embedding.weight"]}, {"params": ["head.weight"]}]
    members = mlx_updates.members(model, groups, ["hidden", "head"])
    assert members == {"hidden": ["hidden.weight"], "head": ["head.weight"]}
    sizes = mlx_updates.UpdateSizes(model, members)
    model.hidden.weight = 1.5 * model.hidden.weight
    mx.eval(model.parameters())
    assert sizes.ratios() == {"hidden": pytest.approx(0.5), "head": 0.0}
