"""A chart as a figure: curves in SVG, and everything that is read as HTML around them.

Notable: the SVG is stretched to whatever width there is, while strokes, dots and letters keep their size: strokes by `non-scaling-stroke`,
dots as strokes of no length with round ends, letters because they are no part of the SVG. So one drawing serves a phone and a desktop, and
a page whose script does not run shows all but the values under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anarcho_monitor import Mark, Point, thin

from anarcho_cli.reporting.axes import Scale, figure, make_scale, step_scale, tick_text
from anarcho_cli.reporting.charts import Chart, Line
from anarcho_cli.reporting.markup import Markup, element, join

BUCKETS = 400
"""A curve is drawn with up to three times as many points, more than a screen has columns for."""
MAX_MARKS = 80
"""Of each kind of events, which a table lists in full."""
SIZE = 1000
"""Units of the drawing, in both directions."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A chart in all its forms."""

    figure: Markup
    data: dict[str, Any]
    """What the page's script reads: the steps and values of each line."""


def draw(chart: Chart, marks: Sequence[Mark], *, last_step: int) -> Drawing:
    """The figure of a chart up to ``last_step``, and its data."""
    lines = [(line, thin(line.points, buckets=BUCKETS)) for line in chart.lines]
    across, up = step_scale(chart.first_step, last_step), _vertical(chart, lines)
    marks = [mark for mark in marks if mark.step >= chart.first_step]
    shapes = [
        _grid(across, up),
        _mark_lines(marks, across),
        *(_faint(line, across, up) for line in chart.lines),
        *(_curve(line, points, across, up) for line, points in lines),
    ]
    svg = element(
        "svg", *shapes, viewBox=f"0 0 {SIZE} {SIZE}", preserveAspectRatio="none", aria_hidden="true", focusable="false"
    )
    title_id = f"title-{chart.key}"
    plot = element(
        "div",
        svg,
        element("div", class_="cross", hidden=True),
        element("output", class_="at", hidden=True, aria_hidden="true"),
        class_="plot",
        role="img",
        tabindex=0,
        aria_labelledby=title_id,
        aria_description=describe(chart),
        data_chart=chart.key,
    )
    scale_note = ", logarithmic" if up.logarithmic else ""
    caption = element(
        "figcaption",
        element("h3", chart.title, id=title_id),
        element("small", chart.note + scale_note if chart.note else scale_note.removeprefix(", ")),
    )
    body = element("div", _labels(across, up, chart), plot, _mark_signs(marks, across), class_="frame")
    return Drawing(
        figure=element("figure", caption, _legend(chart), body, class_="wide" if chart.wide else None),
        data={
            "key": chart.key,
            "unit": chart.unit,
            "first": chart.first_step,
            "last": last_step,
            "low": up.low,
            "high": up.high,
            "log": up.logarithmic,
            "lines": [_line_data(line, points) for line, points in lines],
        },
    )


def describe(chart: Chart) -> str:
    """The chart in a sentence, for those who do not see it."""
    parts = []
    for line in chart.lines:
        first, last = line.points[0], line.points[-1]
        parts.append(
            f"{line.label}: {figure(first.value, chart.unit)} at step {first.step}, {figure(last.value, chart.unit)} at step {last.step}"
        )
    return "; ".join(parts)


def _vertical(chart: Chart, lines: Sequence[tuple[Line, list[Point]]]) -> Scale:
    values = [point.value for _, points in lines for point in points if math.isfinite(point.value)]
    return make_scale(values, from_zero=chart.from_zero, unit=chart.unit)


def _grid(across: Scale, up: Scale) -> Markup:
    rows = "".join(f"M0 {_y(up, tick)}H{SIZE}" for tick in up.ticks)
    columns = "".join(f"M{_x(across, tick)} 0V{SIZE}" for tick in across.ticks)
    return element("path", class_="grid", d=rows + columns)


def _curve(line: Line, points: Sequence[Point], across: Scale, up: Scale) -> Markup:
    name = f"line c{line.colour % 8}" + (" thin" if line.thin else "")
    shapes = [element("path", class_=name, d=_path(points, across, up))]
    # Dots of a curve with many of them would be a thick line.
    if len(points) == 1 or (line.dotted and len(points) <= 60):
        shapes.append(element("path", class_=f"dots c{line.colour % 8}", d=_dots(points, across, up)))
    return join(shapes)


