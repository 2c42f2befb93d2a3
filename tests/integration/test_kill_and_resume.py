"""A run that is killed at any instant and resumed ends with the same weights, bit for bit, as one that nothing interrupted."""

from __future__ import annotations

import hashlib
import lzma
import signal
from pathlib import Path

import pytest
from anarcho_monitor import read_curve
from anarcho_tokenize.corpus import embedded_rows

from .conftest import SMALL, settings

KILL = """
import os, signal
import anarcho_train.evaluations, anarcho_train.checkpoint, anarcho_train.steps.torch
def kill_before(owner, name, when):
    original, calls = getattr(owner, name), [0]
    def wrapper(*args, **kwargs):
        calls[0] += 1
        if calls[0] == when:
            os.kill(os.getpid(), signal.{signal})
        return original(*args, **kwargs)
    setattr(owner, name, wrapper)
kill_before({owner}, "{name}", {when})
"""

EVALUATIONS, STEP = "anarcho_train.evaluations.Evaluations", "anarcho_train.steps.torch.TorchStep"

INSTANTS = {
    "before the first step": (STEP, "train", 1),
    "between the gradient and the update": ("__import__('anarcho_optim.torch').torch.MuonAdamW", "step", 2),
    "inside the write of a checkpoint": ("anarcho_train.checkpoint", "_describe", 3),
    "before a checkpoint takes its name": ("anarcho_train.checkpoint", "sync", 4),
    "in an evaluation": (STEP, "evaluate", 2),
    "after the last step": (EVALUATIONS, "run", 2),
}


def weights(run: Path, step: int = 6) -> str:
    return hashlib.sha256((run / "checkpoints" / f"step-{step:08d}" / "model.safetensors").read_bytes()).hexdigest()


def kill(instant: tuple[str, str, int], *, number: str = "SIGKILL") -> str:
    owner, name, when = instant
    return KILL.format(owner=owner, name=name, when=when, signal=number)


def test_a_run_killed_again_and_again_ends_bitwise_like_the_uninterrupted_one(
    anarcho, small_text, finished_run, tmp_path
):
    begin = ["pretrain", "--data", small_text, "--name", "killed", "--device", "cpu", *settings(SMALL)]
    run = tmp_path / "runs" / "killed"
    for number, instant in enumerate(INSTANTS.values()):
        arguments = begin if number == 0 else ["pretrain", "--resume", run]
        result = anarcho(*arguments, cwd=tmp_path, patch=kill(instant), check=False)
        assert result.returncode in (-signal.SIGKILL, 0), result.stderr
    result = anarcho("pretrain", "--resume", run, cwd=tmp_path)
    assert result.stdout.strip() == str(run)
    assert weights(run) == weights(finished_run)
    for kind, name in (("train", "loss"), ("validation", "bits_per_byte")):
        assert read_curve(run / "metrics.jsonl", kind, name) == read_curve(finished_run / "metrics.jsonl", kind, name)


@pytest.mark.parametrize("instant", INSTANTS)
def test_a_single_kill_loses_nothing(anarcho, small_text, finished_run, tmp_path, instant):
    begin = ["pretrain", "--data", small_text, "--name", "killed", "--device", "cpu", *settings(SMALL)]
    killed = anarcho(*begin, cwd=tmp_path, patch=kill(INSTANTS[instant]), check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = tmp_path / "runs" / "killed"
    anarcho("pretrain", "--resume", run, cwd=tmp_path)
    assert weights(run) == weights(finished_run)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_saves_and_exits_with_its_code_and_the_run_goes_on_from_there(
    anarcho, small_text, finished_run, tmp_path, name, code
):
    begin = ["pretrain", "--data", small_text, "--name", "stopped", "--device", "cpu", *settings(SMALL)]
    stopped = anarcho(*begin, cwd=tmp_path, patch=kill((STEP, "train", 3), number=name), check=False)
    assert stopped.returncode == code, stopped.stderr
    run = tmp_path / stopped.stdout.strip()
    assert (run / "checkpoints" / "step-00000003").is_dir()
    anarcho("pretrain", "--resume", run, cwd=tmp_path)
    assert weights(run) == weights(finished_run)


def test_a_changed_configuration_is_refused_when_a_run_is_resumed(anarcho, small_text, tmp_path):
    begin = ["pretrain", "--data", small_text, "--name", "changed", "--device", "cpu", *settings(SMALL)]
    anarcho(*begin, cwd=tmp_path, patch=kill((STEP, "train", 4)), check=False)
    run = tmp_path / "runs" / "changed"
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("seed = 0", "seed = 1"))
    result = anarcho("pretrain", "--resume", run, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert "was made with another config" in result.stderr


TUNING = {
    "train.steps": 6,
    "train.batch_tokens": 1024,
    "train.micro_batch": 2,
    "train.eval_every": 3,
    "train.checkpoint_every": 2,
    "train.log_every": 1,
    "train.eval_tokens": 1024,
    "optim.warmup_steps": 2,
    "sample.max_new_tokens": 4,
}


@pytest.fixture(scope="module")
def tuning_rows(tmp_path_factory) -> dict[str, Path]:
    """A few of the embedded conversations and preferences."""
    folder = tmp_path_factory.mktemp("rows")
    files = {}
    for command, kind in (("sft", "chat"), ("preference", "preference")):
        files[command] = folder / f"{kind}.jsonl"
        files[command].write_bytes(b"".join(lzma.decompress(embedded_rows(kind)).splitlines(keepends=True)[:60]))
    return files


ADAPTER = {"lora.rank": 4, "lora.dropout": 0.1, "train.neftune_alpha": 5.0}


@pytest.mark.parametrize(
    ("command", "adapter"),
    [("preference", {}), ("sft", ADAPTER)],
    ids=["preference", "sft with an adapter"],
)
def test_a_tuning_run_killed_in_the_reference_a_step_and_a_checkpoint_ends_bitwise_alike(
    anarcho, finished_run, tuning_rows, tmp_path, command, adapter
):
    begin = [command, "--from", finished_run, "--data", tuning_rows[command], "--device", "cpu"]
    begin += settings(TUNING | adapter | {"data.validation_fraction": 0.2})
    whole = tmp_path / anarcho(*begin, "--name", "whole", cwd=tmp_path).stdout.strip()
    run = tmp_path / "runs" / "killed"
    instants = [(STEP, "train", 2), ("anarcho_train.checkpoint", "sync", 4)]
    if command == "preference":
        instants.insert(0, (STEP, "answer_logprobs", 3))
    for number, instant in enumerate(instants):
        arguments = [*begin, "--name", "killed"] if number == 0 else [command, "--resume", run]
        killed = anarcho(*arguments, cwd=tmp_path, patch=kill(instant), check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    anarcho(command, "--resume", run, cwd=tmp_path)
    assert weights(run) == weights(whole)
    assert read_curve(run / "metrics.jsonl", "train", "loss") == read_curve(whole / "metrics.jsonl", "train", "loss")
