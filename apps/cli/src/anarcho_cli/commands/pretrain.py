"""`anarcho pretrain`: train a model from raw text, or continue a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anarcho_cli.devices import Backend, Device

if TYPE_CHECKING:
    from anarcho_cli.compose import RunSummary
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
        _refuse_with_resume(ctx)
        _resume(resume, device=device, given=_given(ctx, "device"), json=json)
        return
    config = _configuration(preset=preset, file=file, overrides=overrides or [], data=data, tokenizer=tokenizer)

    from anarcho_cli.runs import new_run_directory

    directory = new_run_directory(runs_dir, name, preset=preset)
    _require_source(config)
    if dry_run:
        _print_plan(config, device=device, json=json)
        return

    from anarcho_cli import compose

    resolved = _resolve(device)
    _finish(compose.pretrain(config, run_directory=directory, device=resolved, tokenizer_path=tokenizer), json=json)


def _refuse_with_resume(ctx: typer.Context) -> None:
    """A resumed run keeps its configuration: any option that would change it is refused by name."""
    from anarcho_cli.runs import RunError

    for parameter in ctx.command.params:
        if parameter.name not in ("resume", "device", "json") and _given(ctx, parameter.name or ""):
            raise RunError(
                f"{parameter.opts[0]} cannot go with --resume, which continues a run exactly as it was begun"
            )


def _given(ctx: typer.Context, parameter: str) -> bool:
    """Whether a parameter stands on the command line, rather than having its default."""
    source: Any = ctx.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def _configuration(
    *, preset: str, file: Path | None, overrides: list[str], data: str | None, tokenizer: Path | None
) -> RunConfig:
    """The run's configuration, with the vocabulary of a tokenizer that is given."""
    from anarcho_cli.config import resolve
    from anarcho_cli.layers import Layer

    options = [] if data is None else [Layer(origin="--data", sections={"data": {"source": data}})]
    if tokenizer is not None:
        from anarcho_tokenize import Tokenizer

        size = Tokenizer.load(tokenizer).vocab_size
        options.append(Layer(origin=f"--tokenizer {tokenizer}", sections={"tokenizer": {"vocab_size": size}}))
    return resolve(preset=preset, file=file, overrides=overrides, options=options)


def _require_source(config: RunConfig) -> None:
    """Find the text now, so that a wrong path leaves no run behind."""
    from anarcho_tokenize import check_source

    from anarcho_cli.layers import ConfigError

    if config.data.kind != "text":
        raise ConfigError(f"data.kind is '{config.data.kind}'; expected 'text' for pre-training")
    check_source(config.data)


def _print_plan(config: RunConfig, *, device: Device, json: bool) -> None:
    from anarcho_cli.config import dumps
    from anarcho_cli.output import print_json
    from anarcho_cli.plan import plan_run

    plan = plan_run(config, device=device.value)
    if json:
        print_json(plan.to_dict())
        return
    print(dumps(config))
    print("\n".join(plan.lines()))


def _resume(path: Path, *, device: Device, given: bool, json: bool) -> None:
    """Continue a run, on the device that it ran on before unless one is ``given``."""
    from anarcho_cli.runs import existing_run, recorded_device

    run = existing_run(path)
    resolved = _resolve(device if given else Device(recorded_device(run) or device))

    from anarcho_cli import compose

    _finish(compose.resume(run, device=resolved), json=json)


def _resolve(device: Device) -> str:
    """The device to run on; where `auto` found no Apple GPU, one line says so."""
    from anarcho_cli.devices import resolve_device
    from anarcho_cli.output import note

    resolution = resolve_device(device)
    if resolution.note:
        note(resolution.note)
    return resolution.device


def _finish(summary: RunSummary, *, json: bool) -> None:
    """Report how the run ended: people read standard error, scripts the last line of standard output."""
    from anarcho_cli.output import duration_text, note, print_json

    stopped = summary.exit_code != 0
    took = f"{summary.steps} steps, {summary.tokens} tokens, {duration_text(summary.seconds)}"
    note(f"stopped after {took}; continue with --resume {summary.run_directory}" if stopped else f"done: {took}")
    if summary.bits_per_byte is not None:
        note(
            f"validation: {summary.bits_per_byte:.4f} bits per byte, loss {summary.validation_loss:.4f} nats per token"
        )
    if json:
        print_json(summary.to_dict())
    else:
        print(summary.run_directory)
    if stopped:
        raise typer.Exit(summary.exit_code)
