"""`anarcho plan`: what a run will take, and what this machine has for it, before anything runs."""

from __future__ import annotations

from pathlib import Path

from anarcho_cli.devices import Device
from anarcho_cli.training_commands import (
    BackendOption,
    DeviceOption,
    FileOption,
    JsonOption,
    PresetOption,
    RunsDirOption,
    SetOption,
    chosen_backend,
    chosen_device,
)


def plan(
    preset: PresetOption = "quickstart",
    file: FileOption = None,
    overrides: SetOption = None,
    runs_dir: RunsDirOption = Path("runs"),
    device: DeviceOption = Device.auto,
    backend: BackendOption = None,
    json: JsonOption = False,
) -> None:
    """Forecast a run's memory, disk and time, and the largest model that trains on this machine; nothing is written."""
    from anarcho_cli.benching.subject import ceiling
    from anarcho_cli.config import resolve
    from anarcho_cli.devices import resolve_backend
    from anarcho_cli.fitting.budget import memory_budget
    from anarcho_cli.fitting.decision import find, is_open
    from anarcho_cli.outlook import look_out
    from anarcho_cli.output import print_json
    from anarcho_cli.plan import plan_run

    config = resolve(preset=preset, file=file, overrides=overrides or ())
    framework = resolve_backend(chosen_backend(backend, file=file, overrides=overrides or []))
    name, place = framework.value, chosen_device(device, backend=framework)
    budget = memory_budget(name, place)
    if is_open(config):
        config = find(config, backend=name, device=place, budget_bytes=budget, probe=None).applied(config)
    planned = plan_run(config, backend=name, device=place)
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
