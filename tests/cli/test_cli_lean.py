"""Lean training: weights and optimizer state in bfloat16, rounded stochastically, in whole runs."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from anarcho_cli.back_ends import back_end
from anarcho_cli.config import resolve
from anarcho_cli.main import app
from anarcho_cli.plan import plan_run
from anarcho_monitor import read_curve
from safetensors.torch import load_file
from typer.testing import CliRunner

TINY = {
    "tokenizer.vocab_size": 300,
    "model.num_layers": 1,
    "model.dim": 16,
    "model.num_heads": 2,
    "model.hidden_dim": 32,
    "model.context_length": 16,
    "train.steps": 40,
    "train.batch_tokens": 128,
    "train.micro_batch": 8,
    "train.eval_every": 0,
    "train.checkpoint_every": 20,
    "train.precision": "bfloat16",
    "optim.warmup_steps": 1,
    "sample.max_new_tokens": 1,
    "monitor.tensorboard": "false",
}
FILES = ("model.safetensors", "optimizer.safetensors", "runtime.safetensors")


def run(folder: Path, name: str, *arguments: object) -> Path:
    settings = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    line = ["pretrain", "--device", "cpu", "--data", folder / "text.jsonl", "--runs-dir", folder, "--name", name]
    result = CliRunner().invoke(app, [str(item) for item in [*line, *settings, *arguments]])
    assert result.exit_code == 0, result.output
    return folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("lean")
    lines = [json.dumps({"text": f"The whale number {i} and the sea."}) for i in range(300)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    lean, wide = ("--set", "train.lean=true"), ()
    return {"lean": run(folder, "lean", *lean), "wide": run(folder, "wide", *wide)}


def last(run: Path) -> Path:
    return run / "checkpoints" / f"step-{TINY['train.steps']:08d}"


def hashes(run: Path) -> dict[str, str]:
    return {name: hashlib.sha256((last(run) / name).read_bytes()).hexdigest() for name in FILES}


def losses(run: Path) -> list[float]:
    return [value for *_, value in read_curve(run / "metrics.jsonl", "train", "loss")]


def test_weights_and_moments_are_half_as_large_and_what_is_learned_is_nearly_the_same(runs):
    tensors = {name: load_file(last(runs["lean"]) / name) for name in FILES[:2]}
    assert {tensor.dtype for tensor in tensors["model.safetensors"].values()} == {torch.bfloat16}
    state = tensors["optimizer.safetensors"]
    assert {tensor.dtype for name, tensor in state.items() if not name.endswith(".step")} == {torch.bfloat16}
    lean, wide = losses(runs["lean"]), losses(runs["wide"])
    assert lean[-1] < lean[0] - 1
    assert lean[-1] == pytest.approx(wide[-1], abs=0.1)


def test_a_resumed_run_repeats_what_was_rounded_bit_for_bit(runs, tmp_path):
    whole = hashes(runs["lean"])
    copied = shutil.copytree(runs["lean"], tmp_path / "run")
    shutil.rmtree(last(copied))
    result = CliRunner().invoke(app, ["pretrain", "--resume", str(copied)])
    assert result.exit_code == 0, result.output
    assert hashes(copied) == whole


def test_mlx_goes_on_in_float32_with_what_a_lean_run_of_torch_saved(runs, tmp_path):
    pytest.importorskip("mlx.core")
    copied = shutil.copytree(runs["lean"], tmp_path / "run")
    more = TINY["train.steps"] + 4
    settings = ["train.lean=false", "train.precision=float32", f"train.steps={more}"]
    line = ["pretrain", "--resume", copied, "--backend", "mlx", "--allow-changes"]
    result = CliRunner().invoke(app, [str(item) for item in line] + [x for y in settings for x in ("--set", y)])
    assert result.exit_code == 0, result.output
    state = load_file(copied / "checkpoints" / f"step-{more:08d}" / "optimizer.safetensors")
    assert {tensor.dtype for tensor in state.values() if tensor.ndim} == {torch.float32}
    after = [value for step, _, value in read_curve(copied / "metrics.jsonl", "train", "loss") if step > more - 4]
    assert after[-1] < losses(runs["lean"])[0] - 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            ["train.precision=float32"],
            "train.lean is true and train.precision is 'float32'; expected 'bfloat16' or 'auto'",
        ),
        (["lora.rank=4"], "train.lean is true and lora.rank is 4; an adapter is small as it is: expected one of them"),
    ],
)
def test_what_does_not_go_with_it_is_refused(settings, expected):
    with pytest.raises(ValueError, match=expected):
        resolve(preset="quickstart", overrides=["train.lean=true", *settings])


def test_devices_and_frameworks_without_it_are_refused(monkeypatch):
    config = resolve(preset="quickstart", overrides=["train.lean=true"])
    monkeypatch.setattr("anarcho_train.steps.torch_settings.native_bfloat16", lambda device: False)
    with pytest.raises(
        ValueError, match=r"train\.lean is true, but train\.precision 'auto' is torch\.float32 on this cpu"
    ):
        back_end("torch").require_supported(config, "cpu")
    pytest.importorskip("mlx.core")
    with pytest.raises(
        ValueError, match=r"train\.lean is true, which MLX does not have; expected false, or --backend torch"
    ):
        back_end("mlx").require_supported(config, "cpu")


def test_the_forecast_knows_it():
    def forecast(*settings: str) -> Any:
        overrides = ["train.gradient_checkpointing=true", "train.micro_batch=1", "train.batch_tokens=4096", *settings]
        return plan_run(resolve(preset="reference-137m", overrides=overrides), device="cuda").memory

    lean, wide = forecast("train.lean=true"), forecast()
    assert (2 * lean.weights, 2 * lean.optimizer) == (wide.weights, wide.optimizer)
    assert lean.total < 0.65 * wide.total
