"""A whole run as its metrics.jsonl tells it: attempts, curves, and what happened on the way.

Notable: an interrupted run does some steps again, and so does one that rolls back. `Curve.points` is what the run that remains has
measured; what was measured before and done again is kept apart in `Curve.abandoned`, a stretch for each time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from anarcho_monitor.metrics import Point, number_from_json, read_metrics, superseded

_OWN_FIELDS = frozenset({"v", "run", "attempt", "step", "tokens", "t_wall", "t_mono", "kind"})
MarkKind = Literal["resume", "checkpoint", "micro-batch", "skip", "spike", "rollback", "stop", "event"]
_MARK_WORDS: tuple[tuple[MarkKind, tuple[str, ...]], ...] = (
    ("rollback", ("rolled back", "went back")),
    ("micro-batch", ("micro-batch", "out of memory")),
    ("skip", ("no update",)),
    ("spike", ("spike",)),
    ("stop", ("stopp", "come to its end", "killed")),
)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One measured quantity over a run."""

    points: list[Point]
    """By step, one each."""
    abandoned: list[list[Point]]
    """Stretches that were done again later, in the order written."""


class Mark(NamedTuple):
    """Something that happened at a step."""

    step: int
    kind: MarkKind
    text: str


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One process that worked on the run."""

    number: int
    first_step: int
    """The step that it began after."""
    last_step: int
    began_at: float
    """Seconds since 1970."""
    seconds: float
    """From its first record to its last."""
    facts: Mapping[str, Any]
    """What its "start" record says."""
    ended: bool
    """Whether it came to its end without an error; a killed one did not."""


class RunHistory:
    """The records of one run, read once."""

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        self.records = [dict(record) for record in records]
        gone = superseded(self.records)
        self._curves: dict[tuple[str, str], Curve] = {}
        self._by_kind: dict[str, list[tuple[dict[str, Any], bool]]] = {}
        for record, lost in zip(self.records, gone, strict=True):
            self._by_kind.setdefault(record["kind"], []).append((record, lost))
        self.survivors = [record for record, lost in zip(self.records, gone, strict=True) if not lost]
        """Records that belong to the run as it is now."""

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> RunHistory:
        """The history in a metrics file; raises as `read_metrics` does."""
        return cls(read_metrics(path))

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The surviving records of a kind."""
        return [record for record, lost in self._by_kind.get(kind, ()) if not lost]

    def last(self, kind: str, name: str) -> float | None:
        """The newest finite or non-finite number of a quantity; None where there is none."""
        points = self.curve(kind, name).points
        return points[-1].value if points else None

    def names(self, kind: str) -> list[str]:
        """The names of all quantities in records of a kind, in the order of their first appearance."""
        names: dict[str, None] = {}
        for record, _ in self._by_kind.get(kind, ()):
            if record.keys() <= names.keys() | _OWN_FIELDS:
                continue
            for name, value in record.items():
                if name not in _OWN_FIELDS and number_from_json(value) is not None:
                    names[name] = None
        return list(names)

    def curve(self, kind: str, name: str) -> Curve:
        """The values of a quantity in records of a kind."""
        if (kind, name) not in self._curves:
            self._curves[kind, name] = self._read_curve(kind, name)
        return self._curves[kind, name]

    def _read_curve(self, kind: str, name: str) -> Curve:
        points: dict[int, Point] = {}
        abandoned: list[list[Point]] = []
        attempt = None  # Of the abandoned point just before.
        for record, lost in self._by_kind.get(kind, ()):
            value = number_from_json(record.get(name))
            if value is None:
                continue
            point = Point(record["step"], record["tokens"], value)
            if not lost:
                points[point.step] = point
                attempt = None  # What is abandoned after this is another stretch.
                continue
            if record["attempt"] != attempt or point.step <= abandoned[-1][-1].step:
                abandoned.append([])
            abandoned[-1].append(point)
            attempt = record["attempt"]
        return Curve(points=[points[step] for step in sorted(points)], abandoned=abandoned)

    @cached_property
    def attempts(self) -> list[Attempt]:
        """The processes that worked on the run, in order."""
        by_number: dict[int, list[dict[str, Any]]] = {}
        for record in self.records:
            by_number.setdefault(record["attempt"], []).append(record)
        return [_attempt(number, records) for number, records in sorted(by_number.items())]

    @property
    def seconds(self) -> float:
        """Time that the attempts worked, from each one's first record to its last."""
        return sum(attempt.seconds for attempt in self.attempts)

    @property
    def last_step(self) -> int:
        """Steps that the run has made."""
        return max((record["step"] for record in self.survivors), default=0)

    @property
    def last_tokens(self) -> int:
        """Tokens that the run has trained on."""
        return max((record["tokens"] for record in self.survivors), default=0)

    @cached_property
    def marks(self) -> list[Mark]:
        """Resumptions, checkpoints and events, by step; events of steps that were done again, too, since they explain why."""
        marks = [
            Mark(attempt.first_step, "resume", f"attempt {attempt.number} goes on after step {attempt.first_step}")
            for attempt in self.attempts[1:]
        ]
        for record in self.of("checkpoint"):
            marks.append(Mark(record["step"], "checkpoint", str(record.get("path", "checkpoint"))))
        for record in self.records:
            if record["kind"] == "event":
                text = str(record.get("message", "event"))
                marks.append(Mark(record["step"], mark_kind(text), text))
        return sorted(marks, key=lambda mark: mark.step)


def mark_kind(message: str) -> MarkKind:
    """What an event is about, by its words."""
    text = message.lower()
    for kind, words in _MARK_WORDS:
        if any(word in text for word in words):
            return kind
    return "event"


def _attempt(number: int, records: list[dict[str, Any]]) -> Attempt:
    first, last = records[0], records[-1]
    started = first["kind"] == "start"
    return Attempt(
        number=number,
        first_step=first["step"] if started else max(0, first["step"] - 1),
        last_step=last["step"],
        began_at=float(first.get("t_wall", 0.0)),
        seconds=max(0.0, float(last.get("t_mono", 0.0)) - float(first.get("t_mono", 0.0))),
        facts={name: value for name, value in first.items() if name not in _OWN_FIELDS} if started else {},
        ended=last["kind"] == "end",
    )
