"""Real runs on the MLX back-end, and runs that change from one framework to the other on the way."""

from __future__ import annotations

import hashlib
import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from anarcho_monitor import read_curve, read_metrics

from .conftest import settings

pytest.importorskip("mlx.core")

TINY = {
    "tokenizer.vocab_size": 320,
    "model.num_layers": 1,
    "model.dim": 32,
    "model.num_heads": 2,
    "model.hidden_dim": 64,
    "model.context_length": 64,
    "train.steps": 6,
    "train.batch_tokens": 256,
    "train.micro_batch": 2,
    "train.eval_every": 3,
    "train.checkpoint_every": 2,
    "train.log_every": 1,
    "train.precision": "float32",
    "optim.warmup_steps": 2,
    "sample.max_new_tokens": 4,
}
SIGNAL = """
import os, signal
from anarcho_train.steps.{framework} import {step}
train, calls = {step}.train, [0]
def wrapper(*args, **kwargs):
    calls[0] += 1
    if calls[0] == {when}:
        os.kill(os.getpid(), signal.{name})
    return train(*args, **kwargs)
{step}.train = wrapper
"""
NO_TORCH = "import sys\nsys.modules['torch'] = None\n"


def interruption(name: str, *, when: int, backend: str = "mlx") -> str:
    step = {"mlx": "MlxStep", "torch": "TorchStep"}[backend]
    return SIGNAL.format(framework=backend, step=step, name=name, when=when)


def files(run: Path, step: int = 6) -> dict[str, str]:
    """Hashes of what a checkpoint holds of the training."""
    checkpoint = run / "checkpoints" / f"step-{step:08d}"
    names = ("model.safetensors", "optimizer.safetensors", "runtime.safetensors")
    return {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in names}


def losses(run: Path) -> list[float]:
    return [value for *_, value in read_curve(run / "metrics.jsonl", "train", "loss")]


def starts(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "start"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty paragraphs of made-up words."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghij", k=5)) for _ in range(50)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n\n".join(" ".join(chance.choices(words, k=100)) for _ in range(40)))
    return path


@pytest.fixture(scope="module")
def begin(corpus: Path) -> list[object]:
    return ["pretrain", "--data", corpus, "--device", "cpu", *settings(TINY)]


@pytest.fixture(scope="module")
def whole(anarcho, begin, tmp_path_factory) -> Path:
    """A run on MLX that nothing interrupted, in a process that cannot load torch."""
    directory = tmp_path_factory.mktemp("whole")
    result = anarcho(*begin, "--set", "backend=mlx", "--name", "whole", cwd=directory, patch=NO_TORCH)
    return directory / result.stdout.strip()


def test_a_run_on_mlx_needs_no_torch_and_says_what_it_did(whole) -> None:
    (start,) = starts(whole)
    assert (start["backend"], start["device"], start["precision"]) == ("mlx", "cpu", "float32")
    records = read_metrics(whole / "metrics.jsonl")
    reading = next(record for record in records if record["kind"] == "train")
    assert 0 < reading["allocated_bytes"] <= reading["peak_bytes"] < reading["limit_bytes"]
    assert reading["process_bytes"] > 0
    assert any(record["kind"] == "sample" for record in records)
    assert losses(whole)[-1] < losses(whole)[0], "it learns"


def test_the_configuration_of_a_run_does_not_name_the_framework(whole) -> None:
    assert "mlx" not in (whole / "config.toml").read_text()


def test_a_run_on_mlx_that_is_stopped_and_killed_ends_bitwise_like_the_uninterrupted_one(
    anarcho, begin, whole, tmp_path
) -> None:
    line = [*begin, "--backend", "mlx", "--name", "cut"]
    stopped = anarcho(*line, cwd=tmp_path, patch=interruption("SIGTERM", when=3), check=False)
    assert stopped.returncode == 143, stopped.stderr
    run = tmp_path / stopped.stdout.strip()
    assert (run / "checkpoints" / "step-00000003").is_dir()
    killed = anarcho("pretrain", "--resume", run, cwd=tmp_path, patch=interruption("SIGKILL", when=3), check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    anarcho("pretrain", "--resume", run, cwd=tmp_path)
    assert [start["backend"] for start in starts(run)] == ["mlx"] * 3, "a resumed run stays with its framework"
    assert files(run) == files(whole)
    for name in ("loss", "grad_norm"):
        curves = [read_curve(place / "metrics.jsonl", "train", name) for place in (run, whole)]
        assert curves[0] == curves[1]


def test_a_run_may_go_on_with_the_other_framework_and_come_back(anarcho, begin, whole, tmp_path) -> None:
    run = tmp_path / "runs" / "changing"
    line = [*begin, "--backend", "mlx", "--name", "changing"]
    for arguments, backend in ((line, "mlx"), (["pretrain", "--resume", run, "--backend", "torch"], "torch")):
        patch = interruption("SIGTERM", when=2, backend=backend)
        stopped = anarcho(*arguments, cwd=tmp_path, patch=patch, check=False)
        assert stopped.returncode == 143, stopped.stderr
    anarcho("pretrain", "--resume", run, "--backend", "mlx", cwd=tmp_path)
    assert [(start["backend"], start["step"]) for start in starts(run)] == [("mlx", 0), ("torch", 2), ("mlx", 4)]
    assert losses(run) == pytest.approx(losses(whole), rel=1e-4)


def test_a_pipeline_runs_on_mlx_with_one_setting(anarcho, corpus, tmp_path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "ab"}]} for n in range(40)
    ]
    pairs = [{"prompt": f"{n}?", "chosen": "ab", "rejected": "cd"} for n in range(40)]
    for name, content in (("chat", rows), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    common = {key: value for key, value in TINY.items() if not key.startswith(("model", "tokenizer"))} | {
        "train.steps": 2,
        "train.eval_every": 0,
    }
    shape = {key: value for key, value in TINY.items() if key.startswith("model")}
    stages = [("vocabulary", "tokenizer", None, corpus, {"tokenizer.vocab_size": 320})]
    stages += [("base", "pretrain", "vocabulary", corpus, shape)]
    stages += [("chat", "sft", "base", "chat.jsonl", {"train.neftune_alpha": 5.0})]
    stages += [("aligned", "preference", "chat", "pairs.jsonl", {"lora.rank": 2, "lora.dropout": 0.1})]
    text = ""
    for name, command, base, data, values in stages:
        text += f"[[stage]]\nname = '{name}'\ncommand = '{command}'\ndata = '{data}'\n"
        text += f"from = '{base}'\noptions = {{ device = 'cpu' }}\n" if base else ""
        text += "".join(f"set.'{key}' = {value}\n" for key, value in values.items()) + "\n"
    (tmp_path / "chain.toml").write_text(text)
    line = ["pipeline", "run", "chain.toml", "--set", "backend=mlx", *settings(common)]
    result = anarcho(*line, cwd=tmp_path)
    for name in ("base", "chat", "aligned"):
        run = tmp_path / "runs" / "chain" / name
        assert [start["backend"] for start in starts(run)] == ["mlx"]
        assert (run / "checkpoints" / "step-00000002" / "model.safetensors").is_file()
    adapter = run / "checkpoints" / "step-00000002" / "adapter"
    assert {path.name for path in adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    again = anarcho(*line, "--json", cwd=tmp_path)
    assert [stage["action"] for stage in json.loads(again.stdout)["stages"]] == ["skip"] * 4, result.stderr
