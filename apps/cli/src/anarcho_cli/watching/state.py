"""What is known of a run at a moment, from its records as they come."""

from __future__ import annotations

import math
import tomllib
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anarcho_monitor import MetricsTail, Point, thin
from anarcho_monitor.metrics import number_from_json

from anarcho_cli.run_directory import CONFIG_FILE, METRICS_FILE
from anarcho_cli.run_liveness import somebody_works_on

EVENTS = 5
LOSSES = 4000
"""So many of the newest losses are drawn."""
SILENCE_SECONDS = 10.0
"""After so long without a record it is asked whether anybody works on the run."""


@dataclass
class RunState:
    """The newest values of a run."""

    name: str
    total_steps: int | None = None
    step: int = 0
    tokens: int = 0
    attempt: int = 1
    ended: bool = False
    """Whether the newest attempt said that it ended."""
    stopped_by_signal: bool = False
    begun: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    training: dict[str, float] = field(default_factory=dict)
    """Of the newest "train" record."""
    trained_at: float = 0.0
    """When that was written, in seconds since 1970."""
    validation: dict[str, float] = field(default_factory=dict)
    validated_step: int = 0
    best: tuple[float, int] | None = None
    events: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=EVENTS))
    sample: tuple[int, str] | None = None
    losses: deque[Point] = field(default_factory=lambda: deque(maxlen=LOSSES))

    def take(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Brings the state up to date with further records."""
        for record in records:
            self._take(record)

    def _take(self, record: Mapping[str, Any]) -> None:
        kind = record.get("kind")
        numbers = {name: number for name, value in record.items() if (number := number_from_json(value)) is not None}
        if record["attempt"] != self.attempt or record["step"] < self.step:
            self._go_back(record["step"])
        self.begun, self.ended, self.attempt = True, kind == "end", record["attempt"]
        self.step, self.tokens = record["step"], int(numbers.get("tokens", 0))
        if kind == "start":
            self.facts |= record
            self.stopped_by_signal = False
        elif kind == "train":
            self.training, self.trained_at = numbers, numbers.get("t_wall", 0.0)
            self.losses.append(Point(self.step, self.tokens, numbers.get("loss", math.nan)))
        elif kind == "validation":
            self.validation, self.validated_step = numbers, self.step
            loss = numbers.get("loss", math.nan)
            if math.isfinite(loss) and (self.best is None or loss < self.best[0]):
                self.best = (loss, self.step)
        elif kind == "sample":
            self.sample = (self.step, str(record.get("text", "")))
        elif kind == "event":
            message = str(record.get("message", ""))
            self.events.append((self.step, message))
            self.stopped_by_signal = self.stopped_by_signal or message.startswith("stopped by signal")
        elif kind == "checkpoint":
            self.events.append((self.step, f"checkpoint {record.get('path', '')}"))

    def _go_back(self, step: int) -> None:
        """Another attempt, or one that rolled back, does steps again: what was measured past its beginning is not the run's."""
        while self.losses and self.losses[-1].step > step:
            self.losses.pop()
        if self.best is not None and self.best[1] > step:
            self.best = None
        if self.validated_step > step:
            self.validation = {}

    def seconds_left(self, now: float) -> float | None:
        """The run's own estimate, less the time since it was made."""
        estimate = self.training.get("eta_seconds")
        if estimate is None or not math.isfinite(estimate) or self.ended:
            return None
        return max(0.0, estimate - max(0.0, now - self.trained_at))

    def recent_losses(self, width: int) -> list[float]:
        """At most about ``3 * width`` finite losses, extremes included."""
        return [point.value for point in thin(list(self.losses), buckets=width) if math.isfinite(point.value)]


class Watched:
    """A run directory under observation."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._tail = MetricsTail(run / METRICS_FILE)
        self._generation = 0
        self._last_record: float | None = None
        self.state = self._fresh()

    def poll(self, now: float) -> list[dict[str, Any]]:
        """Reads what is new at ``now``, in seconds of a monotonic clock, and returns it."""
        records = self._tail.poll()
        if self._tail.generation != self._generation:
            self._generation, self.state = self._tail.generation, self._fresh()
        self.state.take(records)
        if records or self._last_record is None:
            self._last_record = now
        return records

    def is_over(self, now: float) -> bool:
        """Whether the run has ended, or is silent and nobody works on it; another attempt may follow a killed one at once."""
        silent = self._last_record is not None and now - self._last_record >= SILENCE_SECONDS
        return (self.state.ended or silent) and not somebody_works_on(self.run)

    def condition(self) -> str:
        """running, finished, stopped or waiting, as of now."""
        if self.state.ended:
            return "stopped" if self.state.stopped_by_signal else "finished"
        if somebody_works_on(self.run):
            return "running" if self.state.begun else "preparing"
        return "stopped" if self.state.begun else "not begun"

    def _fresh(self) -> RunState:
        return RunState(name=self.run.resolve().name, total_steps=_total_steps(self.run))


def _total_steps(run: Path) -> int | None:
    try:
        train = tomllib.loads((run / CONFIG_FILE).read_text(encoding="utf-8")).get("train", {})
    except (OSError, ValueError):
        return None
    steps = train.get("steps") if isinstance(train, dict) else None
    return steps if isinstance(steps, int) and steps > 0 else None
