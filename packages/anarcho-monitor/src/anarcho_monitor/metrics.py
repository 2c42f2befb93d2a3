"""metrics.jsonl: the one record of a run that everything else is derived from.

Each line is one strict JSON object `{v, run, attempt, step, tokens, t_wall, t_mono, kind, ...}`. Notable:

* a line reaches the operating system in one write, so a killed process loses at most the line it was writing;
* NaN and the infinities are written as the strings "NaN", "Infinity", "-Infinity", which strict parsers accept;
* an interrupted run that resumes from a checkpoint logs some steps again. Nothing is deleted: an attempt starts with a
  "start" record that carries the restored step, and `read_curve` leaves out what earlier attempts logged past it.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from anarcho_monitor.errors import MonitorError

FORMAT_VERSION = 1
_RESERVED = ("v", "run", "attempt", "t_wall", "t_mono")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsLog:
    """A sink that appends to a metrics file. `attempt` None continues after the last attempt in the file, from 1."""

    def __init__(self, path: str | os.PathLike[str], *, run: str, attempt: int | None = None) -> None:
        self.path = Path(path)
        self.run = run
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.attempt = next_attempt(self.path) if attempt is None else attempt
        # Unbuffered and in append mode: what `write` returned from is out of this process, whatever happens to it next.
        self._file = self.path.open("ab", buffering=0)
        self._torn = _last_line_is_torn(self.path)

    def write(self, kind: str, *, step: int, tokens: int, **values: Any) -> None:
        """Appends one record; raises `MonitorError` for a name that the format keeps for itself, OSError on a full disk."""
        for name in _RESERVED:
            if name in values:
                raise MonitorError(f"The metric name {name!r} is one of the log's own fields: choose another name.")
        record = {
            "v": FORMAT_VERSION,
            "run": self.run,
            "attempt": self.attempt,
            "step": int(step),
            "tokens": int(tokens),
            "t_wall": time.time(),
            "t_mono": time.monotonic(),
            "kind": kind,
        } | values
        line = json.dumps(to_json(record), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        # A lone surrogate is a valid Python string but not valid UTF-8; the log must take any text that a model wrote.
        self._append(line.encode("utf-8", errors="replace") + b"\n")

    def close(self) -> None:
        self._file.close()

    def _append(self, line: bytes) -> None:
        rest = b"\n" + line if self._torn else line
        self._torn = True  # until the whole line is out, so that a failed write cannot spoil the one after it
        while rest:
            written = self._file.write(rest)
            rest = rest[written:]
        self._torn = False


class Point(NamedTuple):
    """One point of a curve."""

    step: int
    tokens: int
    value: float


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All whole records of a metrics file in the order written. Lines torn by a crash are left out.

    Raises FileNotFoundError where there is no such file and `MonitorError` for records of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no metrics file at {path}: give the metrics.jsonl of a run directory.")
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        record = parse_record(line, where=f"{path}, line {number}")
        if record is not None:
            records.append(record)
    return records


def parse_record(line: bytes, *, where: object) -> dict[str, Any] | None:
    """The record of a line, or None where it is torn; raises `MonitorError`, naming ``where``, for one of a newer format."""
    record = _parse(line)
    if record is not None and record.get("v") != FORMAT_VERSION:
        raise MonitorError(
            f"{where} has format version {record.get('v')!r}, but this version of anarcho-monitor "
            f"reads {FORMAT_VERSION}: use the version that wrote the file."
        )
    return record


def surviving_records(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records without those of steps that were done again, after a later attempt was restored or the run had rolled back."""
    records = [dict(record) for record in records]
    return [record for record, lost in zip(records, superseded(records), strict=True) if not lost]


def superseded(records: Sequence[Mapping[str, Any]]) -> list[bool]:
    """For each record, in the order written, whether its step was done again by those after it."""
    lost = [False] * len(records)
    bound = math.inf  # The last step that what comes before the present record may speak for.
    for index in range(len(records) - 1, -1, -1):
        record, before = records[index], records[index - 1] if index else None
        lost[index] = record["step"] > bound
        if before is None or before["attempt"] != record["attempt"] or before["step"] > record["step"]:
            # A "start" record and an event carry the restored step, any other one a step done again.
            restored = record["step"] if record["kind"] in ("start", "event") else record["step"] - 1
            bound = min(bound, restored)
    return lost


def read_curve(path: str | os.PathLike[str], kind: str, name: str) -> list[Point]:
    """The values of `name` in records of `kind`, by step, one each: the last one where a step was logged again."""
    points = {}
    for record in surviving_records(read_metrics(path)):
        if record["kind"] == kind:
            value = number_from_json(record.get(name))
            if value is not None:
                points[record["step"]] = Point(record["step"], record["tokens"], value)
    return [points[step] for step in sorted(points)]


def next_attempt(path: str | os.PathLike[str]) -> int:
    """1 + the last attempt in a metrics file; 1 where there is no file yet."""
    path = Path(path)
    return 1 + max((record["attempt"] for record in read_metrics(path)), default=0) if path.is_file() else 1


def to_json(value: Any) -> Any:
    """A value as strict JSON has it; scalars of NumPy, torch and MLX become numbers, what has no JSON form its text."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        value = float(value)
        return value if math.isfinite(value) else json.dumps(value)
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes | bytearray):
        return [to_json(item) for item in value]
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", None) == 0:
        return to_json(item())
    return str(value)


def number_from_json(value: Any) -> float | None:
    """The number in a record's field, non-finite ones included; None where there is none."""
    if isinstance(value, str):
        return _NON_FINITE.get(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and isinstance(record.get("attempt"), int) and isinstance(record.get("step"), int)
    # A newer format is for the caller to refuse, whatever its fields are.
    return record if whole or (isinstance(record, dict) and record.get("v") not in (None, FORMAT_VERSION)) else None


def _last_line_is_torn(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
