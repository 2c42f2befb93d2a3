"""A run that is killed at any instant and resumed ends with the weights, bit for bit, of one that nothing interrupted, on the same samples.

Every stage is killed in both frameworks: at file operations of the writing of a checkpoint and within the bytes of its files, and at
random moments, again and again. Without ANARCHO_TRAIN_KILLS some of this is done; with it, every file operation is, and so many random
moments of each stage in PyTorch, and a quarter of them in MLX. ANARCHO_TRAIN_SEED draws other moments.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from anarcho_monitor import read_curve
from anarcho_tokenize.corpus import embedded_rows
from anarcho_train import lock_run

from .conftest import settings
from .forked_runs import CONSUMED, Ended, Forks

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the process that has loaded everything")

EVERY = "ANARCHO_TRAIN_KILLS" in os.environ
KILLS = int(os.environ.get("ANARCHO_TRAIN_KILLS", "3"))
SEED = int(os.environ.get("ANARCHO_TRAIN_SEED", "0"))

MODEL = {
    "tokenizer.vocab_size": 400,
    "model.num_layers": 1,
    "model.dim": 16,
    "model.num_heads": 2,
    "model.hidden_dim": 32,
    "model.context_length": 64,
}
TRAINING = {
    "train.steps": 6,
    "train.batch_tokens": 256,
    "train.micro_batch": 2,
    "train.eval_every": 3,
    "train.eval_tokens": 512,
    "train.checkpoint_every": 2,
    "train.keep_last": 1,
    "train.log_every": 1,
    "train.precision": "float32",
    "optim.warmup_steps": 2,
    "sample.max_new_tokens": 2,
    "data.validation_fraction": 0.2,
}
"""Each checkpoint takes the place of another one."""
SETTINGS = {
    "pretrain": MODEL | TRAINING,
    "sft": TRAINING | {"lora.rank": 4, "lora.dropout": 0.1, "train.neftune_alpha": 5.0},
    "preference": TRAINING,
}
STEPS = {"torch": ("anarcho_train.steps.torch", "TorchStep"), "mlx": ("anarcho_train.steps.mlx", "MlxStep")}


@dataclass(frozen=True)
class Stage:
    """A stage in a framework, and what it comes to when nothing interrupts it."""

    command: str
    backend: str
    whole: Path
    """The finished run."""
    ripe: Path
    """The run, killed before its last step."""
    fresh: Path
    """The run, killed when its data was prepared."""
    ended: Ended


def copy_of(run: Path, folder: Path) -> Path:
    """A run, with what it was trained on, in a folder of its own; runs know no absolute paths of their own files."""
    folder.mkdir(parents=True)
    shutil.copytree(run, folder / "run", symlinks=True)
    if (run.parent / CONSUMED).exists():
        shutil.copy(run.parent / CONSUMED, folder / CONSUMED)
    return folder / "run"


def consumed(run: Path, whole: list[str] | None = None) -> list[str]:
    """The samples of each step, those of steps that were done again once; all attempts at a step must have had the same."""
    samples: list[str] = []
    for line in (run.parent / CONSUMED).read_text().splitlines():
        record = json.loads(line)
        assert record["step"] <= len(samples), "no step is left out"
        assert whole is None or record["samples"] == whole[record["step"]]
        samples[record["step"] :] = [record["samples"]]
    return samples


def made(run: Path) -> dict[str, Any]:
    """Hashes of everything that the last checkpoint holds of the training."""
    last = checkpoints(run)[-1]
    files = [*last.rglob("*.safetensors"), last / "state.json"]
    return {str(file.relative_to(last)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").iterdir())


def require_alike(run: Path, whole: Path) -> None:
    assert made(run) == made(whole)
    # Killed between the last checkpoint and what it takes the place of, a run is finished and has both.
    assert {path.name for path in checkpoints(run)} >= {path.name for path in checkpoints(whole)}
    assert all(path.name.startswith("step-") for path in checkpoints(run)), (
        "nothing is left of writings that were killed"
    )
    assert consumed(run, consumed(whole)) == consumed(whole)
    for kind in ("train", "validation"):
        assert read_curve(run / "metrics.jsonl", kind, "loss") == read_curve(whole / "metrics.jsonl", kind, "loss")


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    prepared = Forks()
    yield prepared
    prepared.close()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, small_text: Path) -> dict[str, Path]:
    """A few documents, and a few of the embedded conversations and preferences."""
    folder = tmp_path_factory.mktemp("rows")
    files = {"pretrain": folder / "text.jsonl"}
    files["pretrain"].write_bytes(b"".join(small_text.read_bytes().splitlines(keepends=True)[:3]))
    for command, kind in (("sft", "chat"), ("preference", "preference")):
        files[command] = folder / f"{kind}.jsonl"
        files[command].write_bytes(b"".join(lzma.decompress(embedded_rows(kind)).splitlines(keepends=True)[:40]))
    return files


@pytest.fixture(scope="module")
def stages() -> dict[tuple[str, str], Stage]:
    """Stages that were asked for already; `stage` adds to them."""
    return {}


@pytest.fixture
def stage(request, forks, rows, stages, tmp_path_factory) -> Stage:
    backend, command = request.param
    if backend == "mlx" and find_spec("mlx") is None:
        pytest.skip("needs MLX")
    needed = [(backend, command)] if command == "pretrain" else [("torch", "pretrain"), (backend, command)]
    for key in needed:
        if key not in stages:
            options: list[object] = ["--data", rows[key[1]]]
            if key[1] != "pretrain":
                options += ["--from", stages["torch", "pretrain"].whole]
            stages[key] = prepared(forks, *key, options, tmp_path_factory.mktemp("-".join(key)))
    return stages[backend, command]


def prepared(forks: Forks, backend: str, command: str, options: list[object], folder: Path) -> Stage:
    begin = [command, *options, "--device", "cpu", "--backend", backend, "--runs-dir", ".", "--name", "run"]
    begin += settings(SETTINGS[command])
    for name in ("whole", "fresh"):
        (folder / name).mkdir()
    ended = forks.run(*begin, cwd=folder / "whole")
    assert ended.status == 0, ended.log
    whole, fresh = folder / "whole" / "run", folder / "fresh" / "run"
    assert len(consumed(whole)) == TRAINING["train.steps"]
    forks.run(*begin, cwd=fresh.parent, calls=[["anarcho_cli.compose", "_train", 1, "SIGKILL"]])
    stage = Stage(command, backend, whole, copy_of(fresh, folder / "ripe"), fresh, ended)
    assert resumed(forks, stage, stage.ripe, calls=[[*step_of(backend, "train"), TRAINING["train.steps"], "SIGKILL"]])
    return stage


def step_of(backend: str, method: str) -> list[str]:
    module, name = STEPS[backend]
    return [module, f"{name}.{method}"]


EACH = [(backend, command) for backend in STEPS for command in SETTINGS]
in_both = pytest.mark.parametrize("stage", EACH[::3], indirect=True, ids=["torch", "mlx"])
each_stage = pytest.mark.parametrize("stage", EACH, indirect=True, ids=["-".join(pair) for pair in EACH])


def resumed(forks: Forks, stage: Stage, run: Path, **instruction: Any) -> bool:
    """Resumes a run; whether it was killed."""
    ended = forks.run(stage.command, "--resume", "run", cwd=run.parent, **instruction)
    assert ended.status in (0, -signal.SIGKILL, -signal.SIGXFSZ), ended.log
    return ended.status != 0


@each_stage
def test_killed_at_file_operations_of_a_checkpoint_and_within_its_bytes_a_run_loses_nothing(
    forks: Forks, stage: Stage, tmp_path: Path, capsys
) -> None:
    chance = random.Random(f"{SEED} {stage.backend} {stage.command}")
    last = stage.ended.saves[-1]
    assert last["operations"] > 20
    operations = list(range(1, last["operations"] + 1))
    # The weights are the largest file: a process that may write only so many bytes of it dies within it.
    torn = [chance.randrange(200, last["largest"]) for _ in range(10 if EVERY else 1)]
    if not EVERY:
        operations = sorted(chance.sample(operations, 2 if stage.backend == "torch" else 1))
    instants = [{"operation": number} for number in operations] + [{"bytes": number} for number in torn]
    killed, again = 0, 0
    for number, instant in enumerate(instants):
        run = copy_of(stage.ripe, tmp_path / str(number))
        assert resumed(forks, stage, run, save=1, **instant)
        killed += 1
        if number % 3 == 0:
            again += resumed(forks, stage, run, after_begun=chance.uniform(0, stage.ended.loop_seconds / 2))
        assert not resumed(forks, stage, run)
        require_alike(run, stage.whole)
    with capsys.disabled():
        print(f"\n{stage.command} in {stage.backend}: {killed} kills in a checkpoint, {again} more after them")


@each_stage
def test_killed_at_random_moments_again_and_again_a_run_loses_nothing(
    forks: Forks, stage: Stage, tmp_path: Path, capsys
) -> None:
    chance = random.Random(f"{SEED} {stage.backend} {stage.command}")
    wanted = KILLS if stage.backend == "torch" else max(2, KILLS // 4)
    killed, runs, most, seconds = 0, 0, 0, stage.ended.loop_seconds
    while killed < wanted:
        run, runs, here = copy_of(stage.fresh, tmp_path / str(runs)), runs + 1, 0
        # Kills at the beginning leave nothing but a beginning, so that most are in the training.
        while resumed(forks, stage, run, **moment(chance, seconds)):
            here += 1
            if killed + here >= wanted:
                assert not resumed(forks, stage, run)
                break
        killed, most = killed + here, max(most, here)
        require_alike(run, stage.whole)
        shutil.rmtree(run.parent)
    with capsys.disabled():
        print(f"\n{stage.command} in {stage.backend}: {killed} kills in {runs} runs, up to {most} in one")


def moment(chance: random.Random, seconds: float) -> dict[str, float]:
    if chance.random() < 0.2:
        return {"after": chance.uniform(0, 3 * seconds)}
    return {"after_begun": chance.uniform(0, seconds)}


SIGNALS = {
    "in a step": lambda stage: step_of(stage.backend, "train"),
    "in an evaluation": lambda stage: step_of(stage.backend, "evaluate"),
    "in a save": lambda stage: ["anarcho_train.checkpoint", "_described"],
}


@pytest.mark.parametrize(
    ("stage", "instant"),
    [*((EACH[0], instant) for instant in SIGNALS), (EACH[3], "in a save")],
    indirect=["stage"],
    ids=[*(f"torch, {instant}" for instant in SIGNALS), "mlx, in a save"],
)
def test_a_signal_saves_and_exits_with_its_code_and_the_run_goes_on_from_there(
    forks: Forks, stage: Stage, tmp_path: Path, instant: str
) -> None:
    run = copy_of(stage.fresh, tmp_path / "run")
    name, code = ("SIGTERM", 143) if instant == "in a save" else ("SIGINT", 130)
    stopped = forks.run("pretrain", "--resume", "run", cwd=run.parent, calls=[[*SIGNALS[instant](stage), 3, name]])
    assert stopped.status == code, stopped.log
    assert "stopped after" in stopped.log
    assert "continue with --resume run" in stopped.log
    made_before = len(consumed(run))
    assert (run / "checkpoints" / f"step-{made_before:08d}").is_dir(), "the step is finished and saved"
    assert not resumed(forks, stage, run)
    require_alike(run, stage.whole)
    assert len((run.parent / CONSUMED).read_text().splitlines()) == TRAINING["train.steps"], "no step is done twice"


@in_both
def test_a_second_signal_ends_a_run_at_once_and_loses_no_more_than_a_kill(
    forks: Forks, stage: Stage, tmp_path: Path
) -> None:
    run = copy_of(stage.fresh, tmp_path / "run")
    calls = [[*step_of(stage.backend, "train"), 4, "SIGINT"], [*step_of(stage.backend, "save"), 3, "SIGTERM"]]
    stopped = forks.run("pretrain", "--resume", "run", cwd=run.parent, calls=calls)
    assert stopped.status == 143, stopped.log
    assert "stopped after" not in stopped.log
    assert not resumed(forks, stage, run)
    require_alike(run, stage.whole)


@in_both
def test_a_damaged_checkpoint_is_passed_over_loudly_and_the_end_is_the_same(
    forks: Forks, stage: Stage, tmp_path: Path
) -> None:
    run = copy_of(stage.ripe, tmp_path / "run")
    newest = checkpoints(run)[-1]
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (newest / "model.safetensors").write_bytes(weights)
    ended = forks.run("pretrain", "--resume", "run", cwd=run.parent)
    assert ended.status == 0, ended.log
    assert f"{newest.name}/model.safetensors has another SHA-256" in ended.log
    assert "this checkpoint is passed over" in ended.log
    assert made(run) == made(stage.whole)
    assert consumed(run, consumed(stage.whole)) == consumed(stage.whole)


@in_both
def test_a_run_that_another_process_works_on_is_left_alone_and_the_lock_of_a_dead_one_is_free(
    forks: Forks, stage: Stage, tmp_path: Path
) -> None:
    run = copy_of(stage.ripe, tmp_path / "run")
    assert (run / ".lock").exists(), "the killed process has left its file"
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    lock = lock_run(run)
    refused = forks.run("pretrain", "--resume", "run", cwd=run.parent)
    assert refused.status == 2
    assert "is in use by another process" in refused.log
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files
    lock.release()
    assert not resumed(forks, stage, run)
    require_alike(run, stage.whole)
