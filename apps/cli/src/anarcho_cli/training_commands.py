"""What the commands that train have in common: their options, refusing, resuming, and starting a run and reporting how it ended."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anarcho_cli.devices import Backend, Device
from anarcho_cli.diagnostics import Diagnostics

if TYPE_CHECKING:
    from anarcho_cli.compose import RunSummary
    from anarcho_cli.config import RunConfig
    from anarcho_cli.layers import Layer


PresetOption = Annotated[
    str, typer.Option("--preset", help="Preset to start from; `anarcho config presets` lists them.")
]
FileOption = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file over the preset.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: --set train.steps=100.")
]
NameOption = Annotated[str | None, typer.Option("--name", help="Name of the run; left out, preset and time.")]
RunsDirOption = Annotated[Path, typer.Option("--runs-dir", help="Where runs are kept.")]
DeviceOption = Annotated[
    Device,
    typer.Option("--device", help="auto is the Apple GPU where there is one, else the CPU; resuming, as before."),
]
BackendOption = Annotated[
    Backend | None,
    typer.Option(
        "--backend", help="Framework that computes, torch if left out; mlx is made for Apple GPUs. Resuming, as before."
    ),
]
ResumeOption = Annotated[
    Path | None,
    typer.Option(
        "--resume",
        metavar="RUN",
        help="Continue this run; --set, --allow-changes, --backend, --device, --supervise, --profile, --detect-anomaly "
        "and --json go along.",
    ),
]
SuperviseOption = Annotated[
    bool,
    typer.Option(
        "--supervise", help="Start the training again where the system kills it; recovery.max_restarts times."
    ),
]
AllowChangesOption = Annotated[
    bool,
    typer.Option(
        "--allow-changes",
        help="Resuming, take a changed configuration that changes what is learned from here on.",
    ),
]
ProfileOption = Annotated[
    bool,
    typer.Option("--profile", help="Record a few steps with the framework's profiler, into the run's folder profile."),
]
DetectAnomalyOption = Annotated[
    bool,
    typer.Option("--detect-anomaly", help="End the run at the first loss or gradient that is not finite, and say why."),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print configuration, size, memory and FLOPs of the run, and stop.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print a summary object instead of the run directory.")]


_WITH_RESUME = (
    *("resume", "backend", "device", "json", "overrides", "allow_changes", "supervise"),
    *("profile", "detect_anomaly"),
)


def refuse_without_resume(*, allow_changes: bool) -> None:
    """What is for runs that go on has no meaning for one that begins."""
    from anarcho_cli.runs import RunError

    if allow_changes:
        raise RunError("--allow-changes goes with --resume alone; a run that begins takes any configuration")


def _refuse_with_resume(ctx: typer.Context) -> None:
    """A resumed run keeps its model and data: any option that would choose others is refused by name."""
    from anarcho_cli.runs import RunError

    for parameter in ctx.command.params:
        if parameter.name not in _WITH_RESUME and given(ctx, parameter.name or ""):
            raise RunError(
                f"{parameter.opts[0]} cannot go with --resume, which continues a run as it was begun; keys that may change take --set"
            )


def given(ctx: typer.Context, parameter: str) -> bool:
    """Whether a parameter stands on the command line, rather than having its default."""
    source: Any = ctx.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def configuration_with_base(
    model: Path, *, preset: str, file: Path | None, overrides: list[str], data: str | None
) -> RunConfig:
    """A run's configuration, whose model and vocabulary are those of the base model's directory."""
    from anarcho_model.directory import load_config
    from anarcho_tokenize import load_tokenizer

    from anarcho_cli.config import resolve, section_values
    from anarcho_cli.layers import Layer, file_layer, set_layer

    sections = {
        "model": section_values(load_config(model)),
        "tokenizer": {"vocab_size": load_tokenizer(model).vocab_size},
    }
    for layer in ([] if file is None else [file_layer(file)]) + [set_layer(overrides)]:
        _require_same_model(layer, sections, model)
    options = [Layer(origin=f"--from {model}", sections=sections)]
    options += [] if data is None else [Layer(origin="--data", sections={"data": {"source": data}})]
    return resolve(preset=preset, file=file, overrides=overrides, options=options)


def _require_same_model(layer: Layer, sections: Mapping[str, Mapping[str, Any]], model: Path) -> None:
    """Raises ConfigError where a layer wants another shape than the model has, with which the training goes on."""
    from anarcho_cli.layers import ConfigError
    from anarcho_cli.schema import NONE

    for section, own in sections.items():
        for key, value in layer.sections.get(section, {}).items():
            if key in own and isinstance(value, int | float | str) and value not in (own[key], NONE):
                raise ConfigError(
                    f"{layer.origin}: {section}.{key} is {value!r}, but the model {model} has {own[key]!r}, which stays; leave it out"
                )


def require_source(config: RunConfig, *, kind: str) -> None:
    """Find the text now, so that a wrong path leaves no run behind."""
    from anarcho_tokenize import check_source

    from anarcho_cli.layers import ConfigError

    if config.data.kind != kind:
        raise ConfigError(f"data.kind is '{config.data.kind}'; expected '{kind}' for this command")
    check_source(config.data)


def _require_base(config: RunConfig, base: Path | None) -> None:
    """An adapter is added to a model that has learned something."""
    from anarcho_cli.layers import ConfigError

    if config.lora.rank and base is None:
        raise ConfigError(
            f"lora.rank is {config.lora.rank}, but this run begins without a model to adapt; expected 0, or a model "
            "to begin with as --from"
        )


def _print_plan(config: RunConfig, *, tokenizer: Path | None, backend: Backend, device: Device, json: bool) -> None:
    """What --dry-run says; epochs are counted on the data, with the run's tokenizer."""
    from anarcho_cli.config import dumps
    from anarcho_cli.fitting.budget import planning_budget
    from anarcho_cli.fitting.decision import find, is_open
    from anarcho_cli.output import print_json
    from anarcho_cli.plan import plan_run

    if config.train.epochs is not None:
        from anarcho_cli import compose

        config = compose.with_counted_steps(config, tokenizer_path=tokenizer)
    planned = config
    if is_open(config):
        budget = planning_budget(device.value)
        fit = find(config, backend=backend.value, device=device.value, budget_bytes=budget, probe=None)
        planned = fit.applied(config)
    plan = plan_run(planned, backend=backend.value, device=device.value)
    if json:
        print_json(plan.to_dict())
        return
    print(dumps(config))
    print("\n".join(plan.lines()))


