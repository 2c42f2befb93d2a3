"""What machine the figures are of: chip, memory, system and versions, as the system itself states them."""

from __future__ import annotations

import functools
import json
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

VERSIONS = ("anarcho-cli", "torch", "mlx", "numpy")
"""Packages whose versions the figures depend on."""

Run = Callable[[list[str]], str | None]
"""Runs a command and returns what it printed, None where it is missing or fails."""


def is_apple_silicon() -> bool:
    """Whether this is a Mac with an Apple chip."""
    return platform.system() == "Darwin" and platform.machine() == "arm64"


@functools.cache
def machine_facts() -> dict[str, Any]:
    """The facts of this machine; what it does not tell is None."""
    return read_facts(run=_output, apple=is_apple_silicon(), cpuinfo=Path("/proc/cpuinfo"))


def read_facts(*, run: Run, apple: bool, cpuinfo: Path) -> dict[str, Any]:
    """Chip, GPU cores, memory in bytes, system and versions; ``run`` asks sysctl and system_profiler on a Mac."""
    from anarcho_monitor import read_system_memory

    from anarcho_cli.diagnosis import system_facts

    versions = system_facts()["packages"]
    mac = platform.system() == "Darwin" or apple
    chip = run(["sysctl", "-n", "machdep.cpu.brand_string"]) if mac else _cpu_model(cpuinfo)
    return {
        "mac": apple,
        "chip": (chip or platform.processor() or platform.machine()).strip(),
        "model": (run(["sysctl", "-n", "hw.model"]) or "").strip() or None if mac else None,
        "gpu_cores": _gpu_cores(run(["system_profiler", "-json", "SPDisplaysDataType"])) if apple else None,
        "memory_bytes": read_system_memory().total_bytes,
        "system": f"macOS {platform.mac_ver()[0]}" if mac else platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: versions.get(name) for name in VERSIONS},
    }


def _cpu_model(cpuinfo: Path) -> str | None:
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.lower().startswith("model name")), None)


def _gpu_cores(text: str | None) -> int | None:
    """`sppci_cores` of the first display adapter that has any, in system_profiler's JSON."""
    try:
        adapters = json.loads(text or "{}").get("SPDisplaysDataType", [])
    except ValueError:
        return None
    counts = [str(adapter.get("sppci_cores", "")) for adapter in adapters]
    return next((int(count) for count in counts if count.isdigit()), None)


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
