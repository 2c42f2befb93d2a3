"""The report of a run: what it says, that it loads and runs nothing foreign, and how it looks in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from anarcho_cli.main import app
from anarcho_cli.reporting.axes import figure, linear_ticks, make_scale
from anarcho_cli.reporting.markup import Markup, element, json_script
from anarcho_cli.reporting.page import comparison_page, run_page
from anarcho_cli.reporting.run_view import read_run
from anarcho_train import lock_run
from colours import contrast
from hypothesis import given
from hypothesis import strategies as st
from reported import CONFIG, entry, training, usual_records, write_run
from typer.testing import CliRunner

HOSTILE = "</script></style></pre><script>alert(1)</script><img src=x onerror=alert(1)>\" onmouseover='alert(2)' &lt; \u202e\x00]]>"
VOID = {"meta", "path"}


class Page(HTMLParser):
    """Elements with their attributes and all text of a page; raises where elements do not end in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def rows(self, caption: str) -> str:
        """The text from a table's caption on."""
        return self.text.split(f"\n{caption}\n", 1)[1]


def data_of(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return {chart["key"]: chart for chart in json.loads(text)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "moby", torn='{"v":1,"run":"moby","att')


def test_a_page_says_what_the_run_is_and_how_it_went(run: Path) -> None:
    page = Page(run_page(read_run(run)))
    for text in ("moby", "finished", "pre-training", "4.25", "best 4.25 at step 40", "1.5", "of 40", "in 2 attempts"):
        assert text in page.texts, text
    for text in ("1.2 M", "2.0 k", "The whale,\nsaid he.", "no update at step 40: loss nan", "optim.lr", "x86_64"):
        assert text in page.texts, text
    assert "did not say that it ended" in page.rows("Attempts")


def test_curves_hold_what_remains_and_show_what_was_done_again_faintly(run: Path) -> None:
    text = run_page(read_run(run))
    charts = data_of(text)
    loss = charts["loss"]["lines"][0]
    assert loss["steps"] == list(range(2, 41, 2))
    assert loss["values"][0] == 7.8
    assert {"loss", "bits_per_byte", "lr", "grad_norm", "speed", "memory", "wait"} == charts.keys()
    faint = [a["d"] for tag, a in Page(text).elements if tag == "path" and "faint" in str(a["class"])]
    assert faint  # Steps 22 and 24 of the first attempt.
    assert all(shape.startswith("M550 ") for shape in faint if shape)
    assert "done again later" in text


def test_a_spike_is_drawn_at_its_full_height_and_a_gap_where_the_loss_was_not_finite(tmp_path: Path) -> None:
    records = [training(step) for step in range(1, 30_001)]
    for record in records:
        record["loss"] = 2.0
    records[20_000]["loss"], records[10_000]["loss"] = 40.0, "NaN"
    text = run_page(read_run(write_run(tmp_path / "spiky", records)))
    line = data_of(text)["loss"]["lines"][0]
    assert line["values"][line["steps"].index(20_001)] == 40.0
    assert line["values"][line["steps"].index(10_001)] == "NaN"
    assert len(text) < 300_000
    curve = next(a["d"] for tag, a in Page(text).elements if a.get("class") == "line c0")
    assert curve.count("M") == 2
    top = min(float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", curve))
    assert 0 < top < 100


def test_a_long_run_shows_the_second_half_of_its_loss_once_more(tmp_path: Path) -> None:
    run = write_run(tmp_path / "long", [training(step) for step in range(1, 81)])
    chart = data_of(run_page(read_run(run)))["second_half"]
    assert (chart["first"], chart["last"]) == (40, 80)
    assert chart["lines"][0]["steps"] == list(range(40, 81))
    assert chart["high"] < 5


def test_hostile_texts_stay_texts_wherever_they_come_from(tmp_path: Path) -> None:
    records = usual_records()
    for record in records:
        record["run"] = HOSTILE
    records[0] |= {"device": HOSTILE, "backend": HOSTILE}
    records += [
        entry("event", 40, attempt=2, t=300, message=HOSTILE),
        entry("sample", 40, attempt=2, t=300, text=HOSTILE + "\ud800"),
        entry("checkpoint", 40, attempt=2, t=300, path=HOSTILE, seconds=1.0),
        entry("train", 40, attempt=2, t=300, **{f"lr_{HOSTILE}": 1.0}),
        entry("validation", 40, attempt=2, t=300, loss=1.0, **{HOSTILE: 1.0}),
    ]
    config = f"[data]\nkind = {json.dumps(HOSTILE)}\n[{json.dumps(HOSTILE)}]\nx = 1\n".replace("\x00", "")
    run = write_run(tmp_path / "run", records, config=config)
    (run / "environment.json").write_text(json.dumps({HOSTILE: [{HOSTILE: HOSTILE}]}), encoding="utf-8")
    view = read_run(run)
    for text in (run_page(view), comparison_page([view, view])):
        text.encode("utf-8")
        page = Page(text)
        scripts = [attributes for tag, attributes in page.elements if tag == "script"]
        assert scripts == [{"type": "application/json", "id": "data"}, {}]
        assert {tag for tag, _ in page.elements} <= {
            *("html", "head", "meta", "title", "style", "script", "body", "header", "main", "footer", "article"),
            *("h1", "h2", "h3", "p", "pre", "small", "b", "i", "span", "div", "ul", "li", "dl", "dt", "dd", "output"),
            *("figure", "figcaption", "svg", "path", "table", "caption", "thead", "tbody", "tr", "th", "td"),
            *("details", "summary"),
        }
        assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
        assert not [name for _, attributes in page.elements for name in attributes if name in ("src", "href", "action")]
        assert "<script>alert(1)</script>" in page.text
        assert "\x00" not in text
        data_of(text)


def test_the_policy_allows_the_pages_own_script_alone_and_nothing_is_loaded(run: Path) -> None:
    text = run_page(read_run(run))
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for _, a in Page(text).elements if a.get("http-equiv") == "Content-Security-Policy")
    assert f"script-src 'sha256-{digest}'" in str(policy)
    assert str(policy).startswith("default-src 'none'")
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|\bFunction\(", text)


def test_a_run_is_running_stopped_or_finished(tmp_path: Path) -> None:
    ended = [
        *usual_records()[:-1],
        entry("event", 40, attempt=2, t=202, message="stopped by signal 2; the state is saved"),
    ]
    stopped = write_run(tmp_path / "stopped", [*ended, entry("end", 40, attempt=2, t=203, seconds=1.0)])
    killed = write_run(tmp_path / "killed", usual_records()[:-1])
    states = [read_run(stopped).state, read_run(killed).state]
    lock = lock_run(killed)
    states.append(read_run(killed).state)
    lock.release()
    assert states == ["stopped", "stopped", "running"]
    assert read_run(killed).state == "stopped"


def test_preference_measures_have_charts_and_headlines(tmp_path: Path) -> None:
    measures = {"accuracy": 0.75, "margin": 0.5, "kl": 0.01}
    records = [entry("train", 1, loss=0.7, **measures), entry("validation", 1, loss=0.6, **measures)]
    run = write_run(tmp_path / "run", records, config='[data]\nkind = "preference"\n')
    text = run_page(read_run(run))
    assert {"accuracy", "margin", "kl", "loss"} == data_of(text).keys()
    page = Page(text)
    assert "preference tuning" in page.texts
    assert "nats per pair" in page.texts
    assert "Accuracy" in page.texts


def test_a_run_without_configuration_or_environment_is_reported_all_the_same(tmp_path: Path) -> None:
    run = write_run(tmp_path / "bare", config="not = [toml")
    (run / "environment.json").write_text("[]")
    page = Page(run_page(read_run(run)))
    assert "training" in page.texts
    assert "Environment" not in page.texts
    assert "Configuration" not in page.texts


def test_a_comparison_lays_curves_over_each_other_and_lists_the_differences_alone(tmp_path: Path) -> None:
    other = [record | {"run": "other"} for record in usual_records()]
    for record in other:
        if record["kind"] == "validation":
            record["loss"] -= 1
        if record["kind"] == "train":
            record["lr_matrices"] = 0.01
    runs = [write_run(tmp_path / "moby"), write_run(tmp_path / "other", other, config=CONFIG.replace("0.02", "0.01"))]
    text = comparison_page([read_run(run) for run in runs])
    page, charts = Page(text), data_of(text)
    assert [line["label"] for line in charts["validation-loss"]["lines"]] == ["moby", "other"]
    assert [line["values"][-1] for line in charts["validation-loss"]["lines"]] == [4.25, 3.25]
    assert "train-lr_matrices" in charts
    configuration = page.rows("Configuration").split("\nCurves\n")[0].split("\n")
    assert [cell for cell in configuration if cell.strip()] == ["Key", "moby", "other", "optim.lr", "0.02", "0.01"]
    same = comparison_page([read_run(runs[0]), read_run(runs[0])])
    assert "The configurations are equal." in same
    assert "moby (1)" in same
    assert "moby (2)" in same
    assert "train-lr_matrices" not in data_of(same)


def test_the_command_prints_where_the_page_is_and_replaces_nothing_but_reports(run: Path, tmp_path: Path) -> None:
    runner, copy = CliRunner(), tmp_path / "moby"
    shutil.copytree(run, copy)
    for _ in range(2):
        result = runner.invoke(app, ["report", str(copy)])
        assert (result.exit_code, result.stdout.strip()) == (0, str(copy / "report.html"))
    out = tmp_path / "new" / "two.html"
    assert runner.invoke(app, ["report", str(copy), "--compare", str(run), "--out", str(out)]).exit_code == 0
    assert "2 runs compared" in out.read_text("utf-8")
    (tmp_path / "mine.html").write_text("mine")
    for arguments, message in (
        ([copy, "--out", tmp_path / "mine.html"], "is no report of anarcho"),
        ([copy, "--out", tmp_path], "is a directory"),
        ([copy, run], "expected one, or --compare"),
        ([copy, "--compare"], "expected two or more"),
        ([tmp_path / "none"], "is not there"),
        ([tmp_path], "holds no metrics.jsonl"),
    ):
        result = runner.invoke(app, ["report", *map(str, arguments)])
        assert result.exit_code == 2
        assert message in result.stderr
    assert (tmp_path / "mine.html").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("{")
    assert "no record yet" in runner.invoke(app, ["report", str(tmp_path / "empty")]).stderr


finite = st.floats(min_value=-1e12, max_value=1e12, allow_nan=False)


@given(st.lists(finite, min_size=1, max_size=20), st.booleans())
def test_every_value_lies_within_its_scale_and_ticks_are_few_and_rising(values: list[float], from_zero: bool) -> None:
    scale = make_scale(values, from_zero=from_zero)
    assert all(-1e-6 <= scale.position(value) <= 1 + 1e-6 for value in values)
    assert all(-1e-6 <= scale.position(tick) <= 1 + 1e-6 for tick in scale.ticks)
    assert list(scale.ticks) == sorted(scale.ticks)
    assert len(scale.ticks) <= 14


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_linear_ticks_are_about_five_round_numbers(low: float, spread: float) -> None:
    ticks = linear_ticks(low, low + spread)
    assert len(ticks) >= 1 or spread < 1e-9 * abs(low)
    assert len(ticks) <= 8


def test_figures_have_the_digits_that_matter() -> None:
    assert [figure(value) for value in (4.705123, 0.00024, 123456.0, math.nan, -math.inf, None)] == [
        *("4.705", "2.40e-4", "1.23e5", "NaN", "−∞", "–")
    ]
    assert (figure(0.0123, "share"), figure(3 * 2**29, "bytes"), figure(98_765, "count")) == (
        "1.23 %",
        "1.5 GiB",
        "98.8 k",
    )


@given(st.text())
def test_no_text_gets_out_of_an_element_an_attribute_or_the_data(text: str) -> None:
    page = Page(element("p", text, title=text) + json_script([text], name="d"))
    assert [tag for tag, _ in page.elements] == ["p", "script"]
    script = json_script([text], name="d")
    assert json.loads(script[script.index(">") + 1 : script.rindex("<")]) == [text]
    assert element("p", Markup("<b>x</b>"), None, hidden=True, id=None) == "<p hidden><b>x</b></p>"


def test_the_pointer_and_the_keys_read_all_curves_at_one_step(browser: Any, run: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(run_page(read_run(run)), encoding="utf-8")
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page, complaints = context.new_page(), []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(file.as_uri())
    loss = page.locator('[data-chart="loss"]')
    values = page.locator("figure").first.locator(".legend b")
    assert values.all_inner_texts() == ["4", "4.5", "4.25"]
    box = loss.bounding_box()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 20)
    assert values.all_inner_texts() == ["7", "7.5", "5.5"]
    assert page.locator('[data-chart="speed"] .at').inner_text() == "step 10"
    page.mouse.move(5, 5)
    assert values.all_inner_texts() == ["4", "4.5", "4.25"]
    page.keyboard.press("Tab")
    assert loss.evaluate("node => node === document.activeElement")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert loss.get_attribute("aria-valuetext") == "step 4: training 7.6, training, worst step 8.1, validation 5.5"
    assert (loss.get_attribute("role"), loss.get_attribute("aria-valuenow")) == ("slider", "4")
    page.keyboard.press("Escape")
    assert values.all_inner_texts() == ["4", "4.5", "4.25"]
    assert complaints == []
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_stands_out_in_both_colour_schemes(
    scheme: str, browser: Any, run: Path, tmp_path: Path
) -> None:
    file = tmp_path / "report.html"
    file.write_text(run_page(read_run(run)), encoding="utf-8")
    context = browser.new_context(viewport={"width": 320, "height": 640}, color_scheme=scheme, has_touch=True)
    page = context.new_page()
    page.goto(file.as_uri())
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    style = "(name) => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim()"
    pairs = [
        "text/back",
        "text/raised",
        "quiet/back",
        "quiet/raised",
        "good/good-back",
        "bad/bad-back",
        "busy/busy-back",
    ]
    for text, behind in (pair.split("/") for pair in pairs):
        assert contrast(page.evaluate(style, text), page.evaluate(style, behind)) >= 4.5, (text, behind)
    for number in range(8):  # Shapes need less than letters.
        assert contrast(page.evaluate(style, f"c{number}"), page.evaluate(style, "raised")) >= 3, number
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("[tabindex]")].filter((node) => !node.getAttribute("aria-label")
        && !document.getElementById(node.getAttribute("aria-labelledby"))).length"""
    )
    assert unnamed == 0
    context.close()
