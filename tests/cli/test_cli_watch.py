"""Watching a run from its files: what is shown, that nothing torn or repeated misleads, and when it ends."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from anarcho_cli.main import app
from anarcho_cli.watching.following import follow
from anarcho_cli.watching.screen import panel, sparkline
from anarcho_cli.watching.state import SILENCE_SECONDS, Watched
from anarcho_train import lock_run
from hypothesis import given
from hypothesis import strategies as st
from reported import entry, training, usual_records, write_run
from rich.console import Console
from typer.testing import CliRunner


class Scene:
    """A clock whose sleeping lets the next thing happen."""

    def __init__(self, *happenings: Callable[[], Any]) -> None:
        self.now, self.happenings = 1000.0, list(happenings)

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float, /) -> None:
        self.now += seconds
        if self.happenings:
            self.happenings.pop(0)()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def writer(run: Path) -> Callable[..., Callable[[], None]]:
    """Something that appends records, or parts of lines, to the run's file when it is called."""

    def append(*parts: Any) -> Callable[[], None]:
        def now() -> None:
            with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(part if isinstance(part, str) else json.dumps(part) + "\n" for part in parts)

        return now

    return append


def test_once_prints_the_present_state_of_a_run_that_ended(tmp_path: Path) -> None:
    run = write_run(tmp_path / "moby", torn='{"v":1,"run":"mo')
    result = CliRunner().invoke(app, ["watch", str(run), "--once"])
    assert result.exit_code == 0
    first, second, *rest = result.stdout.splitlines()
    assert first == "moby  finished"
    assert second.startswith(
        "step 40/40 (100 %)  loss 4.0000  validation 4.2500 (step 40)  best 4.2500 (step 40)  bits/byte"
    )
    assert "tokens/s 2k  waiting 1.0 %  memory 2.0 GiB" in second
    assert "left" not in second
    assert "step 40  no update at step 40: loss nan" in rest
    assert rest[-2:] == ["    The whale,", "    said he."]


def test_a_run_that_is_not_there_and_one_that_has_not_begun(tmp_path: Path) -> None:
    runner = CliRunner()
    result = runner.invoke(app, ["watch", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert "is not there" in result.stderr
    (tmp_path / "new").mkdir()
    assert runner.invoke(app, ["watch", str(tmp_path / "new"), "--once"]).stdout == "new  not begun\n"
    lock = lock_run(tmp_path / "new")
    assert runner.invoke(app, ["watch", str(tmp_path / "new"), "--once"]).stdout == "new  preparing\n"
    lock.release()


def test_plain_lines_follow_a_run_over_a_kill_to_its_end(tmp_path: Path) -> None:
    records = usual_records()
    kill, (append, line) = (
        records.index(next(r for r in records if r["attempt"] == 2)),
        (None, json.dumps(training(24))),
    )
    run = write_run(tmp_path / "moby", records[:3])
    append = writer(run)
    lock = lock_run(run)
    stream = io.StringIO()
    scene = Scene(
        append(*records[3:9], line[:20]),
        append(line[20:] + "\n", *records[9:kill], line[:30]),
        append("\n", *records[kill : kill + 4]),
        append(*records[kill + 4 :]),
        lock.release,
    )
    assert follow(Watched(run), every_seconds=1, stream=stream, clock=scene) == "finished"
    shown = stream.getvalue()
    assert scene.happenings == []
    assert "\x1b" not in shown
    assert shown.startswith("moby  running\nstep 4/40 (10 %)  loss 7.6000")
    for text in ("step 10  validation: loss 5.5", "step 20  start: device cpu", "step 26/40", "said he."):
        assert text in shown
    assert shown.splitlines()[-1] == "moby  finished at step 40"


def test_watching_ends_when_nobody_works_on_a_silent_run_any_more(tmp_path: Path) -> None:
    run = write_run(tmp_path / "moby", usual_records()[:5])
    lock = lock_run(run)
    scene = Scene(*[lambda: None] * 20, lock.release)
    stream = io.StringIO()
    assert follow(Watched(run), every_seconds=1, stream=stream, clock=scene) == "stopped"
    assert 1021 <= scene.now <= 1022 + SILENCE_SECONDS
    assert stream.getvalue().splitlines()[-1] == "moby  stopped at step 8"


def test_the_exit_status_says_whether_the_run_finished(tmp_path: Path) -> None:
    stopped = [entry("event", 8, message="stopped by signal 15; the state is saved"), entry("end", 8, seconds=1.0)]
    runs = {
        0: write_run(tmp_path / "finished"),
        1: write_run(tmp_path / "stopped", [*usual_records()[:5], *stopped]),
    }
    for status, run in runs.items():
        assert CliRunner().invoke(app, ["watch", str(run)]).exit_code == status


def test_a_terminal_is_drawn_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    records = usual_records()
    run = write_run(tmp_path / "moby", records[:8])
    lock = lock_run(run)
    stream = Terminal()
    scene = Scene(writer(run)(*records[8:]), lock.release)
    assert follow(Watched(run), every_seconds=1, stream=stream, clock=scene) == "finished"
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "step 40/40 (100 %)" in shown
    assert "\x1b[" in stream.getvalue()
    assert "moby  finished" in shown


def test_an_attempt_that_goes_back_takes_its_measurements_back(tmp_path: Path) -> None:
    records = [training(2), entry("validation", 30, loss=1.0), training(30)]
    run = write_run(tmp_path / "moby", records)
    watched = Watched(run)
    watched.poll(0.0)
    assert watched.state.best == (1.0, 30)
    writer(run)(entry("start", 20, attempt=2), training(22, attempt=2))()
    watched.poll(1.0)
    assert watched.state.best is None
    assert watched.state.validation == {}
    assert [point.step for point in watched.state.losses] == [2, 22]
    assert watched.state.seconds_left(1.7e9 + 22) == 18.0
    assert watched.state.seconds_left(1.7e9 + 25) == 15.0


def test_a_models_text_cannot_command_the_terminal_or_style_the_panel(tmp_path: Path) -> None:
    hostile = "\x1b]0;owned\x07 [bold red]x[/] \x9b31m"
    run = write_run(
        tmp_path / "moby",
        [
            training(2),
            entry("sample", 2, text=hostile),
            entry("event", 2, message=hostile),
            entry("start", 2, device=hostile),
        ],
    )
    watched = Watched(run)
    watched.poll(0.0)
    for width in (30, 100):
        console = Console(file=io.StringIO(), width=width)
        console.print(panel(watched.state, condition="running", now=0.0, width=width))
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "\x1b" not in text
        assert "\x9b" not in text
        assert "\x07" not in text
        assert max(map(len, text.splitlines())) <= width
    assert "[bold red]x[/]" in text


@given(st.lists(st.floats(-1e6, 1e6), max_size=300), st.integers(6, 80))
def test_a_sparkline_fits_its_width_and_spans_all_heights(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == (0 if len(values) < 2 else min(len(values), width - 5))
    if len(set(values)) > 1 and len(values) <= width - 5 and max(values) - min(values) > 1e-3:
        assert {"▁", "█"} <= set(line)
