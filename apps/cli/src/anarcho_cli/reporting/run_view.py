"""What a run directory tells: its records, configuration, environment, and whether somebody works on it.

Notable: everything but the records may be missing or damaged. A report of such a run says less, it does not fail.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anarcho_monitor import RunHistory

from anarcho_cli.output import count_text, duration_text
from anarcho_cli.reporting.axes import figure
from anarcho_cli.reporting.errors import ReportError
from anarcho_cli.run_directory import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE
from anarcho_cli.run_liveness import somebody_works_on

STAGES = {"text": "pre-training", "chat": "supervised fine-tuning", "preference": "preference tuning"}


@dataclass(frozen=True, kw_only=True)
class RunView:
    """One run, read once."""

    path: Path
    name: str
    history: RunHistory
    config: dict[str, Any]
    """Section -> key -> value; empty where it cannot be read."""
    environment: dict[str, Any]
    state: str
    """running, finished or stopped."""

    @property
    def stage(self) -> str:
        """What the run does, in words."""
        kind = self.setting("data", "kind")
        return STAGES.get(str(kind), "training")

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run; None where its epochs decide."""
        steps = self.setting("train", "steps")
        return steps if isinstance(steps, int) else None

    @property
    def facts(self) -> dict[str, Any]:
        """What the attempts say of themselves, the newest last."""
        return {name: value for attempt in self.history.attempts for name, value in attempt.facts.items()}

    def setting(self, section: str, key: str) -> Any:
        """A value of the configuration; None where there is none."""
        values = self.config.get(section)
        return values.get(key) if isinstance(values, dict) else None

    def best(self, name: str = "loss") -> tuple[float, int] | None:
        """The smallest finite validation value, and its step."""
        points = [(p.value, p.step) for p in self.history.curve("validation", name).points if math.isfinite(p.value)]
        return min(points, default=None)

    def results(self) -> dict[str, str]:
        """The results in words, by name; what is not known is left out."""
        history, best, best_bits = self.history, self.best(), self.best("bits_per_byte")
        speeds = sorted(p.value for p in history.curve("train", "tokens_per_second").points)
        entries = {
            "validation loss": _known(history.last("validation", "loss")),
            "best validation loss": f"{figure(best[0])} at step {best[1]}" if best else None,
            "bits per byte": _known(history.last("validation", "bits_per_byte")),
            "best bits per byte": f"{figure(best_bits[0])} at step {best_bits[1]}" if best_bits else None,
            "training loss": _known(history.last("train", "loss")),
            "steps": f"{history.last_step} of {self.total_steps}" if self.total_steps else str(history.last_step),
            "tokens": count_text(history.last_tokens),
            "time": duration_text(history.seconds),
            "tokens per second": count_text(speeds[len(speeds) // 2]) if speeds else None,
            "parameters": _count(self.facts.get("parameters")),
        }
        for name in history.names("validation"):
            if name not in ("loss", "bits_per_byte"):
                entries[f"{words(name)} (validation)"] = _known(history.last("validation", name))
        return {name: text for name, text in entries.items() if text is not None}


def read_run(path: Path) -> RunView:
    """The run in a directory; raises `ReportError` where there are no records, `MonitorError` where they are of a newer format."""
    metrics = path / METRICS_FILE
    if not metrics.is_file():
        what = "is not there" if not path.exists() else f"holds no {METRICS_FILE}"
        raise ReportError(f"{path} {what}; expected the directory of a run that has begun to train")
    history = RunHistory.read(metrics)
    if not history.records:
        raise ReportError(f"{metrics} holds no record yet; wait until the run has begun to train")
    return RunView(
        path=path,
        name=str(history.records[-1].get("run") or path.resolve().name),
        history=history,
        config=_read_toml(path / CONFIG_FILE),
        environment=_read_json(path / ENVIRONMENT_FILE),
        state=run_state(path, history),
    )


def run_state(path: Path, history: RunHistory) -> str:
    """running, finished or stopped: a run has ended where its last attempt says so, and else if nobody works on it."""
    if not history.attempts[-1].ended:
        return "running" if somebody_works_on(path) else "stopped"
    number = history.attempts[-1].number
    messages = [
        str(record.get("message", ""))
        for record in history.records
        if record["kind"] == "event" and record["attempt"] == number
    ]
    return "stopped" if any(message.startswith("stopped by signal") for message in messages) else "finished"


def distinct_names(runs: Sequence[RunView]) -> list[str]:
    """A name for each run that no other one has."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.path.parent.name}/{run.name}" for run in runs]
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, start=1)]


def words(name: str) -> str:
    """A metric's name as words."""
    return name.replace("_", " ")


def flat_values(tree: Any, prefix: str = "") -> dict[str, str]:
    """The leaves of nested tables and lists, as text by dotted name."""
    if isinstance(tree, dict):
        values: dict[str, str] = {}
        for key, value in tree.items():
            values |= flat_values(value, f"{prefix}.{key}" if prefix else str(key))
        return values
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        return flat_values(dict(enumerate(tree)), prefix)
    return {prefix: ", ".join(map(str, tree)) if isinstance(tree, list) else str(tree)}


def _known(value: float | None) -> str | None:
    return None if value is None else figure(value)


def _count(value: Any) -> str | None:
    return count_text(value) if isinstance(value, int | float) else None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
