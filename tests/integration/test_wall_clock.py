"""A wall clock that jumps (summer time, a server that sets it, a person) changes no interval: it is read for stamps alone."""

from __future__ import annotations

import ast
import itertools
import time
from pathlib import Path

import pytest
from anarcho_monitor import MetricsLog, Throughput, read_metrics
from anarcho_train.saving import Saves

ROOT = Path(__file__).parents[2]
STAMPS = {
    "anarcho_cli/commands/checkpoint.py",  # the age of a checkpoint
    "anarcho_cli/reporting/page.py",  # "made on"
    "anarcho_cli/runs.py",  # the name of a run
    "anarcho_cli/serving/app.py",  # "created" of an answer
    "anarcho_monitor/metrics.py",  # t_wall
    "anarcho_monitor/tensorboard.py",
    "anarcho_tokenize/template_sandbox.py",  # what a template calls today
    "anarcho_train/checkpoint.py",  # "created_at"
}
"""Where the wall clock is read, and never to measure or to wait."""


def test_the_wall_clock_is_read_for_stamps_alone() -> None:
    found = set()
    for file in [*ROOT.glob("packages/*/src/**/*.py"), *ROOT.glob("apps/*/src/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = f"{node.value.id}.{node.attr}"
                if name in ("time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today"):
                    found.add("/".join(file.parts[file.parts.index("src") + 1 :]))
    assert found <= STAMPS, "measure with time.monotonic, or add the stamp here"


def test_speed_and_pauses_do_not_follow_a_clock_that_jumps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    days = itertools.cycle([86_400.0, 0.0, 1e9, -1e9])
    monkeypatch.setattr(time, "time", lambda: next(days))
    throughput = Throughput(total_steps=10)
    throughput.begin(0)
    log = MetricsLog(tmp_path / "metrics.jsonl", run="r")
    for step in range(1, 6):
        with throughput.waiting():
            pass
        time.sleep(0.002)
        throughput.finish_step(100)
        log.write("train", step=step, tokens=100 * step, **throughput.metrics())
    log.close()
    measured = throughput.metrics()
    assert 0 < measured["step_seconds"] < 10
    assert 0 <= measured["eta_seconds"] < 100
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert {record["t_wall"] for record in records} == {86_400.0, 0.0, 1e9, -1e9}
    moments = [record["t_mono"] for record in records]
    assert moments == sorted(moments)


def test_the_pauses_between_attempts_at_a_checkpoint_do_not_follow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    days = itertools.cycle([1e9, -1e9])
    monkeypatch.setattr(time, "time", lambda: next(days))
    pauses: list[float] = []
    outcomes = iter([OSError(28, "No space left on device")] * 3)

    def save() -> Path:
        if (error := next(outcomes, None)) is not None:
            raise error
        return Path("done")

    saves = Saves(limit=5, sleep=pauses.append)
    assert saves.attempt(save, report=lambda message, failures: None, needed=True, patient=True) == Path("done")
    assert pauses == [1, 2, 4]
