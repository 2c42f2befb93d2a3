"""The tables of a report: last values, attempts, events, configuration, differences of runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from anarcho_monitor import RunHistory

from anarcho_cli.output import duration_text
from anarcho_cli.reporting.axes import figure
from anarcho_cli.reporting.charts import Chart
from anarcho_cli.reporting.markup import Markup, element
from anarcho_cli.reporting.run_view import RunView, flat_values

MAX_EVENTS = 500
"""The newest ones; metrics.jsonl has them all."""


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str) -> Markup:
    """A table that scrolls by itself where it is too wide; a column whose name begins with # holds numbers.

    The first cell of a row is its heading.
    """
    numeric = [column.startswith("#") for column in columns]
    head = [
        element("th", column.lstrip("#"), scope="col", class_="n" if number else None)
        for column, number in zip(columns, numeric, strict=True)
    ]
    body = []
    for row in rows:
        cells = [element("th", row[0], scope="row")]
        for cell, number in zip(row[1:], numeric[1:], strict=True):
            long = not number and len(str(cell)) > 60
            cells.append(element("td", cell, class_="n" if number else ("long" if long else None)))
        body.append(element("tr", *cells))
    content = element(
        "table", element("caption", caption), element("thead", element("tr", *head)), element("tbody", *body)
    )
    # What scrolls must be reachable by keyboard.
    return element("div", content, class_="scroll", tabindex=0, role="region", aria_label=caption)


def last_values(charts: Sequence[Chart]) -> Markup:
    """First, last, smallest and largest value of every curve."""
    rows = []
    for chart in (chart for chart in charts if not chart.first_step):
        for line in chart.lines:
            finite = [point for point in line.points if math.isfinite(point.value)]
            low, high = (choose(finite, key=lambda point: point.value, default=None) for choose in (min, max))
            name = (
                chart.title
                if len(chart.lines) == 1 and line.label not in ("validation",)
                else f"{chart.title}, {line.label}"
            )
            extremes = [f"{figure(p.value, chart.unit)} ({p.step})" if p else "–" for p in (low, high)]
            ends = [figure(line.points[place].value, chart.unit) for place in (0, -1)]
            rows.append((name, *ends, *extremes))
    columns = ("Quantity", "#First", "#Last", "#Smallest (step)", "#Largest (step)")
    return table(columns, rows, caption="First, last, smallest and largest values")


def attempts(history: RunHistory) -> Markup:
    """The processes that worked on the run."""
    rows = [
        (
            f"{attempt.number}",
            _moment(attempt.began_at),
            f"{attempt.first_step}",
            f"{attempt.last_step}",
            duration_text(attempt.seconds),
            ", ".join(str(attempt.facts[key]) for key in ("backend", "device", "precision") if key in attempt.facts),
            "ended by itself" if attempt.ended else "did not say that it ended",
        )
        for attempt in history.attempts
    ]
    columns = ("#Attempt", "Began (UTC)", "#After step", "#Up to step", "#Time", "On", "End")
    return table(columns, rows, caption="Attempts")


def events(history: RunHistory) -> Markup | None:
    """What happened, the checkpoints aside."""
    rows = [(f"{mark.step}", mark.kind, mark.text) for mark in history.marks if mark.kind != "checkpoint"]
    if not rows:
        return None
    caption = "Events" if len(rows) <= MAX_EVENTS else f"The last {MAX_EVENTS} of {len(rows)} events"
    return table(("#Step", "Kind", "What happened"), rows[-MAX_EVENTS:], caption=caption)


def checkpoints(history: RunHistory) -> Markup | None:
    """The checkpoints that were written, with what they took; how many are still there, the directory tells."""
    rows = [
        (f"{record['step']}", str(record.get("path", "")), figure(record["seconds"]) + " s")
        for record in history.of("checkpoint")
        if isinstance(record.get("seconds"), int | float)
    ]
    return table(("#Step", "Checkpoint", "#Written in"), rows[-MAX_EVENTS:], caption="Checkpoints") if rows else None


def settings(tree: dict[str, Any], *, caption: str) -> Markup:
    """Nested values, by dotted name."""
    return table(("Key", "Value"), flat_values(tree).items(), caption=caption)


def results(runs: Sequence[RunView], names: Sequence[str]) -> Markup:
    """The results of several runs beside each other."""
    found = [{"stage": run.stage, "state": run.state, **run.results()} for run in runs]
    keys = dict.fromkeys(key for result in found for key in result)
    rows = [(key.capitalize(), *(result.get(key, "–") for result in found)) for key in keys]
    return table(("Result", *names), rows, caption="Results")


def differences(trees: Sequence[dict[str, Any]], names: Sequence[str], *, caption: str) -> Markup | None:
    """The values in which the runs differ; None where they do not."""
    flat = [flat_values(tree) for tree in trees]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = [(key, *(values.get(key, "–") for values in flat)) for key in keys if len({v.get(key) for v in flat}) > 1]
    return table(("Key", *names), rows, caption=caption) if rows else None


def _moment(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"
    except (OverflowError, ValueError, OSError):
        return "–"
