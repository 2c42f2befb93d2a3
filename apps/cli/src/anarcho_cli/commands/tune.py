"""`anarcho sft` and `anarcho preference`: tune a model on conversations or on pairs of answers, or continue such a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from anarcho_cli.devices import Device
from anarcho_cli.diagnostics import Diagnostics
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
    refuse_without_resume,
    resume_run,
    start_run,
)

DATA_NAMES = {"chat": "Conversations", "preference": "Pairs of answers"}


def tuning_command(kind: str, *, preset: str, doc: str) -> Callable[..., None]:
    """The command that tunes a model on rows of a kind, beginning with a preset."""
    default_preset = preset

    def tune(
        ctx: typer.Context,
        base: Annotated[
            Path | None,
            typer.Option("--from", metavar="MODEL", help="Run, checkpoint or model directory to begin with."),
        ] = None,
        data: Annotated[
            str | None,
            typer.Option(
                "--data",
                metavar="SPEC",
                help=f"{DATA_NAMES[kind]}: a file, glob, directory, `hf://name` or `embedded`.",
            ),
        ] = None,
        preset: PresetOption = default_preset,
        file: FileOption = None,
        overrides: SetOption = None,
        name: NameOption = None,
        runs_dir: RunsDirOption = Path("runs"),
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
        from anarcho_cli.models import ModelNotFoundError, find_model

        if base is None:
            raise ModelNotFoundError("--from is missing; expected the run, checkpoint or model directory to tune")
        model = find_model(base)
        config = configuration_with_base(model, preset=preset, file=file, overrides=overrides or [], data=data)
        start_run(
            config,
            kind=kind,
            runs_dir=runs_dir,
            name=name,
            preset=preset,
            backend=chosen_backend(backend, file=file, overrides=overrides or []),
            device=device,
            dry_run=dry_run,
            supervise=supervise,
            json=json,
            tokenizer=model,
            base=model,
            diagnostics=diagnostics,
        )

    tune.__doc__ = doc
    return tune


sft = tuning_command(
    "chat",
    preset="sft",
    doc="""Tune a model on conversations: it learns the assistant's answers, and nothing of what they answer to.

    Without --data it learns the embedded questions and answers. The last line of standard output is the run directory.
    """,
)

preference = tuning_command(
    "preference",
    preset="preference",
    doc="""Tune a model on pairs of answers: it learns to prefer the chosen one to the rejected one.

    The loss is DPO's unless preference.loss names another. Without --data it learns the embedded pairs. The last line of
    standard output is the run directory.
    """,
)
