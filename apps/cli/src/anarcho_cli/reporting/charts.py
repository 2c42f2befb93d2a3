"""Which curves make which chart, of one run or of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from anarcho_monitor import Point, RunHistory

from anarcho_cli.reporting.axes import Unit
from anarcho_cli.reporting.run_view import RunView, words

MEMORY = ("allocated_bytes", "reserved_bytes", "peak_bytes", "process_bytes")
LEAST_HALF = 15
"""Points of the second half that are worth a chart of their own."""
_MEMORY_WORDS = {
    "allocated_bytes": "tensors",
    "reserved_bytes": "allocator",
    "peak_bytes": "peak",
    "process_bytes": "process",
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve of a chart."""

    label: str
    points: list[Point]
    abandoned: list[list[Point]]
    """What was measured and done again; drawn faintly."""
    colour: int
    """Number of its colour."""
    dotted: bool = False
    """Whether each point is drawn: of what is measured seldom."""
    thin: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Some curves over the steps, in one unit."""

    key: str
    title: str
    lines: list[Line]
    unit: Unit = "number"
    from_zero: bool = False
    wide: bool = False
    first_step: int = 0
    """Where it begins; earlier points are not among its lines'."""
    note: str = ""
    """What the unit is, where it is not plain."""


def charts_of(run: RunView) -> list[Chart]:
    """The charts of one run; a quantity that it did not measure has none."""
    history = run.history
    nats = "nats per pair" if run.stage == "preference tuning" else "nats per token"
    charts = [
        Chart(
            key="loss",
            title="Loss",
            note=nats,
            wide=True,
            lines=_lines(
                history,
                ("train", "loss", "training"),
                ("train", "loss_max", "training, worst step"),
                ("validation", "loss", "validation"),
            ),
        ),
        *_second_half(history, note=nats),
        Chart(
            key="bits_per_byte",
            title="Bits per byte",
            lines=_lines(history, ("validation", "bits_per_byte", "validation")),
        ),
        *_measure_charts(history),
        Chart(key="lr", title="Learning rate", unit="rate", lines=_group_lines(history, "lr_"), from_zero=True),
        Chart(key="grad_norm", title="Gradient norm", lines=_lines(history, ("train", "grad_norm", "before clipping"))),
        Chart(
            key="update_ratio",
            title="Size of updates",
            note="beside the weights",
            unit="rate",
            lines=_group_lines(history, "update_ratio_"),
        ),
        Chart(
            key="speed",
            title="Speed",
            note="tokens per second",
            unit="count",
            from_zero=True,
            lines=_lines(history, ("train", "tokens_per_second", "median of the last steps")),
        ),
        Chart(
            key="flops",
            title="FLOP utilisation",
            unit="share",
            from_zero=True,
            lines=_lines(history, ("train", "flop_utilisation", "of the device's peak")),
        ),
        Chart(key="memory", title="Memory", note="GiB", unit="bytes", from_zero=True, lines=_memory_lines(history)),
        Chart(
            key="wait",
            title="Waiting for data",
            note="share of the time",
            unit="share",
            from_zero=True,
            lines=_lines(history, ("train", "data_wait_share", "of the last steps")),
        ),
    ]
    return [chart for chart in charts if chart.lines]


def charts_of_all(runs: Sequence[RunView], names: Sequence[str]) -> list[Chart]:
    """A chart for each quantity that any of the runs has measured, with a line for each run."""

    def chart(kind: str, name: str, title: str, **options: object) -> Chart:
        dotted = kind == "validation"
        curves = [run.history.curve(kind, name) for run in runs]
        lines = [
            Line(label=label, points=curve.points, abandoned=[], colour=colour, dotted=dotted)
            for colour, (label, curve) in enumerate(zip(names, curves, strict=True))
            if curve.points
        ]
        return Chart(key=f"{kind}-{name}", title=title, lines=lines, **options)  # type: ignore[arg-type]

    measures = _names(runs, lambda history: _measures(history))
    charts = [
        chart("validation", "loss", "Validation loss", wide=True),
        chart("train", "loss", "Training loss", wide=True),
        chart("validation", "bits_per_byte", "Bits per byte"),
        *(chart("validation", name, _title(name)) for name in measures),
        *(
            chart("train", name, f"Learning rate, {words(name.removeprefix('lr_'))}", unit="rate", from_zero=True)
            for name in _compared(runs, "lr_")
        ),
        chart("train", "grad_norm", "Gradient norm"),
        *(
            chart("train", name, f"Size of updates, {words(name.removeprefix('update_ratio_'))}", unit="rate")
            for name in _compared(runs, "update_ratio_")
        ),
        chart("train", "tokens_per_second", "Speed", note="tokens per second", unit="count", from_zero=True),
        chart("train", "flop_utilisation", "FLOP utilisation", unit="share", from_zero=True),
        chart("train", "process_bytes", "Memory of the process", note="GiB", unit="bytes", from_zero=True),
        chart("train", "reserved_bytes", "Memory of the allocator", note="GiB", unit="bytes", from_zero=True),
        chart("train", "data_wait_share", "Waiting for data", note="share of the time", unit="share", from_zero=True),
    ]
    return [chart for chart in charts if chart.lines]


