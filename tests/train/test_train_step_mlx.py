"""The MLX step: the gradient does not depend on the split, bad numbers change nothing, nothing is traced twice, the state is exact."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

pytest.importorskip("mlx.core")

import mlx.core as mx
import mlx.nn as nn
from anarcho_train import StepSchedule, TrainingDraws
from anarcho_train.steps import mlx as steps
from anarcho_train.steps.files import OPTIMIZER_FILE, RUNTIME_FILE
from anarcho_train.steps.mlx_state import optimizer_arrays
from anarcho_train.steps.scaling import LossScale
from mlx.utils import tree_map
from safetensors import safe_open
from safetensors.numpy import save_file

from .conftest import CountingText
from .mlx_bigram import Bigram, Noisy, flat, make_step, same

SCHEDULE = StepSchedule(lr_scale=1.0)


def split(rows: int, micro: int) -> list:
    text = CountingText()
    return [text.rows(range(i, i + micro)) for i in range(0, rows, micro)]


def snapshot(step: steps.MlxStep) -> tuple:
    return tuple(tree_map(mx.array, tree) for tree in (step.model.parameters(), step.optimizer.state))


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_any_split_into_micro_batches_makes_the_same_update(micro):
    whole, parts = (make_step(optimizer="plain", grad_clip=0.0) for _ in range(2))
    one = whole.train(split(8, 8), schedule=SCHEDULE)
    many = parts.train(split(8, micro), schedule=SCHEDULE)
    assert many.weight == one.weight == 8 * 4 - 3
    assert many.loss == pytest.approx(one.loss, rel=1e-6)
    assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    for name, value in flat(whole.model.parameters()).items():
        np.testing.assert_allclose(flat(parts.model.parameters())[name], value, atol=1e-7, rtol=1e-5)


def test_the_update_is_that_of_the_weighted_mean():
    step = make_step(optimizer="plain", grad_clip=0.0)
    (batch,) = split(8, 8)
    mx.random.seed(0)
    reference = Bigram()
    weights = mx.array(batch.weights)

    def loss():
        logprobs = reference.token_logprobs(mx.array(batch.tokens), mx.array(batch.targets))
        return -(logprobs * weights).sum() / weights.sum()

    value, gradients = nn.value_and_grad(reference, loss)()
    metrics = step.train([batch], schedule=SCHEDULE)
    norm = math.sqrt(sum(mx.square(g).sum().item() for g in flat(gradients).values()))
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-5)
    assert metrics.loss == pytest.approx(value.item(), rel=1e-6)
    mx.random.seed(0)
    start = flat(Bigram().parameters())
    for name, gradient in flat(gradients).items():
        expected = start[name] - 0.05 * gradient
        np.testing.assert_allclose(flat(step.model.parameters())[name], expected, atol=1e-7, rtol=1e-5)


def test_clipping_bounds_the_update_but_reports_the_norm():
    free, bound = make_step(optimizer="plain", grad_clip=0.0), make_step(optimizer="plain", grad_clip=0.01)
    start = snapshot(free)[0]
    norms = [step.train(split(8, 4), schedule=SCHEDULE).grad_norm for step in (free, bound)]
    assert norms[0] == norms[1] > 0.01
    moved = tree_map(lambda a, b: mx.square(a - b).sum(), bound.model.parameters(), start)
    assert math.sqrt(sum(v.item() for v in flat(moved).values())) == pytest.approx(0.05 * 0.01, rel=1e-3)


def test_the_schedule_scales_the_learning_rate():
    step = make_step()
    rate = step.train(split(8, 8), schedule=StepSchedule(lr_scale=0.25)).learning_rates
    assert rate == {"group_0": pytest.approx(0.05 * 0.25)}
    assert step.optimizer.learning_rate.item() == pytest.approx(0.05 * 0.25)
    assert step.train(split(8, 8), schedule=SCHEDULE).learning_rates == {"group_0": pytest.approx(0.05)}


@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_and_says_so(value, compiled):
    step = make_step(compile=compiled)
    step.train(split(8, 8), schedule=SCHEDULE)
    before = snapshot(step)
    (batch,) = split(8, 8)
    batch.weights[0, 0] = value
    assert step.train([batch], schedule=SCHEDULE).skipped
    assert same(snapshot(step), before)
    assert not step.train(split(8, 8), schedule=SCHEDULE).skipped


def test_padding_rows_count_nothing_and_a_step_of_padding_alone_changes_nothing():
    with_padding, without = (make_step(optimizer="plain") for _ in range(2))
    (batch,), (padding,) = split(8, 8), split(8, 8)
    padding.weights[:] = 0
    one = without.train([batch], schedule=SCHEDULE)
    assert with_padding.train([padding, batch], schedule=SCHEDULE) == one
    assert same(with_padding.model.parameters(), without.model.parameters())
    before = snapshot(without)
    nothing = without.train([padding], schedule=SCHEDULE)
    assert nothing.skipped
    assert math.isnan(nothing.loss)
    assert same(snapshot(without), before)


def test_frozen_parameters_stay_and_have_no_state(tmp_path):
    mx.random.seed(0)
    model = Bigram()
    model.hidden.freeze()
    frozen = {name: mx.array(value) for name, value in flat(model.hidden.parameters()).items()}
    step = make_step(model)
    before = mx.array(model.head.weight)
    step.train(split(8, 4), schedule=SCHEDULE)
    assert same(model.hidden.parameters(), frozen)
    assert not mx.array_equal(model.head.weight, before)
    assert not any(name.startswith("hidden") for name in optimizer_arrays(step.optimizer, step.model))


def test_evaluation_is_a_sum_that_adds_up_and_trains_nothing():
    step = make_step()
    before = snapshot(step)
    whole = step.evaluate(split(8, 8)[0])
    parts = [step.evaluate(batch) for batch in split(8, 2)]
    assert sum(p.loss for p in parts) == pytest.approx(whole.loss, rel=1e-6)
    assert sum(p.weight for p in parts) == whole.weight
    assert same(snapshot(step), before)
    answers = step.answer_logprobs(split(8, 8)[0])
    assert answers.dtype == np.float32
    assert answers.shape == (8,)
    assert -answers.sum() == pytest.approx(whole.loss, rel=1e-6)


def test_nothing_is_traced_again_after_the_first_of_its_shape_while_schedules_change():
    step = make_step(compile="on")
    batches, evaluation = split(8, 4), split(6, 6)[0]
    step.train(batches, schedule=SCHEDULE)
    step.evaluate(evaluation)
    step.evaluate(batches[0])
    warm = step.traces
    assert (
        warm == 6
    )  # Two for the first and the later micro-batches, the norm, the update, and an evaluation of each shape.
    losses = []
    for number in range(200):
        schedule = StepSchedule(lr_scale=1 - number / 250, number=number)
        losses.append(step.train(batches, schedule=schedule).loss)
        if number % 50 == 0:
            step.evaluate(evaluation)
            step.answer_logprobs(evaluation)
    assert step.traces == warm
    assert losses[-1] < 0.2 * losses[0]


def test_a_compiled_step_makes_the_updates_of_the_plain_one():
    plain, compiled = make_step(), make_step(compile="on")
    for number in range(3):
        schedule = StepSchedule(lr_scale=1 / (number + 1), number=number)
        a, b = (step.train(split(8, 4), schedule=schedule) for step in (plain, compiled))
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
    for name, value in flat(plain.model.parameters()).items():
        np.testing.assert_allclose(flat(compiled.model.parameters())[name], value, atol=1e-5)


def test_batches_of_too_many_shapes_run_uncompiled_and_one_sentence_says_so(monkeypatch):
    monkeypatch.setattr(steps, "MAX_COMPILED_SHAPES", 1)
    messages: list[str] = []
    step = make_step(compile="on", notify=messages.append)
    plain = make_step()
    for rows in (4, 2, 3):
        assert step.evaluate(split(rows, rows)[0]).loss == pytest.approx(plain.evaluate(split(rows, rows)[0]).loss)
    assert step.traces == 1
    assert len(messages) == 1
    assert "more than 1 shapes" in messages[0]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("compiled", ["off", "on"])
def test_a_restored_step_continues_bit_for_bit(tmp_path, optimizer, compiled):
    step = make_step(optimizer=optimizer, compile=compiled)
    for _ in range(3):
        step.train(split(8, 4), schedule=SCHEDULE)
    mx.random.uniform(shape=(7,))
    step.save(tmp_path)
    expected_noise = mx.random.uniform(shape=(3,))
    mx.random.seed(99)
    restored = make_step(Bigram(), optimizer=optimizer, compile=compiled)
    restored.train(split(8, 4), schedule=SCHEDULE)  # What it has compiled must see the loaded state.
    restored.load(tmp_path)
    assert mx.array_equal(mx.random.uniform(shape=(3,)), expected_noise)
    for s in (step, restored):
        s.train(split(8, 4), schedule=SCHEDULE)
    assert same(snapshot(step), snapshot(restored))


def test_a_generator_that_the_model_draws_from_is_advanced_and_restored(tmp_path):
    class WithDropout(Bigram):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def token_logprobs(self, tokens, targets, **_):
            logits = self.head(self.dropout(self.embedding(tokens)))
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            return mx.take_along_axis(logprobs, targets[..., None], axis=-1).squeeze(-1)

    step = make_step(WithDropout(), optimizer="plain", compile="on")
    still = StepSchedule(lr_scale=0.0)
    losses = [step.train(split(8, 8), schedule=still).loss for _ in range(2)]
    assert losses[0] != losses[1]
    step.save(tmp_path)
    expected = step.train(split(8, 8), schedule=still).loss
    step.load(tmp_path)
    assert step.train(split(8, 8), schedule=still).loss == expected


def test_the_state_of_another_model_is_refused_by_name_and_shape_before_anything_changes(tmp_path):
    step = make_step()
    step.train(split(8, 4), schedule=SCHEDULE)
    step.save(tmp_path)
    arrays = {name: np.array(value) for name, value in optimizer_arrays(step.optimizer, step.model).items()}
    before = snapshot(step)
    bad = {
        "holds hidden.other.m, which this optimizer and model do not have": arrays | {"hidden.other.m": np.zeros(8)},
        "lacks hidden.bias.m": {name: value for name, value in arrays.items() if name != "hidden.bias.m"},
        r"holds hidden.bias.m of shape \(9,\); expected \(8,\)": arrays | {"hidden.bias.m": np.zeros(9)},
    }
    for message, content in bad.items():
        save_file(content, tmp_path / OPTIMIZER_FILE)
        with pytest.raises(ValueError, match=rf"optimizer.safetensors {message}"):
            step.load(tmp_path)
        assert same(snapshot(step)[1], before[1])


@pytest.mark.skipif(not steps.Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path):
    step = make_step()
    (tmp_path / OPTIMIZER_FILE).symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot be written .*free space there and resume the run"):
        step.save(tmp_path)


def test_memory_stays_flat_over_the_steps():
    step = make_step(compile="on")
    batches = split(8, 4)
    readings = []
    for number in range(120):
        step.train(batches, schedule=StepSchedule(lr_scale=1 - number / 200))
        step.evaluate(batches[0])
        mx.synchronize()  # The update goes on when the step is back.
        readings.append(mx.get_active_memory())
    # An array that is freed a moment late is counted on a busy machine; what keeps a number at every step is seen all the same.
    steps_between, smallest = 100 - 50, mx.float32.size
    assert statistics.median(readings[80:]) - statistics.median(readings[20:80]) < steps_between * smallest


def test_noise_is_a_function_of_seed_step_and_row_and_never_in_an_evaluation():
    draws = TrainingDraws(seed=3, dim=8, neftune_alpha=5.0)

    def noisy(noise: TrainingDraws | None) -> steps.MlxStep:
        mx.random.seed(0)
        return make_step(Noisy(), optimizer="plain", grad_clip=0.0, draws=noise)

    whole, parts, silent = noisy(draws), noisy(draws), noisy(None)
    assert whole.evaluate(split(8, 8)[0]) == silent.evaluate(split(8, 8)[0])
    one = whole.train(split(8, 8), schedule=StepSchedule(lr_scale=1.0, number=5))
    assert parts.train(split(8, 2), schedule=StepSchedule(lr_scale=1.0, number=5)).loss == pytest.approx(
        one.loss, rel=1e-6
    )
    assert silent.train(split(8, 8), schedule=SCHEDULE).loss != pytest.approx(one.loss, rel=1e-4)


def test_noise_that_the_model_does_not_take_is_refused_in_one_sentence():
    step = make_step(draws=TrainingDraws(seed=3, dim=8, neftune_alpha=5.0))
    with pytest.raises(
        ValueError, match=r"embedding_noise, which Bigram.token_logprobs does not take.*neftune_alpha = 0"
    ):
        step.train(split(8, 8), schedule=SCHEDULE)


def test_automatic_precision_is_bfloat16_on_a_gpu_and_float32_on_the_cpu():
    gpu, cpu = mx.Device(mx.gpu), mx.Device(mx.cpu)
    assert steps.resolve_precision("auto", gpu) == mx.bfloat16
    assert steps.resolve_precision("auto", cpu) == mx.float32
    assert steps.resolve_precision("float16", gpu) == mx.float16
    with pytest.raises(ValueError, match=r"train.precision is float16 on the CPU"):
        steps.resolve_precision("float16", cpu)


def test_automatic_compilation_needs_a_gpu_or_a_long_run():
    gpu, cpu = mx.Device(mx.gpu), mx.Device(mx.cpu)
    assert steps.resolve_compile("auto", gpu, flops=0)
    assert not steps.resolve_compile("auto", cpu, flops=1e9)
    assert steps.resolve_compile("auto", cpu, flops=1e15)
    assert steps.resolve_compile("on", cpu, flops=0)
    assert not steps.resolve_compile("off", gpu, flops=1e15)


def test_a_model_is_told_its_compute_type_and_one_without_stays_float32():
    model = Bigram()
    assert make_step(model, precision="bfloat16").precision == mx.bfloat16
    assert model.compute_dtype == mx.bfloat16
    assert all(value.dtype == mx.float32 for value in flat(model.parameters()).values())

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2)

        def token_logprobs(self, tokens, targets):
            return self.head(tokens)

    assert make_step(Fixed(), precision="auto").precision == mx.float32
    with pytest.raises(ValueError, match=r"train.precision is bfloat16, but Fixed has no compute_dtype"):
        make_step(Fixed(), precision="bfloat16")


def test_float16_scales_the_loss_and_survives_an_overflow(monkeypatch, tmp_path):
    monkeypatch.setattr(steps, "resolve_precision", lambda name, device: mx.float16)
    step = make_step(grad_clip=0.0)
    step.model.compute_dtype = mx.float32  # The arithmetic stays exact: what is tested is the scaling around it.
    monkeypatch.undo()
    reference = make_step(grad_clip=0.0)
    ours, theirs = step.train(split(8, 4), schedule=SCHEDULE), reference.train(split(8, 4), schedule=SCHEDULE)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
    for name, value in flat(reference.model.parameters()).items():
        np.testing.assert_allclose(flat(step.model.parameters())[name], value, atol=1e-5)
    (batch,) = split(8, 8)
    batch.weights[0, 0] = np.inf
    assert step.train([batch], schedule=SCHEDULE).skipped
    assert step._scale == LossScale(scale=32768.0, growth_tracker=0)
    step.train(split(8, 4), schedule=SCHEDULE)
    step.save(tmp_path)
    with safe_open(tmp_path / RUNTIME_FILE, framework="np") as file:
        assert set(file.keys()) == {"rng.mlx", "loss_scale", "growth_tracker"}
        assert (file.get_tensor("loss_scale").dtype, file.get_tensor("loss_scale").shape) == (np.float32, ())
        assert (file.get_tensor("growth_tracker").dtype, file.get_tensor("growth_tracker").shape) == (np.int64, ())
    step._scale.scale = 1.0
    step.load(tmp_path)
    assert step._scale == LossScale(scale=32768.0, growth_tracker=1)


def test_the_loss_scale_has_the_constants_of_torch():
    import torch

    state = torch.amp.GradScaler("cpu").state_dict()
    scale = LossScale()
    assert (scale.scale, scale.growth_tracker) == (state["scale"], state["_growth_tracker"])
    for _ in range(state["growth_interval"]):
        assert scale.scale == state["scale"]
        scale.update(finite=True)
    assert scale == LossScale(scale=state["scale"] * state["growth_factor"], growth_tracker=0)
    scale.update(finite=False)
    assert scale == LossScale(scale=state["scale"] * state["growth_factor"] * state["backoff_factor"])


def test_the_loop_runs_stops_and_resumes_with_it(make_loop, tmp_path):
    whole = make_loop(tmp_path / "whole", step=make_step())
    whole.loop.run()
    first = make_loop(tmp_path / "parts", step=make_step(), steps=6)
    first.loop.run()
    mx.random.seed(5)
    second = make_loop(tmp_path / "parts", step=make_step(Bigram()))
    second.loop.resume(second.store.latest_valid())
    second.loop.run()
    assert same(whole.loop.step.model.parameters(), second.loop.step.model.parameters())
    assert whole.text.consumed == first.text.consumed + second.text.consumed