def resume_run(
    ctx: typer.Context,
    path: Path,
    *,
    backend: Backend | None,
    device: Device,
    json: bool,
    overrides: Sequence[str] = (),
    allow_changes: bool = False,
    supervise: bool = False,
    diagnostics: Diagnostics | None = None,
) -> None:
    """Continue a run in the framework and on the device of before unless others are given; refuses all other options."""
    from anarcho_cli.devices import resolve_backend
    from anarcho_cli.runs import existing_run, recorded_place

    _refuse_with_resume(ctx)
    if supervise:
        from anarcho_cli.supervision import supervise_resumed

        supervise_resumed(path, overrides=overrides)
    run = existing_run(path)
    last_backend, last_device = recorded_place(run)
    framework = resolve_backend(backend or last_backend)
    if diagnostics is not None:
        diagnostics.require_possible(backend=framework.value)
    wanted = device if given(ctx, "device") else Device(last_device or device)
    resolved = chosen_device(wanted, backend=framework)

    from anarcho_cli import compose
    from anarcho_cli.config import resolve
    from anarcho_cli.launching import connected

    config = resolve(preset=None, file=run / "config.toml", overrides=overrides)
    with connected(config, backend=framework.value) as ranks:
        summary = compose.resume(
            run,
            backend=framework.value,
            device=resolved,
            overrides=overrides,
            allow_changes=allow_changes,
            ranks=ranks,
            diagnostics=diagnostics,
        )
        finish(summary, json=json)


