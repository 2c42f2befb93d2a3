"""`anarcho checkpoint`: list a run's checkpoints, or check them against their manifests."""

from __future__ import annotations

import dataclasses
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
    from anarcho_cli.output import bytes_text, print_json, print_table

    infos = _store(run).list(check_hashes=False)
    if json:
        print_json([_facts(info) for info in infos])
        return
    rows = [
        (info.step, _loss(info), _time(info), bytes_text(info.bytes), info.problem or "", info.path) for info in infos
    ]
    print_table(["#step", "#validation loss", "written", "#size", "problem", "directory"], rows)


@app.command()
def verify(run: RunArgument, json: JsonOption = False) -> None:
    """Read every file of every checkpoint and compare it with the manifest; exit status 2 where one is damaged."""
    from anarcho_cli.output import print_json, print_table

    store = _store(run)
    infos = store.list(check_hashes=False)
    problems = [store.verify(info.path) for info in infos]
    if json:
        rows = zip(infos, problems, strict=True)
        print_json([{"step": info.step, "path": str(info.path), "problems": found} for info, found in rows])
    else:
        cells = [
            (info.step, "; ".join(found) or "valid", info.path) for info, found in zip(infos, problems, strict=True)
        ]
        print_table(["#step", "result", "directory"], cells)
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


def _facts(info: CheckpointInfo) -> dict[str, object]:
    return {**dataclasses.asdict(info), "path": str(info.path)}


def _loss(info: CheckpointInfo) -> str:
    return "-" if info.validation_loss is None else f"{info.validation_loss:.4f}"


def _time(info: CheckpointInfo) -> str:
    return f"{datetime.fromtimestamp(info.created_at):%Y-%m-%d %H:%M:%S}"
