"""`anarcho checkpoint`: list a run's checkpoints, or check them against their manifests."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anarcho_cli.commands.config import JsonOption

if TYPE_CHECKING:
    from anarcho_train.checkpoint import CheckpointInfo, CheckpointStore

app = typer.Typer(help="List and check a run's checkpoints.", no_args_is_help=True)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run, or its checkpoints folder.")]


@app.command("list")
def list_checkpoints(run: RunArgument, json: JsonOption = False) -> None:
    """List a run's checkpoints, oldest first; `verify` also reads what is in their files."""
    from anarcho_cli.output import bytes_text, duration_text, print_json, print_table

    store = _store(run)
    infos = store.list(check_hashes=False)
    roles = _roles(infos)
    if json:
        print_json([_facts(info, roles) for info in infos])
        return
    rows = [
        (
            info.step,
            _loss(info),
            _time(info),
            duration_text(_age(info)),
            bytes_text(info.bytes),
            ", ".join(roles[info.step]),
            info.problem or "",
            info.path,
        )
        for info in infos
    ]
    print_table(["#step", "#validation loss", "written", "#age", "#size", "is", "problem", "directory"], rows)


@app.command()
def verify(run: RunArgument, json: JsonOption = False) -> None:
    """Read every file of every checkpoint and compare it with the manifest; exit status 2 where one is damaged."""
    from anarcho_cli.output import print_json, print_table

    store = _store(run)
    infos = store.list(check_hashes=False)
    problems = [store.verify(info.path) for info in infos]
    sound = [info for info, found in zip(infos, problems, strict=True) if not found]
    roles = _roles(infos, sound=sound)
    if json:
        rows = zip(infos, problems, strict=True)
        print_json(
            [
                {"step": info.step, "path": str(info.path), "is": roles[info.step], "problems": found}
                for info, found in rows
            ]
        )
    else:
        cells = [
            (info.step, ", ".join(roles[info.step]), "; ".join(found) or "valid", info.path)
            for info, found in zip(infos, problems, strict=True)
        ]
        print_table(["#step", "is", "result", "directory"], cells)
    if any(problems):
        raise typer.Exit(2)


def _store(run: Path) -> CheckpointStore:
    """The checkpoints of a run; raises ModelNotFoundError where the path holds none."""
    from anarcho_train.checkpoint import CheckpointStore

    from anarcho_cli.models import CHECKPOINTS, ModelNotFoundError

    folder = run / CHECKPOINTS if (run / CHECKPOINTS).is_dir() else run
    if not folder.is_dir():
        raise ModelNotFoundError(f"{run} is not there; expected a run or its {CHECKPOINTS} folder")
    if folder is run and not any(folder.glob("step-*")):
        raise ModelNotFoundError(f"{run} holds no checkpoints; expected a run or its {CHECKPOINTS} folder")
    return CheckpointStore(folder)


def _roles(infos: Sequence[CheckpointInfo], *, sound: Sequence[CheckpointInfo] | None = None) -> dict[int, list[str]]:
    """What each step's checkpoint is: the `last` that is ``sound``, from which a run goes on, and the `best`."""
    from anarcho_train.checkpoint import best_of

    valid = [info for info in infos if info.valid] if sound is None else sound
    best = best_of(valid)
    named = {"last": valid[-1].step if valid else None, "best": best.step if best else None}
    return {info.step: [role for role, step in named.items() if step == info.step] for info in infos}


def _facts(info: CheckpointInfo, roles: Mapping[int, list[str]]) -> dict[str, object]:
    return {**dataclasses.asdict(info), "path": str(info.path), "is": roles[info.step]}


def _age(info: CheckpointInfo) -> float:
    """Seconds since it was written, by the clock of this machine."""
    return max(0.0, time.time() - info.created_at)


def _loss(info: CheckpointInfo) -> str:
    return "-" if info.validation_loss is None else f"{info.validation_loss:.4f}"


def _time(info: CheckpointInfo) -> str:
    return f"{datetime.fromtimestamp(info.created_at):%Y-%m-%d %H:%M:%S}"