def start_run(
    config: RunConfig,
    *,
    kind: str,
    runs_dir: Path,
    name: str | None,
    preset: str,
    backend: Backend,
    device: Device,
    dry_run: bool,
    json: bool,
    tokenizer: Path | None = None,
    base: Path | None = None,
    supervise: bool = False,
    diagnostics: Diagnostics | None = None,
) -> None:
    """Train a new run on rows of a kind, or with ``dry_run`` say what it would cost."""
    from anarcho_cli.runs import new_run_directory

    if supervise and not dry_run:
        from anarcho_cli.supervision import supervise_new

        supervise_new(config, runs_dir=runs_dir, name=name, preset=preset)

    def new_directory() -> Path:
        directory = new_run_directory(runs_dir, name, preset=preset)
        require_source(config, kind=kind)
        return directory

    _require_base(config, base)
    if dry_run:
        new_directory()
        _print_plan(config, tokenizer=tokenizer, backend=backend, device=device, json=json)
        return

    from anarcho_train import after_first, told

    from anarcho_cli import compose
    from anarcho_cli.devices import resolve_backend
    from anarcho_cli.launching import connected, is_restarted

    resolve_backend(backend)
    if diagnostics is not None:
        diagnostics.require_possible(backend=backend.value)
    with connected(config, backend=backend.value) as ranks:
        directory, begun = runs_dir, False
        with after_first(ranks):
            if ranks.rank == 0:  # Which alone needs the text, and knows the time that all name the run after.
                begun = name is not None and is_restarted(os.environ) and (runs_dir / name).is_dir()
                directory = runs_dir / name if name is not None and begun else new_directory()
        directory = runs_dir / told(ranks, directory.name)
        place = {"backend": backend.value, "device": chosen_device(device, backend=backend)}
        common: dict[str, Any] = {**place, "ranks": ranks, "diagnostics": diagnostics}
        if told(ranks, "begun" if begun else ""):
            summary = compose.resume(directory, **common)
        else:
            summary = compose.train(config, run_directory=directory, tokenizer_path=tokenizer, base=base, **common)
        finish(summary, json=json)


def chosen_backend(backend: Backend | None, *, file: Path | None, overrides: Sequence[str]) -> Backend:
    """The framework of --backend, else of ``--set backend=...``, else of the file, else PyTorch."""
    from anarcho_cli.layers import root_value

    return Backend(backend or root_value("backend", file=file, overrides=overrides) or Backend.torch)


def chosen_device(device: Device, *, backend: Backend) -> str:
    """The device to run on; where `auto` found no Apple GPU, one line says so."""
    from anarcho_cli.devices import resolve_device
    from anarcho_cli.output import note

    resolution = resolve_device(device, backend=backend)
    if resolution.note:
        note(resolution.note)
    return resolution.device


def finish(summary: RunSummary, *, json: bool) -> None:
    """Report how the run ended: people read standard error, scripts the last line of standard output."""
    from anarcho_cli.output import duration_text, note, print_json

    stopped = summary.exit_code != 0
    took = f"{summary.steps} steps, {summary.tokens} tokens, {duration_text(summary.seconds)}"
    note(f"stopped after {took}; continue with --resume {summary.run_directory}" if stopped else f"done: {took}")
    if summary.bits_per_byte is not None:
        note(
            f"validation: {summary.bits_per_byte:.4f} bits per byte, loss {summary.validation_loss:.4f} nats per token"
        )
    elif summary.validation_measures:
        measures = ", ".join(
            f"{name.replace('_', ' ')} {value:.4f}" for name, value in summary.validation_measures.items()
        )
        note(f"validation: loss {summary.validation_loss:.4f}, {measures}")
    if json:
        print_json(summary.to_dict())
    else:
        print(summary.run_directory)
    if stopped:
        raise typer.Exit(summary.exit_code)
