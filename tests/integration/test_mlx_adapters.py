"""Tuning with an adapter is the same on both back-ends as the app composes them: draws, updates, files, and going on with the other."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("mlx.core")

import mlx.core as mx
import torch
from anarcho_cli.back_ends import mlx
from anarcho_cli.back_ends import torch as pytorch
from anarcho_cli.back_ends.run_model import ADAPTER
from anarcho_cli.config import RunConfig, resolve
from anarcho_model import InitConfig, ModelConfig, weights, weights_mlx
from anarcho_model.lora.config import adapter_shapes
from anarcho_model.torch import GPT
from anarcho_tokenize import AnyTokenizer, TokenizerConfig, load_tokenizer, train_tokenizer
from anarcho_train import StepSchedule
from mlx.utils import tree_flatten
from safetensors import safe_open

LENGTH, ROWS, VOCABULARY = 24, 4, 320
SHAPE = {
    "vocab_size": VOCABULARY,
    "context_length": LENGTH,
    "num_layers": 2,
    "dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "hidden_dim": 48,
}
TUNING = {f"model.{key}": value for key, value in SHAPE.items()} | {
    "tokenizer.vocab_size": VOCABULARY,
    "lora.rank": 4,
    "lora.dropout": 0.2,
    "train.seed": 3,
    "train.precision": "float32",
    "train.compile": "off",
    "train.batch_tokens": 2 * ROWS * LENGTH,
    "train.micro_batch": ROWS,
    "optim.ns_dtype": "float32",  # Otherwise bfloat16 on processors that have it, in one back-end alone.
}
NOISY = {"train.neftune_alpha": 5.0}
MUON = {"lora.optimizer": "muon", "lora.targets": '["q", "v", "down"]', "lora.rank_stabilized": "true"}
BACK_ENDS = {"torch": pytorch, "mlx": mlx}


class Rows(NamedTuple):
    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    positions: np.ndarray | None = None
    segments: np.ndarray | None = None
    reference: np.ndarray | None = None


def batches(number: int) -> list[Rows]:
    """A step's two batches of counting texts, whose stride tells the chosen answers from the rejected ones."""
    random = np.random.default_rng(number)
    rows = []
    for _ in range(2):
        ids = random.integers(VOCABULARY, size=(ROWS, 1)) + np.arange(LENGTH + 1) * np.array([[1], [2]] * (ROWS // 2))
        ids = (ids % VOCABULARY).astype(np.int32)
        counted = np.ones((ROWS, LENGTH), np.float32)
        counted[:, :3] = counted[-2:, -4:] = 0
        reference = np.full(ROWS, -100.0, np.float32)
        rows.append(Rows(ids[:, :-1], ids[:, 1:], counted, reference=reference))
    return rows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> AnyTokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a tale of two frameworks"], config=TokenizerConfig(vocab_size=280)).save(directory)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("base")
    model = GPT(ModelConfig(**SHAPE))
    model.init_weights(seed=1, init=InitConfig(zero_residual_outputs=False))
    weights.save_pretrained(model, directory, eos_token_id=0, pad_token_id=1)
    return directory


@pytest.fixture(scope="module")
def make(base: Path, tokenizer: AnyTokenizer):
    """The step that the app makes of a stage with these settings."""

    def make(back_end: ModuleType, *, stage: str = "sft", **settings: Any) -> Any:
        return back_end.make_step(configuration(stage, **settings), tokenizer, base, device="cpu")

    return make


def configuration(stage: str, **settings: Any) -> RunConfig:
    return resolve(preset=stage, overrides=[f"{key}={value}" for key, value in (TUNING | settings).items()])


def train(step: Any, numbers: range) -> list[float]:
    schedules = [StepSchedule(lr_scale=1 / (1 + number / 9), number=number) for number in numbers]
    return [step.train(batches(schedule.number), schedule=schedule).loss for schedule in schedules]


def parameters(step: Any) -> dict[str, np.ndarray]:
    if step.model.__class__.__module__ == GPT.__module__:
        return {name: value.detach().numpy().copy() for name, value in step.model.named_parameters()}
    return {name: np.array(value) for name, value in tree_flatten(step.model.parameters())}


def distance(one: Any, other: Any) -> float:
    a, b = parameters(one), parameters(other)
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def saved(step: Any, directory: Path) -> Path:
    directory.mkdir()
    step.save(directory)
    return directory


STAGES = [("sft", NOISY), ("preference", MUON), ("preference", {"train.gradient_checkpointing": "true"})]


@pytest.mark.parametrize(("stage", "settings"), STAGES, ids=["noise", "muon", "checkpointing"])
def test_both_make_the_same_updates_with_the_draws_of_the_app(make, base, stage, settings):
    ours, theirs = (make(back_end, stage=stage, **settings) for back_end in (mlx, pytorch))
    assert distance(ours, theirs) == 0, "the first weights of an adapter are the same to the last bit"
    before = parameters(ours)
    losses = [train(step, range(6)) for step in (ours, theirs)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert distance(ours, theirs) < 1e-5
    config = configuration(stage, **settings)
    for name, value in parameters(ours).items():
        moved = not np.array_equal(value, before[name])
        assert moved is (name in adapter_shapes(config.model, config.lora)), name
    held_out = batches(1000)[0]
    assert ours.evaluate(held_out).loss == pytest.approx(theirs.evaluate(held_out).loss, rel=1e-5)
    np.testing.assert_allclose(ours.answer_logprobs(held_out), theirs.answer_logprobs(held_out), rtol=1e-4)


def test_noise_and_dropout_are_part_of_the_training(make):
    plain, dropping, noisy = (
        train(make(mlx, **settings), range(1))[0] for settings in ({"lora.dropout": 0}, {}, NOISY)
    )
    assert len({plain, noisy}) == 2
    assert plain == pytest.approx(dropping), "an adapter's first B is zero, so nothing shows of what A reads"
    plain, dropping = (train(make(mlx, **settings), range(3))[2] for settings in ({"lora.dropout": 0}, {}))
    assert plain != pytest.approx(dropping, rel=1e-6)


@pytest.mark.parametrize("settings", [NOISY, MUON], ids=["adamw", "muon"])
def test_a_run_goes_from_one_to_the_other_and_back_on_the_curve_of_one_alone(make, settings, tmp_path):
    alone = make(pytorch, **settings)
    expected = train(alone, range(9))
    losses: list[float] = []
    for part, back_end in enumerate((pytorch, mlx, pytorch)):
        step = make(back_end, **settings)
        if part:
            step.load(tmp_path / str(part - 1))
        losses += train(step, range(3 * part, 3 * part + 3))
        saved(step, tmp_path / str(part))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert distance(step, alone) < 1e-5


def test_a_resumed_run_continues_bit_for_bit(make, tmp_path):
    whole, first, second = (make(mlx, **NOISY) for _ in range(3))
    expected = train(whole, range(4))
    losses = train(first, range(2))
    second.load(saved(first, tmp_path / "checkpoint"))
    assert losses + train(second, range(2, 4)) == expected
    assert distance(whole, second) == 0


def listing(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of each tensor of a file."""
    with safe_open(path, framework="np") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
        return {key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()}


def test_checkpoints_hold_the_same_files_a_whole_model_and_the_state_of_the_adapter_alone(make, base, tmp_path):
    steps = {name: make(back_end, **NOISY) for name, back_end in BACK_ENDS.items()}
    for name, step in steps.items():
        train(step, range(2))
        saved(step, tmp_path / name)
    theirs, ours = tmp_path / "torch", tmp_path / "mlx"
    files = {path.relative_to(ours) for path in ours.rglob("*") if path.is_file()}
    assert files == {path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file()}
    for file in files:
        if file.suffix != ".safetensors":
            assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file
        elif file.name != "runtime.safetensors":
            assert listing(ours / file) == listing(theirs / file), file
    assert listing(ours / "model.safetensors") == listing(base / "model.safetensors")
    names = {name.rpartition(".")[0] for name in listing(ours / "optimizer.safetensors")}
    config = configuration("sft")
    assert names == set(adapter_shapes(config.model, config.lora))
    assert json.loads((ours / ADAPTER / "adapter_config.json").read_text())["r"] == 4
    tokens = batches(0)[0].tokens
    expected = np.array(steps["mlx"].model(mx.array(tokens)))
    np.testing.assert_allclose(weights_mlx.load_pretrained(ours)(mx.array(tokens)), expected, atol=1e-5)
    with torch.no_grad():
        ids = torch.from_numpy(tokens).long()
        np.testing.assert_allclose(weights.load_pretrained(ours)(ids).numpy(), expected, atol=1e-5)


def test_half_precision_follows_the_curve_and_keeps_weights_and_state_in_float32(make):
    plain, half = make(mlx), make(mlx, **{"train.precision": "bfloat16"})
    curves = [train(step, range(4)) for step in (plain, half)]
    np.testing.assert_allclose(curves[0], curves[1], atol=0.02)
    arrays = dict(tree_flatten([half.model.parameters(), half.optimizer.state]))
    assert {str(value.dtype) for value in arrays.values() if value.ndim} == {"mlx.core.float32"}


def test_a_compiled_step_is_the_plain_one_and_is_not_traced_again(tokenizer, tmp_path):
    """The processor's compiler takes seconds for each function, so there is one layer and one micro-batch."""
    small = {"model.num_layers": 1, "lora.targets": '["v", "down"]', "init.zero_residual_outputs": "false"}
    compiled, plain = (
        mlx.make_step(
            configuration("sft", **small, **{"train.compile": choice}), tokenizer, tmp_path / "none", device="cpu"
        )
        for choice in ("on", "off")
    )
    for number in range(2):
        schedule = StepSchedule(lr_scale=1.0, number=number)
        losses = [step.train(batches(number)[:1], schedule=schedule).loss for step in (compiled, plain)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert compiled.traces == 3
    assert distance(compiled, plain) < 1e-5
