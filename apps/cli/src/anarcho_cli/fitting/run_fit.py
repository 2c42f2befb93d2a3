"""What a run that begins, or goes on, is given for what its configuration leaves open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anarcho_monitor import MonitorError, read_metrics

from anarcho_cli.config import RunConfig
from anarcho_cli.fitting.budget import memory_budget
from anarcho_cli.fitting.decision import Fit, find, is_open, kept
from anarcho_cli.fitting.probing import prober
from anarcho_cli.output import note
from anarcho_cli.plan import Processes
from anarcho_cli.run_directory import METRICS_FILE


def find_fit(
    run_directory: Path, config: RunConfig, *, backend: str, device: str, processes: Processes | None = None
) -> Fit | None:
    """What the run's last attempt had, where that fits still; else it is found anew. None where nothing is open.

    Of several ``processes`` the forecast decides alone: a step that is measured in one would be another.
    """
    if not is_open(config):
        return None
    budget = memory_budget(backend, device)
    if processes and device == "cpu":
        budget //= processes.count // processes.machines
    place = {"backend": backend, "device": device}
    if fit := kept(config, _last_start(run_directory / METRICS_FILE), **place, budget_bytes=budget):
        return fit
    probe = None if processes else prober(backend, device, notify=note)
    fit = find(config, **place, budget_bytes=budget, probe=probe, processes=processes)
    note(fit.event()["message"])
    return fit


def _last_start(file: Path) -> dict[str, Any]:
    """What the last attempt said of itself; nothing where there was none."""
    try:
        starts = [record for record in read_metrics(file) if record.get("kind") == "start"]
    except (FileNotFoundError, MonitorError):
        return {}
    return starts[-1] if starts else {}
