"""`anarcho doctor`: what this machine can do, and whether its devices compute right."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import typer

from anarcho_cli.commands.config import JsonOption

if TYPE_CHECKING:
    from anarcho_cli.selftest import Check

Row = tuple[str, object]


def doctor(json: JsonOption = False) -> None:
    """Show what this machine can do, and test that its devices compute right; exit status 1 where one does not."""
    from anarcho_cli import diagnosis
    from anarcho_cli.output import print_json

    facts = diagnosis.system_facts() | {
        "processor": diagnosis.processor_facts(),
        "compiler": diagnosis.compiler_facts(),
        "torch": diagnosis.torch_devices(),
        "mlx": diagnosis.mlx_facts(),
    }
    checks = _self_test(list(facts["torch"]), mlx=facts["mlx"] is not None)
    healthy = all(check.passed for check in checks)
    if json:
        rows = [{**dataclasses.asdict(check), "passed": check.passed} for check in checks]
        for row in rows:
            row["max_error"] = row["max_error"] if row["max_error"] == row["max_error"] else None
        print_json(facts | {"self_test": rows, "healthy": healthy})
    else:
        _print(facts, checks)
    if not healthy:
        raise typer.Exit(1)


def _self_test(devices: list[str], *, mlx: bool) -> list[Check]:
    from anarcho_cli.selftest import mlx_checks, torch_checks

    checks = [check for device in devices for check in torch_checks(device)]
    return [*checks, *mlx_checks()] if mlx else checks


def _print(facts: dict[str, Any], checks: list[Check]) -> None:
    from anarcho_cli.output import bytes_text, print_table

    processor, compiler = facts["processor"], facts["compiler"]
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in facts["packages"].items())
    memory = f"{bytes_text(processor['memory_bytes'])}, {bytes_text(processor['available_bytes'])} free"
    rows: list[Row] = [
        ("system", f"{facts['system']}, Python {facts['python']} ({facts['executable']})"),
        ("packages", versions),
        ("cores", f"{processor['cores']} cores, {processor['threads']} threads, {processor['usable_threads']} usable"),
        ("memory", memory),
        ("processor", ", ".join(processor["features"]) or "no instruction set of note"),
        ("native types", ", ".join(processor["native_dtypes"])),
        ("C++ compiler", _compiler_text(compiler)),
        *((f"torch {name}", _device_text(device)) for name, device in facts["torch"].items()),
        ("mlx", "not installed" if facts["mlx"] is None else _device_text(facts["mlx"])),
    ]
    print_table(["", ""], rows)
    cells = [(c.device, c.name, f"{c.max_error:.1e}", "ok" if c.passed else "WRONG") for c in checks]
    print_table(["device", "computation", "#largest error", "result"], cells, title="against float64")


def _compiler_text(compiler: dict[str, Any]) -> str:
    if compiler["usable"]:
        return f"{compiler['version']} ({compiler['path']})"
    missing = "Python.h is missing" if compiler["version"] else "no C++ compiler"
    return f"{missing}, so torch.compile cannot be used on the CPU"


def _device_text(device: dict[str, Any]) -> str:
    from anarcho_cli.output import bytes_text

    parts = [
        f"{key.removesuffix('_bytes')} {bytes_text(value) if key.endswith('_bytes') else value}"
        for key, value in device.items()
    ]
    return ", ".join(parts)
