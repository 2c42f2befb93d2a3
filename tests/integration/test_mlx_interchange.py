"""The two back-ends train alike: from one weights file they make the same updates, and either goes on with what the other saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("mlx.core")

import mlx.core as mx
import torch
from anarcho_model import InitConfig, ModelConfig, mlx, weights, weights_mlx
from anarcho_model import torch as torch_model
from anarcho_optim import OptimConfig, schedules
from anarcho_optim import mlx as mlx_optim
from anarcho_optim import torch as torch_optim
from anarcho_train import PreferenceConfig, StepSchedule, TrainConfig
from anarcho_train.losses import mlx_preference, torch_preference
from anarcho_train.steps.mlx import MlxStep
from anarcho_train.steps.torch import TorchStep
from mlx.utils import tree_flatten
from safetensors import safe_open

LENGTH, ROWS, VOCABULARY = 16, 4, 61
MODEL = ModelConfig(
    vocab_size=VOCABULARY, context_length=LENGTH, num_layers=2, dim=32, num_heads=4, num_kv_heads=2, hidden_dim=48
)
# Otherwise the iteration is bfloat16 on processors that have it, in one back-end alone.
OPTIM = OptimConfig(lr=0.005, warmup_steps=3, momentum_warmup_steps=20, weight_decay=0.1, ns_dtype="float32")
TRAIN = TrainConfig(precision="float32", compile="off", batch_tokens=2 * ROWS * LENGTH)
DPO = PreferenceConfig()


class Rows(NamedTuple):
    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    positions: np.ndarray | None
    segments: np.ndarray | None
    reference: np.ndarray | None = None


def batch(number: int, *, stage: str) -> Rows:
    """A batch of packed documents, whose tokens count upwards by a stride of their own; tuned ones have masked prompts and padding."""
    random = np.random.default_rng((7, number))
    cuts = random.integers(4, LENGTH - 4, ROWS)
    columns = np.arange(LENGTH + 1)
    segments = (columns >= cuts[:, None]).astype(np.int32)
    positions = np.where(segments == 0, columns, columns - cuts[:, None]).astype(np.int32)
    starts, strides = random.integers(VOCABULARY, size=(ROWS, 2)), random.integers(1, 4, size=(ROWS, 2))
    if stage == "dpo":  # The stride tells the chosen answers from the rejected ones.
        strides = np.array([[1, 1], [2, 2]] * (ROWS // 2))
    ids = (np.take_along_axis(starts, segments, 1) + positions * np.take_along_axis(strides, segments, 1)) % VOCABULARY
    counted = np.ones((ROWS, LENGTH), np.float32)
    if stage != "pretrain":
        counted[:, :3] = 0
        counted[-2:, -3:] = 0
    tokens, targets = ids[:, :-1].astype(np.int32), ids[:, 1:].astype(np.int32)
    if stage == "dpo":
        return Rows(tokens, targets, counted, None, None)
    return Rows(tokens, targets, counted, positions[:, :-1], segments[:, :-1])


def schedule(number: int) -> StepSchedule:
    scale = schedules.lr_scale(OPTIM, number, total_steps=50)
    return StepSchedule(lr_scale=scale, momentum=schedules.momentum(OPTIM, number), number=number)


def torch_step(start: Path, *, stage: str) -> TorchStep:
    model = torch_model.GPT(MODEL)
    weights.load_weights(model, start)
    return TorchStep(
        model,
        torch_optim.MuonAdamW(torch_optim.param_groups(model, config=OPTIM)),
        config=TRAIN,
        loss=torch_preference.PreferenceLoss(DPO) if stage == "dpo" else None,
        save_model=lambda m, directory: weights.save_pretrained(m, directory, eos_token_id=0, pad_token_id=1),
        load_model=weights.load_weights,
    )


def mlx_step(start: Path, *, stage: str, **settings: Any) -> MlxStep:
    model = mlx.GPT(MODEL)
    weights_mlx.load_weights(model, start)
    return MlxStep(
        model,
        mlx_optim.MuonAdamW(mlx_optim.param_groups(model, config=OPTIM)),
        config=TrainConfig(**{"precision": "float32", "compile": "off", "batch_tokens": TRAIN.batch_tokens} | settings),
        loss=mlx_preference.PreferenceLoss(DPO) if stage == "dpo" else None,
        save_model=lambda m, directory: weights_mlx.save_pretrained(m, directory, eos_token_id=0, pad_token_id=1),
        load_model=weights_mlx.load_weights,
    )


def parameters(step: TorchStep | MlxStep) -> dict[str, np.ndarray]:
    if isinstance(step, MlxStep):
        return {name: np.array(value) for name, value in tree_flatten(step.model.parameters())}
    return {name: value.detach().numpy().copy() for name, value in step.model.named_parameters()}


def distance(one: TorchStep | MlxStep, other: TorchStep | MlxStep) -> float:
    a, b = parameters(one), parameters(other)
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def train(step: TorchStep | MlxStep, numbers: range, *, stage: str, references: dict | None = None) -> list[float]:
    losses = []
    for number in numbers:
        batches = [batch(2 * number + i, stage=stage) for i in range(2)]
        if references is not None:
            batches = [rows._replace(reference=references[2 * number + i]) for i, rows in enumerate(batches)]
        losses.append(step.train(batches, schedule=schedule(number)).loss)
    return losses


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("start")
    model = torch_model.GPT(MODEL)
    model.init_weights(seed=1, init=InitConfig(zero_residual_outputs=False))
    weights.save_pretrained(model, directory, eos_token_id=0, pad_token_id=1)
    return directory


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_both_make_the_same_updates_from_the_same_weights_and_batches(start, stage):
    ours, theirs = mlx_step(start, stage=stage), torch_step(start, stage=stage)
    caches = (None, None)
    if stage == "dpo":
        caches = tuple(
            {number: step.answer_logprobs(batch(number, stage=stage)) for number in range(100)}
            for step in (ours, theirs)
        )
        for number in range(100):
            np.testing.assert_allclose(caches[0][number], caches[1][number], rtol=1e-4)
    curves = []
    for numbers in (range(3), range(3, 50)):
        pair = [
            train(step, numbers, stage=stage, references=cache)
            for step, cache in zip((ours, theirs), caches, strict=True)
        ]
        np.testing.assert_allclose(pair[0], pair[1], atol=1e-3)
        assert distance(ours, theirs) < 1e-4
        curves += pair[0]
    assert np.mean(curves[-5:]) < np.mean(curves[:5])
    held_out = batch(10_000, stage="sft") if stage != "dpo" else batch(0, stage=stage)._replace(reference=caches[0][0])
    assert ours.evaluate(held_out).loss == pytest.approx(theirs.evaluate(held_out).loss, abs=1e-2)


def test_a_run_goes_from_one_to_the_other_and_back_on_the_curve_of_one_alone(start, tmp_path):
    alone = torch_step(start, stage="pretrain")
    expected = train(alone, range(30), stage="pretrain")
    makers = [torch_step, mlx_step, torch_step]
    losses: list[float] = []
    for part, make in enumerate(makers):
        step = make(start, stage="pretrain")
        if part:
            step.load(tmp_path / str(part - 1))
        losses += train(step, range(10 * part, 10 * part + 10), stage="pretrain")
        (tmp_path / str(part)).mkdir()
        step.save(tmp_path / str(part))
    np.testing.assert_allclose(losses, expected, atol=1e-3)
    assert distance(step, alone) < 1e-4


def test_the_files_are_the_same_in_names_types_and_shapes_and_each_generator_keeps_its_own_key(start, tmp_path):
    listings: list[dict[str, tuple[str, list[int]]]] = []
    for name, make in (("torch", torch_step), ("mlx", mlx_step)):
        step = make(start, stage="pretrain")
        train(step, range(1), stage="pretrain")
        (tmp_path / name).mkdir()
        step.save(tmp_path / name)
        with safe_open(tmp_path / name / "optimizer.safetensors", framework="np") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
            listings.append({key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()})
    assert listings[0] == listings[1]
    assert listings[1]["model.norm.weight.step"] == ("F32", [])
    with safe_open(tmp_path / "mlx" / "runtime.safetensors", framework="np") as file:
        assert set(file.keys()) == {"rng.mlx"}
    step = mlx_step(start, stage="pretrain")
    mx.random.seed(11)
    before = mx.random.uniform(shape=(3,))
    mx.random.seed(11)
    step.load(tmp_path / "torch")  # It knows nothing of this generator, so that stays.
    assert mx.array_equal(mx.random.uniform(shape=(3,)), before)


def test_half_precision_follows_the_curve_and_keeps_weights_and_state_in_float32(start):
    half, full = mlx_step(start, stage="pretrain", precision="bfloat16"), mlx_step(start, stage="pretrain")
    losses = [train(step, range(8), stage="pretrain") for step in (half, full)]
    np.testing.assert_allclose(losses[0], losses[1], atol=0.02)
    assert losses[0] != losses[1]
    arrays = dict(tree_flatten([half.model.parameters(), half.optimizer.state]))
    assert {str(value.dtype) for value in arrays.values() if value.ndim} == {"mlx.core.float32"}


def test_a_compiled_step_of_the_whole_model_is_the_plain_one_and_is_not_traced_again(start):
    """One micro-batch and two steps: the processor's compiler takes seconds for each function."""
    compiled, plain = (mlx_step(start, stage="pretrain", compile=choice) for choice in ("on", "off"))
    for number in range(2):
        rows = batch(number, stage="pretrain")
        losses = [step.train([rows], schedule=schedule(number)).loss for step in (compiled, plain)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
        assert compiled.traces == 3
    assert distance(compiled, plain) < 1e-4
