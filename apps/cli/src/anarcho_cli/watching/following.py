"""Showing a run until it ends: drawn in place on a terminal, line by line elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TextIO

from anarcho_monitor.progress import describe

from anarcho_cli.watching.screen import figures, lines, panel
from anarcho_cli.watching.state import Watched


class Clock(Protocol):
    """Moments and waiting."""

    def monotonic(self) -> float: ...

    def time(self) -> float: ...

    def sleep(self, seconds: float, /) -> None: ...


def print_state(watched: Watched, *, stream: TextIO, clock: Clock = time) -> None:
    """The present state, once."""
    watched.poll(clock.monotonic())
    _print(stream, "\n".join(lines(watched.state, condition=watched.condition(), now=clock.time())))


def follow(watched: Watched, *, every_seconds: float, stream: TextIO = sys.stdout, clock: Clock = time) -> str:
    """Shows the run until it is over; returns what became of it, finished or stopped."""
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        _follow_live(watched, every_seconds=every_seconds, stream=stream, clock=clock)
    else:
        _follow_plainly(watched, every_seconds=every_seconds, stream=stream, clock=clock)
    return watched.condition()


def _follow_live(watched: Watched, *, every_seconds: float, stream: TextIO, clock: Clock) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(file=stream)

    def draw(condition: str) -> Any:
        width = min(console.width, 120)
        return panel(watched.state, condition=condition, now=clock.time(), width=width)

    watched.poll(clock.monotonic())
    with Live(draw(watched.condition()), console=console, auto_refresh=False, vertical_overflow="crop") as live:
        condition = _until_over(
            watched,
            lambda records: live.update(draw("running" if watched.state.begun else "preparing"), refresh=True),
            every_seconds=every_seconds,
            clock=clock,
        )
        live.update(draw(condition), refresh=True)


def _follow_plainly(watched: Watched, *, every_seconds: float, stream: TextIO, clock: Clock) -> None:
    print_state(watched, stream=stream, clock=clock)

    def tell(records: list[dict[str, Any]]) -> None:
        """What happened, and the newest measurement: a run may write many between two looks."""
        training = [record for record in records if record["kind"] == "train"]
        for record in records:
            if record["kind"] not in ("train", "end"):
                _print(stream, describe(record["kind"], record["step"], _values(record)))
        if training:
            shown = "  ".join(f"{name} {value}" for name, value in figures(watched.state, now=clock.time()))
            total = f"/{watched.state.total_steps}" if watched.state.total_steps else ""
            _print(stream, f"step {training[-1]['step']}{total}  {shown}")

    condition = _until_over(watched, tell, every_seconds=every_seconds, clock=clock)
    _print(stream, f"{watched.state.name}  {condition} at step {watched.state.step}")


def _until_over(
    watched: Watched, show: Callable[[list[dict[str, Any]]], None], *, every_seconds: float, clock: Clock
) -> str:
    """Looks again and again; returns the condition in which the run was left."""
    while not watched.is_over(clock.monotonic()):
        clock.sleep(every_seconds)
        show(watched.poll(clock.monotonic()))
    return watched.condition()


_OWN = frozenset({"v", "run", "attempt", "step", "tokens", "t_wall", "t_mono", "kind"})


def _values(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in _OWN}


def _print(stream: TextIO, text: str) -> None:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding), file=stream, flush=True)
