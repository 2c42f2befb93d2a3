"""`anarcho pretrain`: train a model from raw text, or continue a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anarcho_cli.devices import Backend, Device
from anarcho_cli.training_commands import (
    chosen_device,
    finish,
    given,
    print_plan,
    refuse_with_resume,
    require_source,
    resume_run,
)

if TYPE_CHECKING:
    from anarcho_cli.config import RunConfig


def pretrain(
    ctx: typer.Context,
    preset: Annotated[
        str, typer.Option("--preset", help="Preset to start from; `anarcho config presets` lists them.")
    ] = "quickstart",
    file: Annotated[Path | None, typer.Option("--config", "-c", help="TOML file over the preset.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: --set train.steps=100.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run; left out, preset and time.")] = None,
    runs_dir: Annotated[Path, typer.Option("--runs-dir", help="Where runs are kept.")] = Path("runs"),
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="SPEC", help="Text: a file, glob, directory, or `embedded`; sets data.source."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Trained tokenizer to use; left out, one is trained on the text.")
    ] = None,
    device: Annotated[
        Device,
        typer.Option("--device", help="auto is the Apple GPU where there is one, else the CPU; resuming, as before."),
    ] = Device.auto,
    backend: Annotated[Backend, typer.Option("--backend", help="Framework that computes.")] = Backend.torch,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="RUN", help="Continue this run; only --device and --json go along."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print configuration, size, memory and FLOPs of the run, and stop.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print a summary object instead of the run directory.")] = False,
) -> None:
    """Train a model from raw text.

    With no option it trains the quickstart model on the embedded corpus. Progress goes to standard error; the last line
    of standard output is the run directory.
    """
    if resume is not None:
        refuse_with_resume(ctx)
        resume_run(resume, device=device, is_device_given=given(ctx, "device"), json=json)
        return
    config = _configuration(preset=preset, file=file, overrides=overrides or [], data=data, tokenizer=tokenizer)

    from anarcho_cli.runs import new_run_directory

    directory = new_run_directory(runs_dir, name, preset=preset)
    require_source(config, kind="text")
    if dry_run:
        print_plan(config, device=device, json=json)
        return

    from anarcho_cli import compose

    resolved = chosen_device(device)
    finish(compose.train(config, run_directory=directory, device=resolved, tokenizer_path=tokenizer), json=json)


def _configuration(
    *, preset: str, file: Path | None, overrides: list[str], data: str | None, tokenizer: Path | None
) -> RunConfig:
    """The run's configuration, with the vocabulary of a tokenizer that is given."""
    from anarcho_cli.config import resolve
    from anarcho_cli.layers import Layer

    options = [] if data is None else [Layer(origin="--data", sections={"data": {"source": data}})]
    if tokenizer is not None:
        from anarcho_tokenize import load_tokenizer

        size = load_tokenizer(tokenizer).vocab_size
        options.append(Layer(origin=f"--tokenizer {tokenizer}", sections={"tokenizer": {"vocab_size": size}}))
    return resolve(preset=preset, file=file, overrides=overrides, options=options)
