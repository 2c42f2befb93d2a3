"""`anarcho bench`: what the stack does on this machine, beside what was forecast."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anarcho_cli.devices import Backend, Device

if TYPE_CHECKING:
    from anarcho_cli.benching.cases import Case, Target
    from anarcho_cli.config import RunConfig

DEFAULT_KINDS = ("training", "optimizer", "generation", "tokenizer", "data")
"""What is measured without --only; start-up would take as long as the rest."""
KINDS = (*DEFAULT_KINDS, "start-up")
MAC_KINDS = ("training", "generation")


def bench(
    presets: Annotated[
        list[str] | None,
        typer.Option("--preset", help="Preset to measure; may be repeated.", show_default="quickstart"),
    ] = None,
    file: Annotated[Path | None, typer.Option("--config", "-c", help="TOML file over the presets.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: --set model.dim=512.")
    ] = None,
    backend: Annotated[
        Backend | None, typer.Option("--backend", help="Measure this framework alone.", show_default="all installed")
    ] = None,
    device: Annotated[
        Device | None, typer.Option("--device", help="Measure this device alone.", show_default="all usable")
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option("--micro-batch", min=1, help="Sequences at once; sets train.micro_batch.")
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="Tokens of a sequence; sets model.context_length, too.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps, whose median counts.")] = 5,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="KIND",
            help=f"Measure {', '.join(KINDS[:-1])} or {KINDS[-1]} alone; may be repeated.",
            show_default=f"all but {KINDS[-1]}",
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, help="Seconds after which a measurement is given up.")
    ] = 900,
    mac_report: Annotated[
        bool,
        typer.Option("--mac-report", help="Measure the presets on a Mac's GPU and print Markdown for the project."),
    ] = False,
    memory_table: Annotated[
        bool,
        typer.Option("--memory-table", help="Print which preset fits which Mac by the forecast, and measure nothing."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print an object with machine and results.")] = False,
) -> None:
    """Measure training and its parts on this machine, each in a process of its own, beside the forecasts.

    Without options it measures the quickstart model with every framework and device that is here: training, the optimizer's update,
    generation, the tokenizer, and the way of the data.
    """
    from anarcho_cli.benching.memory_table import PRESETS
    from anarcho_cli.benching.memory_table import memory_table as table

    if memory_table:
        print(table(), end="")
        return
    from anarcho_cli.benching.machine import machine_facts
    from anarcho_cli.benching.report import mac_report as markdown_report
    from anarcho_cli.benching.report import print_report
    from anarcho_cli.benching.shares import with_shares
    from anarcho_cli.output import note, print_json

    machine = machine_facts()
    if mac_report and not machine["mac"]:
        note("this is no Mac with an Apple chip; the report shows what is here, for trying it out")
    kinds = _kinds(only, mac_report=mac_report)
    names = presets or (list(PRESETS) if mac_report else ["quickstart"])
    configs = {
        name: _configuration(name, file=file, overrides=overrides or [], micro_batch=micro_batch, context=context)
        for name in names
    }
    if only:
        _require_measurable(configs, only)
    targets = _targets(backend, device, apple_gpu_alone=mac_report and machine["mac"])
    rows = with_shares(list(_measure(_cases(configs, targets, kinds, steps=steps), timeout=timeout)))
    if json:
        print_json({"machine": machine, "steps": steps, "results": rows})
    elif mac_report:
        print(markdown_report(rows, machine, steps=steps))
    else:
        print_report(rows, machine)
    if rows and all("error" in row for row in rows):
        raise typer.Exit(1)


def _kinds(only: list[str] | None, *, mac_report: bool) -> list[str]:
    from anarcho_cli.layers import ConfigError

    for kind in only or ():
        if kind not in KINDS:
            raise ConfigError(f"--only is '{kind}'; expected {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    return only or list(MAC_KINDS if mac_report else DEFAULT_KINDS)


def _require_measurable(configs: dict[str, RunConfig], only: Sequence[str]) -> None:
    """Refuses text that the kinds which are asked for cannot read, before anything is measured."""
    from anarcho_cli.benching.feeding import require_texts
    from anarcho_cli.benching.starting import require_pretraining

    for config in configs.values():
        if "start-up" in only:
            require_pretraining(config)
        if "start-up" in only or "data" in only:
            require_texts(config)


def _configuration(
    preset: str, *, file: Path | None, overrides: list[str], micro_batch: int | None, context: int | None
) -> RunConfig:
    """A preset's shape with the options of the command over it."""
    from anarcho_cli.config import resolve
    from anarcho_cli.layers import Layer

    options = []
    if micro_batch is not None:
        options.append(Layer(origin="--micro-batch", sections={"train": {"micro_batch": micro_batch}}))
    if context is not None:
        options.append(
            Layer(
                origin="--context",
                sections={"model": {"context_length": context}, "train": {"sequence_length": context}},
            )
        )
    return resolve(preset=preset, file=file, overrides=overrides, options=options)


def _targets(backend: Backend | None, device: Device | None, *, apple_gpu_alone: bool) -> list[Target]:
    """What to measure on; a report of a Mac is of its GPU, unless a device is named."""
    from anarcho_cli.benching.cases import find_targets
    from anarcho_cli.benching.subject import is_installed

    return find_targets(backend, Device.mps if apple_gpu_alone and device is None else device, installed=is_installed)


def _cases(configs: dict[str, RunConfig], targets: Sequence[Target], kinds: Sequence[str], *, steps: int) -> list[Case]:
    """The measurements in the order of their table: by preset, then by framework."""
    from anarcho_cli.benching.cases import Case, Kind

    return [
        Case(kind=Kind(kind), preset=name, config=config, steps=steps, **place)
        for kind in kinds
        for name, config in configs.items()
        for place in (map(dataclasses.asdict, targets) if Kind(kind).needs_framework else [{}])
    ]


def _measure(cases: Sequence[Case], *, timeout: float) -> list[dict[str, object]]:
    from anarcho_monitor import read_system_memory

    from anarcho_cli.benching.processes import run_cases
    from anarcho_cli.output import note

    def tell(case: Case) -> None:
        note(f"measuring {case.kind} of {case.preset}" + (f" on {case.backend} {case.device}" if case.backend else ""))

    available = read_system_memory().available_bytes
    return list(run_cases(cases, timeout_seconds=timeout, available_bytes=available, begin=tell))
