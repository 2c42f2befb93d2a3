"""A run's state as lines of text and as a panel that is drawn again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from anarcho_monitor.progress import format_count, format_seconds, printable

from anarcho_cli.watching.state import RunState

if TYPE_CHECKING:
    from rich.console import RenderableType

_BLOCKS = "▁▂▃▄▅▆▇█"
SAMPLE_LINES = 8


def lines(state: RunState, *, condition: str, now: float) -> list[str]:
    """The state in plain lines."""
    shown = [f"{printable(state.name)}  {condition}"]
    if not state.begun:
        return shown
    shown.append("  ".join([_steps(state), *(f"{name} {value}" for name, value in figures(state, now=now))]))
    shown += [f"step {step}  {printable(text)}" for step, text in state.events]
    if state.sample is not None:
        step, text = state.sample
        shown += [f"step {step}  sample:", *(f"    {line}" for line in printable(text).splitlines()[:SAMPLE_LINES])]
    return shown


def figures(state: RunState, *, now: float) -> list[tuple[str, str]]:
    """(name, value) of what is measured."""
    training, validation = state.training, state.validation
    memory = max((training.get(name, 0.0) for name in ("reserved_bytes", "process_bytes")), default=0.0)
    left = state.seconds_left(now)
    utilisation, wait = training.get("flop_utilisation"), training.get("data_wait_share")
    entries = [
        ("loss", _number(training.get("loss"))),
        ("validation", _with_step(validation.get("loss"), state.validated_step)),
        ("best", _with_step(*state.best) if state.best else None),
        ("bits/byte", _number(validation.get("bits_per_byte"))),
        ("accuracy", _number(validation.get("accuracy"))),
        ("gradient", _number(training.get("grad_norm"))),
        ("tokens/s", format_count(training["tokens_per_second"]) if "tokens_per_second" in training else None),
        ("of peak", f"{100 * utilisation:.1f} %" if utilisation is not None else None),
        ("waiting", f"{100 * wait:.1f} %" if wait is not None and wait >= 0.01 else None),
        ("memory", f"{memory / 2**30:.1f} GiB" if memory else None),
        ("left", format_seconds(left) if left is not None else None),
    ]
    return [(name, text) for name, text in entries if text is not None]


def panel(state: RunState, *, condition: str, now: float, width: int) -> RenderableType:
    """The state for a terminal: a bar, figures, the course of the loss, events and the newest sample."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    if not state.begun:
        return Panel(Text("no record yet"), title=Text(f"{printable(state.name)}  {condition}"), title_align="left")
    inner = max(20, width - 4)
    table = Table.grid(padding=(0, 2), expand=False)
    cells = [(Text(name, style="dim"), Text(value, style="bold")) for name, value in figures(state, now=now)]
    columns = max(1, min(len(cells), inner // 24))
    for first in range(0, len(cells), columns):
        table.add_row(*(part for cell in cells[first : first + columns] for part in cell))
    parts: list[Any] = [Text(_steps(state))]
    if state.total_steps:
        parts.append(ProgressBar(total=state.total_steps, completed=state.step, width=inner))
    parts += [Text(), table]
    if curve := sparkline(state.recent_losses(inner), inner):
        parts += [Text(), Text("loss ", style="dim").append(curve, style="not dim cyan")]
    if state.events:
        parts += [Text(), *(_event(step, text) for step, text in state.events)]
    if state.sample is not None:
        step, text = state.sample
        parts += [Text(), Text(f"sample at step {step}", style="dim")]
        parts += [Text(line) for line in printable(text).splitlines()[:SAMPLE_LINES]]
    style = {"running": "green", "finished": "green", "stopped": "red"}.get(condition, "yellow")
    title = Text(printable(state.name), style="bold").append(f"  {condition}", style=style)
    return Panel(Group(*parts), title=title, title_align="left", width=width)


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of values in ``width - 5`` characters of eight heights; empty for fewer than two values."""
    width = max(1, width - 5)
    if len(values) < 2:
        return ""
    count = min(width, len(values))
    means = []
    for column in range(count):
        part = values[column * len(values) // count : (column + 1) * len(values) // count]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


def _steps(state: RunState) -> str:
    if not state.total_steps:
        return f"step {state.step}"
    return f"step {state.step}/{state.total_steps} ({100 * state.step / state.total_steps:.0f} %)"


def _event(step: int, text: str) -> Any:
    from rich.text import Text

    return Text(f"step {step}  ", style="dim").append(printable(text), style="not dim")


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _with_step(value: float | None, step: int) -> str | None:
    return None if value is None else f"{value:.4f} (step {step})"
