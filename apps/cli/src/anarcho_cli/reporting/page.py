"""The page of one run, and of several beside each other: one file of HTML that asks nobody for anything.

Notable: a policy in the page allows its own style and its own script alone, by hash, so that even a mistake in the escaping of a hostile
text could neither run nor load something.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from anarcho_monitor import Mark

from anarcho_cli.output import count_text, duration_text
from anarcho_cli.reporting import tables
from anarcho_cli.reporting.axes import figure
from anarcho_cli.reporting.charts import Chart, charts_of, charts_of_all
from anarcho_cli.reporting.drawing import draw
from anarcho_cli.reporting.markup import Markup, element, join, json_script
from anarcho_cli.reporting.run_view import RunView, distinct_names, words

GENERATOR = "anarcho report"
MAX_SAMPLES = 50
"""The newest ones; metrics.jsonl has them all."""
_SIGNS = {
    "checkpoint": "checkpoint",
    "resume": "resumed",
    "micro-batch": "micro-batch changed",
    "skip": "update left out",
    "spike": "spike",
    "rollback": "rolled back",
    "stop": "stopped",
    "event": "other event",
}


def run_page(run: RunView) -> str:
    """The page of one run."""
    history, charts = run.history, charts_of(run)
    body = [
        _header(run.name, run.stage, run.state, began=history.attempts[0].began_at),
        element(
            "main",
            _progress_bar(run),
            _facts(_headline(run)),
            element("h2", "Curves"),
            _key(history.marks, abandoned=any(line.abandoned for chart in charts for line in chart.lines)),
            _charts(charts, history.marks, last_step=_last_step([run])),
            _samples(run),
            element("h2", "Tables"),
            tables.last_values(charts),
            *_folded(
                ("Events", tables.events(history)),
                ("Attempts", tables.attempts(history)),
                ("Checkpoints", tables.checkpoints(history)),
                ("Configuration", tables.settings(run.config, caption="Configuration") if run.config else None),
                ("Environment", tables.settings(run.environment, caption="Environment") if run.environment else None),
            ),
        ),
    ]
    return _document(f"{run.name}, {run.stage}", body, described=f"{run.stage} run {run.name}, {run.state}")


def comparison_page(runs: Sequence[RunView]) -> str:
    """The page of several runs, whose curves lie over each other."""
    names = distinct_names(runs)
    charts = charts_of_all(runs, names)
    swatches = [
        element("li", element("i", class_=f"swatch c{number % 8}"), element("b", name), f" {run.stage}, {run.state}")
        for number, (name, run) in enumerate(zip(names, runs, strict=True))
    ]
    body = [
        element("header", element("h1", f"{len(runs)} runs compared"), element("ul", *swatches, class_="legend")),
        element(
            "main",
            element("h2", "Results"),
            tables.results(runs, names),
            element("h2", "Differences"),
            tables.differences([run.config for run in runs], names, caption="Configuration")
            or element("p", "The configurations are equal."),
            element("h2", "Curves"),
            _charts(charts, [], last_step=_last_step(runs)),
            *_folded(
                (
                    "Environment",
                    tables.differences([run.environment for run in runs], names, caption="Environment"),
                )
            ),
        ),
    ]
    return _document(f"{' · '.join(names)}", body, described=f"Comparison of {', '.join(names)}")


def _document(title: str, body: Sequence[Markup], *, described: str) -> str:
    style, script = (_resource(name) for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )
    made = element("footer", f"Made by anarcho report on {datetime.now(UTC):%Y-%m-%d at %H:%M} UTC from metrics.jsonl.")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content=GENERATOR),
        element("meta", name="description", content=described),
        element("title", title),
        element("style", Markup(style)),
    )
    return "<!doctype html>\n" + element(
        "html", head, element("body", *body, made, element("script", Markup(script))), lang="en"
    )


def _header(name: str, stage: str, state: str, *, began: float) -> Markup:
    when = f"began {datetime.fromtimestamp(began, UTC):%Y-%m-%d %H:%M} UTC" if began else ""
    return element(
        "header",
        element("h1", name),
        element(
            "p",
            element("span", state, class_=f"state {state}"),
            element("span", stage),
            element("span", when),
            class_="sub",
        ),
    )


def _progress_bar(run: RunView) -> Markup | None:
    """How much of a run that has not ended is done."""
    if run.state == "finished" or not run.total_steps:
        return None
    share = min(1.0, run.history.last_step / run.total_steps)
    return element(
        "div",
        element("i", style=f"width:{100 * share:.1f}%"),
        class_="bar",
        role="img",
        aria_label=f"{100 * share:.0f} % of the steps are done",
    )


def _headline(run: RunView) -> list[tuple[str, str, str]]:
    """(name, value, remark) of what matters most."""
    history, facts = run.history, run.facts
    rows: list[tuple[str, str, str]] = []
    for name, label in (("loss", "Validation loss"), ("bits_per_byte", "Bits per byte")):
        last, best = history.last("validation", name), run.best(name)
        if last is not None:
            remark = f"best {figure(best[0])} at step {best[1]}" if best else ""
            rows.append((label, figure(last), remark))
    for name in history.names("validation"):
        if name == "accuracy" or name == "margin":
            rows.append((words(name).capitalize(), figure(history.last("validation", name)), "validation"))
    training = history.last("train", "loss")
    if training is not None:
        rows.append(("Training loss", figure(training), ""))
    total = run.total_steps
    done = f"of {total}" if total else ""
    rows.append(("Steps", f"{history.last_step}", done))
    rows.append(("Tokens", count_text(history.last_tokens), ""))
    left = history.last("train", "eta_seconds") if run.state == "running" else None
    number = len(history.attempts)
    remark = f"about {duration_text(left)} left" if left else (f"in {number} attempts" if number > 1 else "")
    rows.append(("Time", duration_text(history.seconds), remark))
    speeds = sorted(point.value for point in history.curve("train", "tokens_per_second").points)
    if speeds:
        rows.append(("Tokens per second", count_text(speeds[len(speeds) // 2]), "median"))
    if isinstance(facts.get("parameters"), int):
        trained = facts.get("trained_parameters", facts["parameters"])
        remark = f"{count_text(trained)} trained" if trained != facts["parameters"] else ""
        rows.append(("Parameters", count_text(facts["parameters"]), remark))
    if "device" in facts:
        rows.append(
            ("Device", str(facts["device"]), ", ".join(str(facts[k]) for k in ("backend", "precision") if k in facts))
        )
    return rows


def _facts(rows: Sequence[tuple[str, str, str]]) -> Markup:
    cells = [
        element("div", element("dt", name), element("dd", value, element("small", remark) if remark else None))
        for name, value, remark in rows
    ]
    return element("dl", *cells, class_="facts")


def _key(marks: Sequence[Mark], *, abandoned: bool) -> Markup | None:
    """What the signs on the curves mean, of those that occur."""
    kinds = {mark.kind for mark in marks}
    entries = [
        element("li", element("i", class_=f"sign {kind}"), meaning) for kind, meaning in _SIGNS.items() if kind in kinds
    ]
    if abandoned:
        entries.append(element("li", element("i", class_="faintline"), "done again later"))
    return element("ul", *entries, class_="key", aria_label="Signs on the curves") if entries else None


def _charts(charts: Sequence[Chart], marks: Sequence[Mark], *, last_step: int) -> Markup:
    drawings = [draw(chart, marks, last_step=last_step) for chart in charts]
    if not drawings:
        return element("p", "Nothing has been measured yet.")
    data: list[dict[str, Any]] = [drawing.data for drawing in drawings]
    figures = element("div", *(drawing.figure for drawing in drawings), class_="charts")
    return join(figures, json_script(data, name="data"))


def _samples(run: RunView) -> Markup | None:
    """Texts that the model wrote, the newest first."""
    records = [record for record in run.history.of("sample") if isinstance(record.get("text"), str)]
    if not records:
        return None
    shown = [
        element("article", element("h3", f"Step {record['step']}"), element("pre", record["text"]), class_="sample")
        for record in reversed(records[-MAX_SAMPLES:])
    ]
    return join(element("h2", "Samples"), shown)


def _folded(*parts: tuple[str, Markup | None]) -> list[Markup]:
    return [element("details", element("summary", name), content) for name, content in parts if content is not None]


def _last_step(runs: Sequence[RunView]) -> int:
    return max(record["step"] for run in runs for record in run.history.records)


def _resource(name: str) -> str:
    return files("anarcho_cli.reporting").joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