def _faint(line: Line, across: Scale, up: Scale) -> Markup:
    """What was done again, as far as it lies within what remains."""
    stretches = [thin(stretch, buckets=BUCKETS) for stretch in line.abandoned]
    d = "".join(_path(stretch, across, up) for stretch in stretches)
    lone = "".join(_dots(stretch, across, up) for stretch in stretches if len(stretch) == 1)
    return join(
        element("path", class_=f"line faint c{line.colour % 8}", d=d) if d else None,
        element("path", class_=f"dots faint c{line.colour % 8}", d=lone) if lone else None,
    )


def _path(points: Sequence[Point], across: Scale, up: Scale) -> str:
    """Straight lines from point to point, with a gap where a value is not finite."""
    parts, pen = [], "M"
    for point in points:
        if _drawable(point.value, up):
            parts.append(f"{pen}{_x(across, point.step)} {_y(up, point.value)}")
            pen = "L"
        else:
            pen = "M"
    return "".join(parts)


def _dots(points: Sequence[Point], across: Scale, up: Scale) -> str:
    return "".join(
        f"M{_x(across, point.step)} {_y(up, point.value)}h0" for point in points if _drawable(point.value, up)
    )


def _drawable(value: float, up: Scale) -> bool:
    return math.isfinite(value) and (value > 0 or not up.logarithmic) and 0 <= up.position(value) <= 1


def _mark_lines(marks: Sequence[Mark], across: Scale) -> Markup:
    """A line at each event, and a short one on the floor at each checkpoint."""
    shapes = []
    for kind in dict.fromkeys(mark.kind for mark in marks):
        steps = sorted({mark.step for mark in marks if mark.kind == kind})
        floor = SIZE - 30 if kind == "checkpoint" else 0
        d = "".join(f"M{_x(across, step)} {SIZE}V{floor}" for step in _some(steps))
        shapes.append(element("path", class_=f"mark {kind}", d=d))
    return join(shapes)


def _mark_signs(marks: Sequence[Mark], across: Scale) -> Markup:
    """A sign above each event; what it means is in its tooltip, and in the table of events."""
    signs = []
    for kind in dict.fromkeys(mark.kind for mark in marks if mark.kind != "checkpoint"):
        texts = {mark.step: mark.text for mark in marks if mark.kind == kind}
        for step in _some(sorted(texts)):
            left = f"left:{100 * across.position(step):.2f}%"
            signs.append(element("i", class_=f"sign {kind}", style=left, title=f"step {step}: {texts[step]}"))
    return element("div", *signs, class_="signs", aria_hidden="true") if signs else Markup()


def _some(steps: Sequence[int]) -> Sequence[int]:
    return steps if len(steps) <= MAX_MARKS else steps[:: -(-len(steps) // MAX_MARKS)]


def _labels(across: Scale, up: Scale, chart: Chart) -> Markup:
    rows = [
        element("span", tick_text(tick, chart.unit), style=f"bottom:{100 * up.position(tick):.2f}%")
        for tick in up.ticks
    ]
    columns = [
        element("span", tick_text(tick, "count"), style=f"left:{100 * across.position(tick):.2f}%")
        for tick in across.ticks
    ]
    return join(
        element("div", *rows, class_="rows", aria_hidden="true"),
        element("div", *columns, class_="columns", aria_hidden="true"),
    )


def _legend(chart: Chart) -> Markup:
    entries = [
        element(
            "li",
            element("i", class_=f"swatch c{line.colour % 8}" + (" dotted" if line.dotted else "")),
            element("span", line.label),
            " ",
            element("b", figure(line.points[-1].value, chart.unit)),
        )
        for line in chart.lines
    ]
    return element("ul", *entries, class_="legend")


def _line_data(line: Line, points: Sequence[Point]) -> dict[str, Any]:
    values = [_rounded(point.value) for point in points]
    return {"label": line.label, "steps": [point.step for point in points], "values": values}


def _rounded(value: float) -> float | str:
    """Six digits, which is more than a screen shows; JSON has no other numbers than finite ones."""
    return float(f"{value:.6g}") if math.isfinite(value) else figure(value)


def _x(scale: Scale, step: float) -> str:
    return f"{SIZE * scale.position(step):.1f}".removesuffix(".0")


def _y(scale: Scale, value: float) -> str:
    return f"{SIZE * (1 - scale.position(value)):.1f}".removesuffix(".0")