def _lines(history: RunHistory, *wanted: tuple[str, str, str]) -> list[Line]:
    """A line for each (kind, name, label) that was measured; the colour is its place in the list."""
    lines = []
    for colour, (kind, name, label) in enumerate(wanted):
        curve = history.curve(kind, name)
        if curve.points:
            lines.append(
                Line(
                    label=label,
                    points=curve.points,
                    abandoned=curve.abandoned,
                    colour=colour,
                    dotted=kind == "validation",
                    thin=name == "loss_max",
                )
            )
    return lines


def _second_half(history: RunHistory, *, note: str) -> list[Chart]:
    """The loss once more, without the first fall beside which the rest looks flat; of runs that are long enough."""
    middle = history.last_step // 2
    found = []
    for line in _lines(history, ("train", "loss", "training"), ("validation", "loss", "validation")):
        points = [point for point in line.points if point.step >= middle]
        stretches = [[point for point in stretch if point.step >= middle] for stretch in line.abandoned]
        if points:
            abandoned = [stretch for stretch in stretches if stretch]
            found.append(replace(line, points=points, abandoned=abandoned, colour=2 * line.colour))
    if not found or len(found[0].points) < LEAST_HALF:
        return []
    return [Chart(key="second_half", title="Loss, second half", note=note, first_step=middle, lines=found)]


def _group_lines(history: RunHistory, prefix: str) -> list[Line]:
    names = _prefixed(history, prefix)
    return _lines(history, *(("train", name, words(name.removeprefix(prefix))) for name in names))


def _memory_lines(history: RunHistory) -> list[Line]:
    """Counters of memory; on a CPU several are one and the same, which one line with all their names shows."""
    lines: dict[tuple[float, ...], Line] = {}
    for colour, name in enumerate(MEMORY):
        curve = history.curve("train", name)
        if not curve.points:
            continue
        values = tuple(point.value for point in curve.points)
        label = _MEMORY_WORDS[name]
        if values in lines:
            label, colour = f"{lines[values].label}, {label}", lines[values].colour
        lines[values] = Line(label=label, points=curve.points, abandoned=curve.abandoned, colour=colour)
    return list(lines.values())


def _measure_charts(history: RunHistory) -> list[Chart]:
    """What the stage measures besides its loss, in training and in validation."""
    return [
        Chart(
            key=name,
            title=_title(name),
            lines=_lines(history, ("train", name, "training"), ("validation", name, "validation")),
        )
        for name in _measures(history)
    ]


def _measures(history: RunHistory) -> list[str]:
    return [name for name in history.names("validation") if name not in ("loss", "bits_per_byte")]


def _prefixed(history: RunHistory, prefix: str) -> list[str]:
    return [name for name in history.names("train") if name.startswith(prefix)]


def _compared(runs: Sequence[RunView], prefix: str) -> list[str]:
    """The quantities of groups that at least two of the runs have, and not all alike."""
    found = []
    for name in _names(runs, lambda history: _prefixed(history, prefix)):
        curves = [points for run in runs if (points := run.history.curve("train", name).points)]
        if len(curves) > 1 and any(points != curves[0] for points in curves):
            found.append(name)
    return found


def _names(runs: Sequence[RunView], of: Callable[[RunHistory], list[str]]) -> list[str]:
    """The names that any of the runs has, each once."""
    return list(dict.fromkeys(name for run in runs for name in of(run.history)))


def _title(name: str) -> str:
    return name.upper() if name == "kl" else words(name).capitalize()
