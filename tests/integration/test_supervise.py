"""The supervisor: starts a training again that the system has killed, and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from anarcho_cli.supervision import Supervisor, child_arguments, resuming
from anarcho_monitor import MetricsLog, read_metrics

from .conftest import LIGHT

CHILD = """
import json, os, signal, sys, time
from pathlib import Path

run, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
calls = run / "calls.jsonl"
with calls.open("a") as file:
    file.write(json.dumps(sys.argv[3:]) + "\\n")
step, ending = plan[len(calls.read_text().splitlines()) - 1]
if step:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "step": step, "created_at": 0.0, "hashes": {},
        "files": {"state.json": {"size": 2, "sha256": ""}}}))
if ending == "wait":
    def stop(number, frame):
        sys.exit(128 + number)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    (run / "ready").touch()
    while True:
        time.sleep(0.01)
if ending < 0:
    os.kill(os.getpid(), -ending)
sys.exit(ending)
"""
"""A training that has got to a step and ends in some way, the next time in another."""


def supervised(run: Path, plan: list, *, max_restarts: int = 3) -> tuple[Supervisor, list[float]]:
    (run / "config.toml").parent.mkdir(parents=True, exist_ok=True)
    (run / "config.toml").touch()
    log = MetricsLog(run / "metrics.jsonl", run="run", attempt=1)
    log.write("start", step=0, tokens=0)
    log.close()
    pauses: list[float] = []
    program = [sys.executable, "-S", "-c", CHILD, str(run), json.dumps(plan)]
    return Supervisor(
        run, max_restarts=max_restarts, program=program, wait=lambda event, seconds: pauses.append(seconds)
    ), pauses


def calls(run: Path) -> list[list[str]]:
    return [json.loads(line) for line in (run / "calls.jsonl").read_text().splitlines()]


BEGIN = ["pretrain", "--set", "train.steps=9", "--device", "cpu", "--name", "run"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT])
def test_a_training_that_the_system_killed_goes_on(tmp_path, number):
    supervisor, pauses = supervised(tmp_path, [(2, -number), (0, 0)])
    assert supervisor.supervise(BEGIN) == 0
    assert calls(tmp_path) == [BEGIN, ["pretrain", "--device", "cpu", "--resume", str(tmp_path)]]
    assert pauses == [1]
    (event,) = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "event"]
    assert (event["step"], event["attempt"], event["signal"]) == (2, 1, number.name)
    assert f"killed by {number.name}" in event["message"]
    assert "goes on from step 2" in event["message"]


@pytest.mark.parametrize("status", [0, 1, 2, 130, 143])
def test_a_training_that_ended_by_itself_is_not_started_again(tmp_path, status):
    supervisor, _ = supervised(tmp_path, [(1, status)])
    assert supervisor.supervise(BEGIN) == status
    assert len(calls(tmp_path)) == 1


def test_a_signal_that_a_person_sends_to_the_training_is_not_undone(tmp_path):
    supervisor, _ = supervised(tmp_path, [(1, -signal.SIGUSR1)])
    assert supervisor.supervise(BEGIN) == 128 + signal.SIGUSR1
    assert len(calls(tmp_path)) == 1


def test_restarts_without_progress_are_limited_and_progress_starts_the_count_anew(tmp_path):
    killed = -signal.SIGKILL
    plan = [(2, killed), (0, killed), (4, killed), (0, killed), (0, killed), (0, killed)]
    supervisor, pauses = supervised(tmp_path, plan, max_restarts=3)
    assert supervisor.supervise(BEGIN) == 128 + signal.SIGKILL
    assert len(calls(tmp_path)) == 6
    assert pauses == [1, 2, 1, 2, 4]
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert "3 restarts got no further than step 4" in last["message"]


def test_the_pauses_are_capped(tmp_path):
    supervisor, pauses = supervised(tmp_path, [(0, -signal.SIGKILL)] * 9, max_restarts=8)
    supervisor.supervise(BEGIN)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_training_once_and_its_status_is_passed_on(tmp_path, number):
    supervisor, _ = supervised(tmp_path, [(1, "wait")])

    def send() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    before = signal.getsignal(number)
    assert supervisor.supervise(BEGIN) == 128 + number
    thread.join()
    assert signal.getsignal(number) is before
    assert len(calls(tmp_path)) == 1


def test_a_signal_before_a_restart_ends_the_supervisor(tmp_path):
    supervisor, _ = supervised(tmp_path, [(1, -signal.SIGKILL)])
    supervisor._wait = lambda event, seconds: os.kill(os.getpid(), signal.SIGTERM)
    assert supervisor.supervise(BEGIN) == 143
    assert len(calls(tmp_path)) == 1


def test_the_command_of_a_restart_keeps_where_it_computes_and_no_more():
    begin = ["--debug", "sft", "--from", "m", "--backend=mlx", "--set", "train.steps=3", "--json", "--supervise"]
    child = child_arguments(begin, name="sft-1")
    assert child == [*begin[:-1], "--name", "sft-1"]
    assert resuming(child, Path("runs/sft-1")) == [
        "--debug",
        "sft",
        "--backend=mlx",
        "--json",
        "--resume",
        "runs/sft-1",
    ]


def test_a_real_run_that_is_killed_is_finished(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"The whale number {i} and the sea."}) + "\n" for i in range(300)))
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent(
            """
            import os, pathlib, signal, threading, time

            def watch():
                here = pathlib.Path(__file__).parent
                while not (here / "runs/r/checkpoints/step-00000002").is_dir():
                    time.sleep(0.002)
                if not (here / "killed").exists():
                    (here / "killed").touch()
                    os.kill(os.getpid(), signal.SIGKILL)

            if os.environ.get("TRAINING") == "1":  # The supervisor's child, and not the supervisor itself.
                threading.Thread(target=watch, daemon=True).start()
            os.environ["TRAINING"] = "1"
            """
        )
    )
    sizes = {
        "tokenizer.vocab_size": 300, "data.num_workers": 0, "monitor.tensorboard": "false",
        "model.num_layers": 1, "model.dim": 16, "model.num_heads": 2,
        "model.hidden_dim": 32, "model.context_length": 16, "train.batch_tokens": 32, "train.micro_batch": 2,
        "train.steps": 20, "train.checkpoint_every": 2, "train.eval_every": 0, "sample.max_new_tokens": 1,
    }  # fmt: skip
    settings = [part for key, value in sizes.items() for part in ("--set", f"{key}={value}")]
    command = [
        sys.executable,
        "-m",
        "anarcho_cli",
        "pretrain",
        "--supervise",
        *("--backend", LIGHT, "--device", "cpu"),
        "--data",
        str(text),
    ]
    result = subprocess.run(
        [*command, "--name", "r", *settings],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == "runs/r\n"
    records = read_metrics(tmp_path / "runs" / "r" / "metrics.jsonl")
    assert [record["attempt"] for record in records if record["kind"] == "start"] == [1, 2]
    (event,) = [record for record in records if record["kind"] == "event"]
    assert (event["fault"], event["signal"], event["attempt"]) == ("killed", "SIGKILL", 1)
    assert records[-1]["kind"] == "end"
    assert records[-1]["step"] == 20
