"""Finding the model that a path means, and the commands on checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from anarcho_cli.models import ModelNotFoundError, Which, find_model
from anarcho_train.checkpoint import CheckpointStore
from safetensors.numpy import save_file


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with three checkpoints, of which the second has the best validation loss."""
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep_last=3)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5)):
        save_checkpoint(store, step=step, loss=loss)
    return tmp_path / "run"


def save_checkpoint(store: CheckpointStore, *, step: int, loss: float) -> None:
    """A checkpoint whose files hold nothing but their own step."""

    def write(directory: Path) -> None:
        (directory / "config.json").write_text(f"config {step}")
        save_file({"step": np.array([step])}, directory / "model.safetensors")

    store.save(step, write, state={"validation_loss": loss})


def test_a_run_means_its_last_or_its_best_checkpoint(run: Path) -> None:
    assert find_model(run).name == "step-00000003"
    assert find_model(run, which=Which.best).name == "step-00000002"


def test_a_checkpoint_and_a_model_directory_mean_themselves(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / "step-00000001"
    assert find_model(checkpoint) == checkpoint
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("config.json", "model.safetensors"):
        (plain / name).touch()
    assert find_model(plain) == plain


def test_a_damaged_last_checkpoint_is_passed_over_and_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run)
    assert find_model(run).name == "step-00000002"
    assert "step-00000003" in capsys.readouterr().err


def damage(run: Path) -> None:
    """Change one byte of the newest checkpoint and keep its size."""
    weights = run / "checkpoints" / "step-00000003" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, Path.touch])
def test_a_path_without_a_model_is_refused_by_name(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(ModelNotFoundError, match=f"{tmp_path / 'x'} .*expected"):
        find_model(tmp_path / "x")


def test_a_run_without_checkpoints_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ModelNotFoundError, match="has no valid last checkpoint"):
        find_model(tmp_path / "run")


def test_the_list_shows_every_checkpoint(run: Path, anarcho) -> None:
    rows = json.loads(anarcho("checkpoint", "list", run, "--json").stdout)
    assert [(row["step"], row["validation_loss"]) for row in rows] == [(1, 3.0), (2, 2.0), (3, 2.5)]
    assert rows == json.loads(anarcho("checkpoint", "list", run / "checkpoints", "--json").stdout)
    shown = anarcho("checkpoint", "list", run).stdout
    assert all(row["path"] in shown.replace("\n", "") for row in rows)


def test_verify_passes_sound_checkpoints_and_fails_a_damaged_one_by_name(run: Path, anarcho) -> None:
    assert anarcho("checkpoint", "verify", run).exit_code == 0
    damage(run)
    result = anarcho("checkpoint", "verify", run, "--json")
    assert result.exit_code == 2
    problems = {row["step"]: row["problems"] for row in json.loads(result.stdout)}
    assert problems[1] == problems[2] == []
    assert "model.safetensors" in problems[3][0]


@pytest.mark.parametrize("command", ["list", "verify"])
def test_a_path_without_checkpoints_is_refused(command: str, tmp_path: Path, refused) -> None:
    assert "absent" in refused("checkpoint", command, tmp_path / "absent")
    assert str(tmp_path) in refused("checkpoint", command, tmp_path)
