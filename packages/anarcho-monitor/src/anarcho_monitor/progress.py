"""Progress for the person who waits: a live bar on a terminal, plain lines everywhere else.

Notable: what is shown is derived from the records that the sink receives, so it cannot disagree with metrics.jsonl. Text that a
model wrote is printed without its control characters, which could otherwise command the terminal.
"""

from __future__ import annotations

import math
import os
import sys
import time
import unicodedata
from collections.abc import Callable
from typing import Any, Protocol, TextIO

from anarcho_monitor.metrics import number_from_json, to_json
from anarcho_monitor.remaining import RemainingTime


class _Display(Protocol):
    def update(self, step: int, status: str) -> None: ...

    def line(self, text: str) -> None: ...

    def close(self) -> None: ...


class Progress:
    """A sink that shows a run of `total_steps` steps of `tokens_per_step` tokens each on `stream` (standard error).

    Without a terminal, a line appears at the first and the last "train" record and else at most every `interval_seconds`;
    the other kinds have a line each.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        stream: TextIO | None = None,
        tokens_per_step: int,
        interval_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._tokens_per_step = tokens_per_step
        self._bits_per_byte: float | None = None
        self._remaining = RemainingTime(total_steps, clock=clock)
        self._display = _display(stream or sys.stderr, total_steps, interval_seconds, clock)

    def write(self, kind: str, *, step: int, tokens: int, **values: Any) -> None:
        if kind == "start":
            self._remaining.restart()
        if kind == "validation":
            self._remaining.validated(step)
            self._bits_per_byte = _number(values, "bits_per_byte")
        if kind == "train":
            self._display.update(step, self._status(step, values))
        elif kind != "end":  # The command that ran it says how a run ended.
            self._display.line(describe(kind, step, values))

    def close(self) -> None:
        self._display.close()

    def _status(self, step: int, values: dict[str, Any]) -> str:
        speed = _number(values, "tokens_per_second")
        eta = self._seconds_left(step, speed, values)
        # The last validation's figure, unless the loop measures it on the training text, too.
        bits_per_byte = _number(values, "bits_per_byte")
        shown = self._bits_per_byte if bits_per_byte is None else bits_per_byte
        memory = max((_number(values, name) or 0.0 for name in ("reserved_bytes", "process_bytes")), default=0.0)
        parts = [
            _part("loss", _number(values, "loss"), "{:.4f}"),
            _part("bits/byte", shown, "{:.4f}"),
            f"{format_count(speed)} tokens/s" if speed else "",
            f"{memory / 2**30:.1f} GiB" if memory else "",
            f"{format_seconds(eta)} left" if eta is not None else "",
        ]
        return "  ".join(part for part in parts if part)

    def _seconds_left(self, step: int, speed: float | None, values: dict[str, Any]) -> float | None:
        """What the loop says, or else what the records let expect, or else what the speed of this one alone does."""
        step_seconds = _number(values, "step_seconds") or (self._tokens_per_step / speed if speed else None)
        if step_seconds is None:
            return _number(values, "eta_seconds")
        self._remaining.trained(step, step_seconds)
        estimates = (_number(values, "eta_seconds"), self._remaining.seconds, (self._total_steps - step) * step_seconds)
        return next(estimate for estimate in estimates if estimate is not None)


def describe(kind: str, step: int, values: dict[str, Any]) -> str:
    """One record in words: its message, or its text and other values as figures, all on one line but for a sample's text."""
    figures = ", ".join(f"{name} {_figure(value)}" for name, value in values.items() if name not in {"text", "message"})
    head = f"step {step}  {kind}"
    if "text" in values:
        head += f" ({figures})" if figures else ""
        return printable(head) + ":" + "".join(f"\n    {line}" for line in printable(str(values["text"])).splitlines())
    if "message" in values:
        return printable(f"{head}: {values['message']}")  # Its other values say the same, for programs.
    return printable(head + (f": {figures}" if figures else ""))


def printable(text: str) -> str:
    """`text` with every control and format character but newline and tab shown as an escape."""
    keep = {"\n", "\t"}
    return "".join(
        char if char in keep or unicodedata.category(char) not in {"Cc", "Cf", "Cs"} else repr(char)[1:-1]
        for char in text
    )


def format_seconds(seconds: float) -> str:
    """A duration in its two largest units, such as "3 min 20 s"."""
    if not math.isfinite(seconds):
        return "unknown time"
    whole = round(max(0.0, seconds))
    for size, unit, part_size, part_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part_size} {part_unit}"
    return f"{whole} s"


def format_count(count: float) -> str:
    """A count with three significant digits, such as "12.3k"."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}" if count < 999.5 * size else f"{count / size:.0f}{unit}"
    return f"{count:.0f}"


class _PlainDisplay:
    """Lines for log files and pipes: no colours, no cursor movement."""

    def __init__(self, stream: TextIO, total_steps: int, interval_seconds: float, clock: Callable[[], float]) -> None:
        self._stream = stream
        self._total_steps = total_steps
        self._interval_seconds = interval_seconds
        self._clock = clock
        self._last_shown: float | None = None

    def update(self, step: int, status: str) -> None:
        now = self._clock()
        due = self._last_shown is None or now - self._last_shown >= self._interval_seconds
        if due or step >= self._total_steps:
            self._last_shown = now
            self.line(f"step {step}/{self._total_steps}  {status}")

    def line(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        # A C locale cannot print every character; a replaced one is better than a run that ends over it.
        print(text.encode(encoding, errors="replace").decode(encoding), file=self._stream, flush=True)

    def close(self) -> None:
        pass


def _display(stream: TextIO, total_steps: int, interval_seconds: float, clock: Callable[[], float]) -> _Display:
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        from anarcho_monitor.live import LiveDisplay  # rich takes longer to import than all the rest

        return LiveDisplay(stream, total_steps)
    return _PlainDisplay(stream, total_steps, interval_seconds, clock)


def _number(values: dict[str, Any], name: str) -> float | None:
    return number_from_json(to_json(values.get(name)))


def _part(label: str, number: float | None, form: str) -> str:
    return "" if number is None else f"{label} {form.format(number)}"


def _figure(value: Any) -> str:
    number = number_from_json(to_json(value))
    if number is None:
        return str(value)
    return f"{number:.0f}" if number == round(number, 0) and abs(number) < 1e15 else f"{number:.4g}"
