"""Finding the model that a path means: a run, a checkpoint of a run, or a Hugging Face model directory."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

WEIGHTS = "model.safetensors"
CHECKPOINTS = "checkpoints"


class ModelNotFoundError(FileNotFoundError):
    """A path that holds no model; the message is one sentence for the user."""


class Which(StrEnum):
    """Which checkpoint of a run to take."""

    last = "last"
    best = "best"


def find_model(path: Path, *, which: Which = Which.last) -> Path:
    """The Hugging Face model directory for a run, a checkpoint or a model directory.

    Of a run it is the newest valid checkpoint, or with ``which`` the one with the best validation loss.
    Raises ModelNotFoundError where there is none.
    """
    if not path.exists():
        raise ModelNotFoundError(f"{path} is not there; expected a run, a checkpoint or a model directory")
    if (path / WEIGHTS).is_file() and (path / "config.json").is_file():
        return path
    if (path / CHECKPOINTS).is_dir():
        return _checkpoint_of_run(path, which)
    raise ModelNotFoundError(
        f"{path} holds no model; expected a run (with {CHECKPOINTS}/) or a directory with config.json and {WEIGHTS}"
    )


def _checkpoint_of_run(run: Path, which: Which) -> Path:
    from anarcho_train.checkpoint import CheckpointStore

    from anarcho_cli.output import note

    store = CheckpointStore(run / CHECKPOINTS)
    checkpoint = store.best() if which is Which.best else store.latest_valid(notify=note)
    if checkpoint is None:
        raise ModelNotFoundError(
            f"the run {run} has no valid {which.value} checkpoint; `anarcho checkpoint verify {run}` says more"
        )
    return checkpoint
