"""The torch step: the gradient does not depend on the split, bad numbers change nothing, the state is exact and independent of order."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from anarcho_train import StepSchedule, TrainConfig
from anarcho_train.steps import torch as steps
from anarcho_train.steps.files import OPTIMIZER_FILE
from safetensors import safe_open

from .conftest import Bigram, CountingText, make_step

SCHEDULE = StepSchedule(lr_scale=1.0)


def split(rows: int, micro: int) -> list:
    text = CountingText()
    return [text.rows(range(i, i + micro)) for i in range(0, rows, micro)]


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_any_split_into_micro_batches_makes_the_same_update(micro):
    whole, parts = make_step(grad_clip=0.0), make_step(grad_clip=0.0)
    one = whole.train(split(8, 8), schedule=SCHEDULE)
    many = parts.train(split(8, micro), schedule=SCHEDULE)
    assert many.weight == one.weight == 8 * 4 - 3
    assert many.loss == pytest.approx(one.loss, rel=1e-6)
    assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-7, rtol=1e-5)


def test_the_gradient_is_that_of_the_weighted_mean():
    step = make_step(grad_clip=0.0)
    (batch,) = split(8, 8)
    torch.manual_seed(0)
    reference = Bigram()
    logprobs = reference.token_logprobs(torch.from_numpy(batch.tokens).long(), torch.from_numpy(batch.targets).long())
    weights = torch.from_numpy(batch.weights)
    (-(logprobs * weights).sum() / weights.sum()).backward()
    metrics = step.train([batch], schedule=SCHEDULE)
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in reference.parameters()))
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-5)
    assert metrics.loss == pytest.approx(math.log(13), abs=0.5)


def test_clipping_bounds_the_gradient_but_reports_its_norm():
    step = make_step(grad_clip=0.01)
    metrics = step.train(split(8, 4), schedule=SCHEDULE)
    assert metrics.grad_norm > 0.01
    clipped = math.sqrt(sum(float((p.grad**2).sum()) for p in step.model.parameters()))
    assert clipped == pytest.approx(0.01, rel=1e-3)


def test_the_schedule_scales_the_learning_rate_of_every_group():
    step = make_step()
    assert step.train(split(8, 8), schedule=StepSchedule(lr_scale=0.25)).learning_rates == {"group_0": 0.05 * 0.25}
    assert step.train(split(8, 8), schedule=StepSchedule(lr_scale=1.0)).learning_rates == {"group_0": 0.05}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_and_says_so(value):
    step = make_step()
    step.train(split(8, 8), schedule=SCHEDULE)
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    state = {name: t.clone() for name, t in step._files.state_tensors().items()}
    (batch,) = split(8, 8)
    batch.weights[0, 0] = value
    assert step.train([batch], schedule=SCHEDULE).skipped
    assert all(torch.equal(p, before[name]) for name, p in step.model.named_parameters())
    assert all(torch.equal(t, state[name]) for name, t in step._files.state_tensors().items())
    assert not step.train(split(8, 8), schedule=SCHEDULE).skipped


def test_evaluation_is_a_sum_that_adds_up_and_trains_nothing():
    step = make_step()
    before = [p.detach().clone() for p in step.model.parameters()]
    whole = step.evaluate(split(8, 8)[0])
    parts = [step.evaluate(batch) for batch in split(8, 2)]
    assert sum(p.loss for p in parts) == pytest.approx(whole.loss, rel=1e-6)
    assert sum(p.weight for p in parts) == whole.weight
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_restored_step_continues_bit_for_bit(tmp_path, optimizer):
    step = make_step(optimizer=optimizer)
    for _ in range(3):
        step.train(split(8, 4), schedule=SCHEDULE)
    torch.rand(7)
    step.save(tmp_path)
    expected_noise = torch.rand(3)
    torch.manual_seed(99)
    restored = make_step(Bigram(), optimizer=optimizer)
    restored.load(tmp_path)
    assert torch.equal(torch.rand(3), expected_noise)
    for s in (step, restored):
        s.train(split(8, 4), schedule=SCHEDULE)
    assert all(torch.equal(a, b) for a, b in zip(step.model.parameters(), restored.model.parameters(), strict=True))


def test_optimizer_state_has_canonical_names(tmp_path):
    step = make_step()
    step.train(split(8, 4), schedule=SCHEDULE)
    step.save(tmp_path)
    with safe_open(tmp_path / OPTIMIZER_FILE, framework="pt") as file:
        names = set(file.keys())
    assert {
        "hidden.weight.exp_avg",
        "hidden.weight.exp_avg_sq",
        "hidden.weight.step",
        "embedding.weight.exp_avg",
    } <= names


def test_the_state_of_another_model_is_refused_by_name(tmp_path):
    step = make_step()
    step.train(split(8, 4), schedule=SCHEDULE)
    step.save(tmp_path)

    class Wider(Bigram):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = torch.nn.Linear(8, 8, bias=False)

    other = make_step(Wider())
    other._files._load_model = lambda model, directory: None
    with pytest.raises(
        ValueError, match=r"optimizer.safetensors holds hidden.bias.exp_avg, which this optimizer and model do not have"
    ):
        other.load(tmp_path)


def test_a_failing_compiler_is_left_behind(monkeypatch):
    messages: list[str] = []
    eager = make_step()
    step = make_step()
    step.compiled, step._may_fall_back, step._notify = True, True, messages.append

    def fail(*args, **kwargs):
        raise torch._dynamo.exc.TorchDynamoException("no compiler")

    monkeypatch.setattr(step._passes, "logprobs", fail)
    assert step.train(split(8, 8), schedule=SCHEDULE) == eager.train(split(8, 8), schedule=SCHEDULE)
    assert len(messages) == 1
    assert "training goes on without it" in messages[0]


def test_an_error_of_the_model_is_not_taken_for_one_of_the_compiler(monkeypatch):
    step = make_step()
    step.compiled = step._may_fall_back = True
    monkeypatch.setattr(
        step._passes, "logprobs", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("shapes do not match"))
    )
    with pytest.raises(RuntimeError, match="shapes do not match"):
        step.train(split(8, 8), schedule=SCHEDULE)


CPU, MPS, CUDA = (torch.device(name) for name in ("cpu", "mps", "cuda"))


@pytest.mark.parametrize(
    ("device", "macos", "expected"),
    [(MPS, "14.2", torch.bfloat16), (MPS, "13.6", torch.float16), (MPS, "26.0", torch.bfloat16)],
)
def test_automatic_precision_on_mps_depends_on_the_system_version(monkeypatch, device, macos, expected):
    monkeypatch.setattr("platform.mac_ver", lambda: (macos, ("", "", ""), "arm64"))
    assert steps.resolve_precision("auto", device) == expected


def test_automatic_precision_follows_what_the_hardware_has(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False}, raising=False)
    assert steps.resolve_precision("auto", CPU) == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert steps.resolve_precision("auto", CPU) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert steps.resolve_precision("auto", CUDA) == torch.float16
    with pytest.raises(ValueError, match=r"train.precision is float16 on the CPU"):
        steps.resolve_precision("float16", CPU)


def test_automatic_compilation_needs_a_compiler_and_a_long_run(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    (tmp_path / "Python.h").touch()
    assert steps.resolve_compile("auto", CPU, flops=1e15)
    assert not steps.resolve_compile("auto", CPU, flops=1e9)
    assert not steps.resolve_compile("auto", MPS, flops=1e15)
    assert steps.resolve_compile("auto", CUDA, flops=0)
    assert steps.resolve_compile("on", CPU, flops=0)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": "/nowhere"})
    assert not steps.resolve_compile("auto", CPU, flops=1e15)
    monkeypatch.undo()
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not steps.resolve_compile("auto", CPU, flops=1e15)


def test_float16_scales_the_loss_and_survives_an_overflow(monkeypatch, tmp_path):
    monkeypatch.setattr(steps, "resolve_precision", lambda name, device: torch.float16)
    step = make_step(grad_clip=0.0)
    reference = make_step(grad_clip=0.0, precision="float32")
    step.precision = torch.float32  # The arithmetic stays exact: what is tested is the scaling around it.
    assert step._scaler.is_enabled()
    ours, theirs = step.train(split(8, 4), schedule=SCHEDULE), reference.train(split(8, 4), schedule=SCHEDULE)
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
    scale = step._scaler.get_scale()
    (batch,) = split(8, 8)
    batch.weights[0, 0] = np.inf
    assert step.train([batch], schedule=SCHEDULE).skipped
    assert step._scaler.get_scale() == scale / 2
    step.save(tmp_path)
    restored = make_step(Bigram())
    restored.load(tmp_path)
    assert restored._scaler.get_scale() == scale / 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("micro_batch", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("grad_clip", -1.0),
        ("rank_timeout_seconds", 1e300),
        ("precision", "half"),
    ],
)
def test_a_bad_setting_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=f"train.{key}"):
        TrainConfig(**{key: value})


def test_the_largest_seed_is_one_that_the_generator_takes():
    torch.manual_seed(TrainConfig(seed=2**63 - 1).seed)


def test_a_batch_that_is_no_multiple_of_the_sequence_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"train.batch_tokens is 1000.*use 1024"):
        TrainConfig(batch_tokens=1000).batch_sequences(256)
