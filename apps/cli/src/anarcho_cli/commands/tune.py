"""`anarcho sft` and `anarcho preference`: tune a model on conversations or on pairs of answers, or continue such a run."""

from collections.abc import Callable
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
                "--data", metavar="SPEC", help="Conversations: a file, glob, directory, `hf://name` or `embedded`."
            ),
        ] = None,
        preset: Annotated[
            str, typer.Option("--preset", help="Preset to start from; `anarcho config presets` lists them.")
        ] = default_preset,
        file: Annotated[Path | None, typer.Option("--config", "-c", help="TOML file over the preset.")] = None,
        overrides: Annotated[
            list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: --set train.steps=100.")
        ] = None,
        name: Annotated[str | None, typer.Option("--name", help="Name of the run; left out, preset and time.")] = None,
        runs_dir: Annotated[Path, typer.Option("--runs-dir", help="Where runs are kept.")] = Path("runs"),
        device: Annotated[
            Device,
            typer.Option(
                "--device", help="auto is the Apple GPU where there is one, else the CPU; resuming, as before."
            ),
        ] = Device.auto,
        backend: Annotated[Backend, typer.Option("--backend", help="Framework that computes.")] = Backend.torch,
        resume: Annotated[
            Path | None,
            typer.Option("--resume", metavar="RUN", help="Continue this run; only --device and --json go along."),
        ] = None,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Print configuration, size, memory and FLOPs of the run, and stop.")
        ] = False,
        json: Annotated[
            bool, typer.Option("--json", help="Print a summary object instead of the run directory.")
        ] = False,
    ) -> None:
        if resume is not None:
            refuse_with_resume(ctx)
            resume_run(resume, device=device, is_device_given=given(ctx, "device"), json=json)
            return
        from anarcho_cli.models import ModelNotFoundError, find_model

        if base is None:
            raise ModelNotFoundError("--from is missing; expected the run, checkpoint or model directory to tune")
        model = find_model(base)
        config = configuration(model, preset=preset, file=file, overrides=overrides or [], data=data)

        from anarcho_cli.runs import new_run_directory

        directory = new_run_directory(runs_dir, name, preset=preset)
        require_source(config, kind=kind)
        if dry_run:
            print_plan(config, device=device, json=json)
            return

        from anarcho_cli import compose

        resolved = chosen_device(device)
        summary = compose.train(config, run_directory=directory, device=resolved, tokenizer_path=model, base=model)
        finish(summary, json=json)

    tune.__doc__ = doc
    return tune


def configuration(
    model: Path, *, preset: str, file: Path | None, overrides: list[str], data: str | None
) -> "RunConfig":
    """The run's configuration, whose model and vocabulary are those of the base model's directory."""
    from anarcho_model.directory import load_config
    from anarcho_tokenize import load_tokenizer

    from anarcho_cli.config import resolve, section_values
    from anarcho_cli.layers import Layer

    sections = {
        "model": section_values(load_config(model)),
        "tokenizer": {"vocab_size": load_tokenizer(model).vocab_size},
    }
    options = [Layer(origin=f"--from {model}", sections=sections)]
    options += [] if data is None else [Layer(origin="--data", sections={"data": {"source": data}})]
    return resolve(preset=preset, file=file, overrides=overrides, options=options)


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
