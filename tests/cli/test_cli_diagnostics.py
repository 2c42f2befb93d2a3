"""--profile and --detect-anomaly: what is recorded and when, what is refused, and that both reach the run."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anarcho_cli import compose, profiling
from anarcho_cli.diagnostics import Diagnostics, diagnosed
from anarcho_cli.main import app
from anarcho_monitor import Throughput
from anarcho_train import AnomalyDetection, NonFiniteNumbers, StepMetrics, StepSchedule
from torch.profiler import record_function
from typer.testing import CliRunner


class FakeLoop:
    """Steps of a matrix product, with checkpoints after some of them, as the loop marks them."""

    def __init__(self, *, steps: int, saves: tuple[int, ...] = (), first_step: int = 0) -> None:
        self.steps, self.saves, self.first_step = steps, saves, first_step
        self.throughput: Any = Throughput(total_steps=steps)
        self.step: Any = SimpleNamespace(precision="float32", train=self.train, explain=lambda *_, **__: "found it")
        self.grad_norm = 1.0

    def train(self, micro_batches: Any, *, schedule: StepSchedule) -> StepMetrics:
        with record_function("forward"):
            torch.ones(8, 8) @ torch.ones(8, 8)
        return StepMetrics(loss=1.0, weight=1.0, grad_norm=self.grad_norm, skipped=not math.isfinite(self.grad_norm))

    def run(self) -> None:
        self.throughput.begin(self.first_step)
        for number in range(self.first_step, self.steps):
            with self.throughput.waiting():
                pass
            self.step.train([], schedule=StepSchedule(lr_scale=1.0, number=number))
            self.throughput.finish_step(10)
            if number + 1 in self.saves:
                with self.throughput.pause("checkpoint"):
                    torch.zeros(4).clone()


def record(loop: FakeLoop, run: Path, **wanted: bool) -> dict[str, dict[str, int]]:
    """Runs the loop under observation; name of each trace -> name of each range -> how often it occurs."""
    run.mkdir(exist_ok=True)
    with diagnosed(loop, run, Diagnostics(**wanted), backend="torch", device="cpu"):  # type: ignore[arg-type]
        loop.run()
    traces: dict[str, dict[str, int]] = {}
    for file in sorted((run / "profile").glob("*.json")):
        events = json.loads(file.read_text())["traceEvents"]
        names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        traces[file.name] = {name: names.count(name) for name in names}
    return traces


def test_three_steps_after_the_first_two_are_recorded_with_their_parts(tmp_path: Path, capfd: Any) -> None:
    loop = FakeLoop(steps=8, saves=(4, 7))
    traces = record(loop, tmp_path / "run", profile=True)
    assert traces == {"steps-3-to-5.json": {"data": 3, "forward": 3, "checkpoint": 1}}
    assert "aten::mm" in (tmp_path / "run" / "profile" / "steps-3-to-5.txt").read_text()
    assert str(tmp_path / "run" / "profile" / "steps-3-to-5.json") in capfd.readouterr().err
    assert not list((tmp_path / "run" / "profile").glob(".*"))
    assert loop.throughput.metrics()["tokens_per_second"] > 0


def test_a_checkpoint_outside_of_these_steps_is_recorded_by_itself_once(tmp_path: Path) -> None:
    traces = record(FakeLoop(steps=30, saves=(20, 30), first_step=10), tmp_path / "run", profile=True)
    assert traces == {
        "checkpoint-20.json": {"checkpoint": 1},
        "steps-13-to-15.json": {"data": 3, "forward": 3},
    }


def test_a_run_that_ends_within_the_recorded_steps_leaves_what_there_was(tmp_path: Path, capfd: Any) -> None:
    assert record(FakeLoop(steps=4), tmp_path / "a", profile=True) == {"steps-3-to-4.json": {"data": 2, "forward": 2}}
    assert record(FakeLoop(steps=2), tmp_path / "b", profile=True) == {}
    assert record(FakeLoop(steps=1), tmp_path / "c", profile=True) == {}
    assert "ended before the steps that --profile records" in capfd.readouterr().err


def test_a_run_that_fails_leaves_its_trace_too(tmp_path: Path) -> None:
    loop = FakeLoop(steps=9)
    inner = loop.step.train

    def train(micro_batches: Any, *, schedule: StepSchedule) -> StepMetrics:
        if schedule.number == 3:
            raise RuntimeError("broken")
        return inner(micro_batches, schedule=schedule)

    loop.step.train = train
    with pytest.raises(RuntimeError, match="broken"):
        record(loop, tmp_path / "run", profile=True)
    assert (tmp_path / "run" / "profile" / "steps-3-to-3.json").is_file()


def test_nothing_is_wrapped_where_nothing_is_wanted(tmp_path: Path) -> None:
    loop = FakeLoop(steps=3)
    step, throughput = loop.step, loop.throughput
    assert record(loop, tmp_path / "run") == {}
    assert (loop.step, loop.throughput) == (step, throughput)


def test_detecting_anomalies_ends_the_run_with_the_explanation(tmp_path: Path) -> None:
    loop = FakeLoop(steps=3)
    record(loop, tmp_path / "run", detect_anomaly=True)
    assert isinstance(loop.step, AnomalyDetection)
    loop = FakeLoop(steps=3)
    loop.grad_norm = math.inf
    with pytest.raises(NonFiniteNumbers, match=r"step 1 has loss 1\.0 and gradient norm inf; found it"):
        record(loop, tmp_path / "run", detect_anomaly=True)


def test_without_metal_a_profile_of_mlx_is_refused_and_with_it_needs_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mx = pytest.importorskip("mlx.core")
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["pretrain", "--backend", "mlx", "--device", "cpu", "--profile"])
    assert result.exit_code == 2
    assert "there is no Metal here" in result.stderr
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.delenv("MTL_CAPTURE_ENABLED", raising=False)
    with pytest.raises(ValueError, match="MTL_CAPTURE_ENABLED=1"):
        profiling.require_profiler(backend="mlx")
    monkeypatch.setenv("MTL_CAPTURE_ENABLED", "1")
    profiling.require_profiler(backend="mlx")


def test_metal_captures_one_step_into_a_place_that_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mx = pytest.importorskip("mlx.core")
    calls: list[str] = []
    monkeypatch.setattr(mx.metal, "start_capture", lambda path: calls.append(f"start {Path(path).name}"), raising=False)
    monkeypatch.setattr(mx.metal, "stop_capture", lambda: calls.append("stop"), raising=False)
    monkeypatch.setattr(mx, "synchronize", lambda: None)
    taken = tmp_path / "run" / "profile" / "step-13.gputrace"
    taken.mkdir(parents=True)
    profile = profiling.open_profile(tmp_path / "run", backend="mlx", device="mps")
    profile.begin(10)
    for _ in range(6):
        with profile.range("data"):
            calls.append("step")
        profile.finish_step()
    profile.close()
    assert calls == ["step", "step", "start step-13.gputrace", "step", "stop", "step", "step", "step"]
    assert not taken.exists()


@pytest.mark.parametrize(
    ("command", "resumed"), [("pretrain", False), ("pretrain", True), ("sft", True), ("preference", True)]
)
def test_both_reach_the_run_from_every_training_command(
    command: str, resumed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Diagnostics] = []

    class Reached(Exception):
        pass

    def called(*_: Any, diagnostics: Diagnostics, **__: Any) -> None:
        seen.append(diagnostics)
        raise Reached

    monkeypatch.setattr(compose, "resume" if resumed else "train", called)
    monkeypatch.setattr("anarcho_cli.launching.connected", lambda *_, **__: nullcontext(compose.Alone()))
    arguments = [command, "--profile", "--detect-anomaly", "--device", "cpu", "--runs-dir", str(tmp_path)]
    if resumed:
        from anarcho_cli.config import dumps, resolve

        run = tmp_path / "run"
        run.mkdir()
        (run / "config.toml").write_text(dumps(resolve(preset="quickstart")))
        (run / "environment.json").write_text("{}")
        arguments = [command, "--resume", str(run), "--profile", "--detect-anomaly", "--device", "cpu"]
    CliRunner().invoke(app, arguments)
    assert seen == [Diagnostics(profile=True, detect_anomaly=True)]
