"""`anarcho pretrain`: train a model from raw text, or continue a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anarcho_cli.devices import Device
from anarcho_cli.diagnostics import Diagnostics
from anarcho_cli.layers import CONTINUED_PRESET, DEFAULT_PRESET
from anarcho_cli.training_commands import (
    AllowChangesOption,
    BackendOption,
    DetectAnomalyOption,
    DeviceOption,
    DryRunOption,
    FileOption,
    JsonOption,
    NameOption,
    PresetOption,
    ProfileOption,
    ResumeOption,
    RunsDirOption,
    SetOption,
    SuperviseOption,
    chosen_backend,
    configuration_with_base,
    given,
    refuse_without_resume,
    resume_run,
    start_run,
)

if TYPE_CHECKING:
    from anarcho_cli.config import RunConfig


def pretrain(
    ctx: typer.Context,
    base: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="MODEL",
            help="Run, checkpoint or model directory to begin with, its tokenizer included; with it, the preset is "
            f"`{CONTINUED_PRESET}` unless another is given.",
        ),
    ] = None,
    preset: PresetOption = DEFAULT_PRESET,
    file: FileOption = None,
    overrides: SetOption = None,
    name: NameOption = None,
    runs_dir: RunsDirOption = Path("runs"),
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="SPEC", help="Text: a file, glob, directory, or `embedded`; sets data.source."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Trained tokenizer to use; left out, one is trained on the text.")
    ] = None,
    device: DeviceOption = Device.auto,
    backend: BackendOption = None,
    resume: ResumeOption = None,
    allow_changes: AllowChangesOption = False,
    supervise: SuperviseOption = False,
    profile: ProfileOption = False,
    detect_anomaly: DetectAnomalyOption = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Train a model from raw text.

    With no option it trains the quickstart model on the embedded corpus. With --from a model that has been trained goes on
    with other text. Progress goes to standard error; the last line of standard output is the run directory.
    """
    diagnostics = Diagnostics(profile=profile, detect_anomaly=detect_anomaly)
    if resume is not None:
        resume_run(
            ctx,
            resume,
            backend=backend,
            device=device,
            json=json,
            overrides=overrides or [],
            allow_changes=allow_changes,
            supervise=supervise,
            diagnostics=diagnostics,
        )
        return
    refuse_without_resume(allow_changes=allow_changes)
    common = {"file": file, "overrides": overrides or [], "data": data}
    if base is not None:
        base = tokenizer = _base_model(base, tokenizer)
        preset = preset if given(ctx, "preset") else CONTINUED_PRESET
        config = configuration_with_base(base, preset=preset, **common)
    else:
        config = _configuration(preset=preset, tokenizer=tokenizer, **common)
    start_run(
        config,
        kind="text",
        runs_dir=runs_dir,
        name=name,
        preset=preset,
        backend=chosen_backend(backend, file=file, overrides=overrides or []),
        device=device,
        dry_run=dry_run,
        supervise=supervise,
        json=json,
        tokenizer=tokenizer,
        base=base,
        diagnostics=diagnostics,
    )


def _base_model(path: Path, tokenizer: Path | None) -> Path:
    """The directory of the model to begin with, whose ids mean something in its own tokenizer alone."""
    from anarcho_cli.models import find_model
    from anarcho_cli.runs import RunError

    if tokenizer is not None:
        raise RunError(f"--tokenizer {tokenizer} cannot go with --from, whose model has its own; leave it out")
    return find_model(path)


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
