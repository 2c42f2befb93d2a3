"""Names and places of run directories."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class RunError(ValueError):
    """A run name or directory that cannot be used; the message is one sentence for the user."""


def new_run_directory(runs: Path, name: str | None, *, preset: str, now: datetime | None = None) -> Path:
    """The directory of a new run, which is not there yet; nothing is created.

    Without a name it is the preset and the time, numbered where two runs start within one second.
    Raises RunError for a name that is no plain folder name or is taken.
    """
    if runs.exists() and not runs.is_dir():
        raise RunError(f"--runs-dir {runs} is a file; expected a directory")
    if name is not None:
        if not _NAME.fullmatch(name):
            raise RunError(
                f"--name {name!r} is not a run name; use letters, digits, '.', '_' and '-', beginning with a letter or digit"
            )
        if (runs / name).exists():
            raise RunError(
                f"the run {runs / name} exists already; choose another --name, or continue it with --resume {runs / name}"
            )
        return runs / name
    stem = f"{preset}-{(now or datetime.now()):%Y%m%d-%H%M%S}"
    number = 1
    while (directory := runs / (stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    return directory


def existing_run(path: Path) -> Path:
    """``path``, if it is a run that can be resumed; raises RunError where it is not."""
    if not path.exists():
        raise RunError(f"the run {path} is not there; expected the directory that a pretrain printed")
    for name in ("config.toml", "environment.json"):
        if not (path / name).is_file():
            raise RunError(f"{path} is not a run (it has no {name}); expected the directory that a pretrain printed")
    return path


def recorded_place(run: Path) -> tuple[str | None, str | None]:
    """The back-end and the device that a run last trained on, or with which it was begun; None where it does not say."""
    from anarcho_monitor import read_metrics

    file = run / "metrics.jsonl"
    starts = [record for record in read_metrics(file) if record.get("kind") == "start"] if file.is_file() else []
    # A run of the first version says no back-end where it trained: there was only PyTorch.
    last = {"backend": "torch", **starts[-1]} if starts else _environment(run)
    backend, device = last.get("backend"), last.get("device")
    return (
        backend if backend in ("torch", "mlx") else None,
        device if device in ("mps", "cpu", "cuda") else None,
    )


def _environment(run: Path) -> dict[str, Any]:
    try:
        environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return environment if isinstance(environment, dict) else {}
