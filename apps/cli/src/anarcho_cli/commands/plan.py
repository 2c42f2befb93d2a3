"""`anarcho plan`: what a run will take, and what this machine has for it, before anything runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anarcho_cli.devices import Backend, Device
from anarcho_cli.training_commands import (
    FileOption,
    PresetOption,
    RunsDirOption,
    SetOption,
    chosen_backend,
    chosen_device,
)

if TYPE_CHECKING:
    from anarcho_cli.config import RunConfig
    from anarcho_cli.plan import Processes


def plan(
    preset: PresetOption = "quickstart",
    file: FileOption = None,
    overrides: SetOption = None,
    runs_dir: RunsDirOption = Path("runs"),
    device: Annotated[
        Device, typer.Option("--device", help="auto is the Apple GPU where there is one, else the CPU.")
    ] = Device.auto,
    backend: Annotated[
        Backend | None,
        typer.Option("--backend", help="Framework that computes, torch if left out; mlx is made for Apple GPUs."),
    ] = None,
    processes: Annotated[int, typer.Option(help="Of so many processes of PyTorch: what each takes.", min=1)] = 1,
    machines: Annotated[int, typer.Option(help="On how many machines these are, as many on each.", min=1)] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print the forecast as a JSON object.")] = False,
) -> None:
    """Forecast a run's memory, disk and time, and the largest model that trains on this machine; nothing is written."""
    from anarcho_cli.benching.subject import ceiling
    from anarcho_cli.config import resolve
    from anarcho_cli.devices import resolve_backend
    from anarcho_cli.fitting.budget import memory_budget
    from anarcho_cli.fitting.decision import find, is_open
    from anarcho_cli.outlook import look_out
    from anarcho_cli.output import note, print_json
    from anarcho_cli.plan import plan_run

    config = resolve(preset=preset, file=file, overrides=overrides or ())
    if config.train.epochs is not None:
        note(
            f"an epoch's steps depend on the text: this is for {config.train.steps:,}; --dry-run of the training counts them"
        )
    framework = resolve_backend(chosen_backend(backend, file=file, overrides=overrides or []))
    name, place = framework.value, chosen_device(device, backend=framework)
    budget = memory_budget(name, place)
    if place == "cpu":
        budget //= max(1, processes // machines)
    several = _several(config, name, place, count=processes, machines=machines, budget_bytes=budget)
    if is_open(config):
        fit = find(config, backend=name, device=place, budget_bytes=budget, probe=None, processes=several)
        config = fit.applied(config)
    planned = plan_run(config, backend=name, device=place, processes=several)
    outlook = look_out(
        planned,
        runs_dir=runs_dir,
        budget_bytes=budget,
        flops_per_second=lambda: ceiling(
            name, device=place, precision="float32" if planned.dtype_bytes == 4 else "bfloat16"
        ),
    )
    if json:
        print_json(outlook.to_dict())
    else:
        print("\n".join([*planned.lines(), *outlook.lines()]))


def _several(
    config: RunConfig, backend: str, device: str, *, count: int, machines: int, budget_bytes: int
) -> Processes | None:
    """The processes that were asked for, with the strategy that they would take; None where there is one."""
    from anarcho_cli.back_ends.torch_processes import fitting_strategy
    from anarcho_cli.plan import Processes

    if count == 1:
        return None
    if backend != "torch":
        raise ValueError(f"--processes forecasts those of PyTorch, not of {backend}; add --backend torch")
    asked = Processes(count=count, machines=machines)
    strategy = config.train.strategy
    if strategy == "auto":
        strategy = fitting_strategy(config, budget_bytes, machines=[count // machines] * machines, device=device)
    return dataclasses.replace(asked, strategy=strategy)
