"""`anarcho pipeline`: run a chain of commands, and of those that ran before only what has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anarcho_cli.commands.config import JsonOption

app = typer.Typer(help="Run a chain of commands.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """A group, though it has one command."""


@app.command()
def run(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="The stages, a [[stage]] table for each.")],
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where outputs are kept; left out, runs/NAME of the pipeline.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="Run this stage anew; those before it are taken as they are."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a key in all stages that it concerns: --set backend=mlx."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run and why, and stop.")] = False,
    json: JsonOption = False,
) -> None:
    """Run the stages of a file in order; prints the directory of their outputs.

    A stage is skipped where its table, the files and stages that it uses and its output are what they were. After a
    failure or an interruption, the same command goes on there.
    """
    from anarcho_cli.output import duration_text, note, print_json
    from anarcho_cli.pipeline.definition import load_pipeline
    from anarcho_cli.pipeline.execution import default_directory, run_pipeline
    from anarcho_cli.pipeline.setting_values import check_values
    from anarcho_cli.pipeline.summary import trial_command

    pipeline = load_pipeline(
        file, options=lambda words: _options_of(ctx.find_root().command, words), overrides=overrides or []
    )
    check_values(pipeline)
    directory = directory or default_directory(pipeline)
    if dry_run:
        _print_plan(pipeline, directory, start=start, json=json)
        return
    outcome = run_pipeline(pipeline, directory, start=start)
    if outcome.exit_status == 0:
        skipped = sum(step.action == "skip" for step in outcome.steps)
        ran = len(outcome.steps) - skipped
        note(f"done: {ran} stages run, {skipped} skipped, {duration_text(outcome.seconds)}")
        if (command := trial_command(pipeline, directory)) is not None:
            note(f"try the model with {command}")
    if json:
        print_json(outcome.to_dict())
    else:
        print(directory)
    if outcome.exit_status:
        raise typer.Exit(outcome.exit_status)


def _print_plan(pipeline: Any, directory: Path, *, start: str | None, json: bool) -> None:
    from anarcho_cli.output import print_json, print_table
    from anarcho_cli.pipeline.planning import make_plan
    from anarcho_cli.pipeline.state import load_state

    steps = make_plan(pipeline, directory, load_state(directory), start=start)
    if json:
        stages = [step.to_dict() for step in steps]
        print_json({"pipeline": pipeline.name, "directory": str(directory), "stages": stages})
        return
    print_table(["stage", "command", "inputs", "action", "why"], [step.row() for step in steps])


def _options_of(root: Any, words: tuple[str, ...]) -> frozenset[str] | None:
    """The long options of a command of this program, without dashes; None where there is no such command."""
    command = root
    for word in words:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            return None
    names = [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]
    return frozenset(name.removeprefix("--") for name in names if name.startswith("--"))
