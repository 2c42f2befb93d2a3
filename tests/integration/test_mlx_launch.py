"""Runs of several MLX processes through the whole command: they train what one does, miss each other in bounded time, and go on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anarcho_cli import shared_run
from anarcho_monitor import read_curve, read_metrics
from anarcho_train import Alone, RanksDiffer
from safetensors.numpy import load_file

from .conftest import settings
from .mlx_launched import Launched

mx = pytest.importorskip("mlx.core")

pytestmark = [
    pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="this MLX has no ring to connect processes"),
    pytest.mark.skipif(sys.platform != "linux", reason="the processes are forked, which Metal does not allow"),
]

TINY = {
    "tokenizer.vocab_size": 300,
    "model.num_layers": 1,
    "model.dim": 16,
    "model.num_heads": 2,
    "model.hidden_dim": 32,
    "model.context_length": 64,
    "train.steps": 6,
    "train.batch_tokens": 256,
    "train.micro_batch": 1,
    "train.eval_every": 4,
    "train.checkpoint_every": 100,
    "train.log_every": 1,
    "train.precision": "float32",
    "optim.warmup_steps": 2,
    "sample.max_new_tokens": 1,
    "monitor.tensorboard": "false",
}
LOST = 75


@pytest.fixture(scope="module")
def begin(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A run on forty paragraphs of made-up words."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghij", k=5)) for _ in range(50)]
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    corpus.write_text("\n\n".join(" ".join(chance.choices(words, k=100)) for _ in range(40)))
    return ["pretrain", "--backend", "mlx", "--device", "cpu", "--data", corpus, *settings(TINY), "--name", "run"]


@pytest.fixture(scope="module")
def whole(begin, tmp_path_factory) -> Launched:
    """The run in one process."""
    launched = Launched(tmp_path_factory.mktemp("whole"), [begin])
    assert launched.exit_codes() == [0], launched.errors(0)
    return launched


def run_of(launched: Launched, name: str = "run") -> Path:
    return launched.directory / "runs" / name


def steps(launched: Launched) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run_of(launched) / "checkpoints").glob("step-*"))


def losses(run: Path, kind: str = "train") -> dict[int, float]:
    return {step: value for step, *_, value in read_curve(run / "metrics.jsonl", kind, "loss")}


def assert_same_training(run: Path, expected: Path) -> None:
    """Losses, evaluations and final weights are those of another run, but for rounding."""
    for kind in ("train", "validation"):
        ours, theirs = losses(run, kind), losses(expected, kind)
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose([ours[s] for s in theirs], [*theirs.values()], atol=1e-5)
    final = "checkpoints/step-00000006/model.safetensors"
    ours, theirs = load_file(run / final), load_file(expected / final)
    for name, weights in theirs.items():
        np.testing.assert_allclose(ours[name], weights, atol=1e-4, err_msg=name)


def test_two_processes_train_what_one_does_on_the_same_samples(begin, whole, tmp_path):
    two = Launched(tmp_path, [begin, begin])
    assert two.exit_codes() == [0, 0], two.errors(0) + two.errors(1)
    assert two.rows() == whole.rows()
    assert_same_training(run_of(two), run_of(whole))
    records = read_metrics(run_of(two) / "metrics.jsonl")
    assert [record["processes"] for record in records if record["kind"] == "start"] == [2]
    assert records[-1]["tokens"] == 6 * 256
    assert (two.output(0), two.output(1)) == ("runs/run\n", "")
    assert "anarcho" not in two.errors(1)


def test_preference_tuning_over_two_processes_is_that_of_one(whole, tmp_path):
    chance = random.Random(1)
    pairs = [
        {"prompt": f"say {i}", "chosen": "yes " * chance.randint(1, 6), "rejected": "no " * chance.randint(1, 6)}
        for i in range(60)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tuned = {"train.steps": 6, "train.epochs": "none", "train.batch_tokens": 256, "train.micro_batch": 1}
    tuned |= {
        key: TINY[key] for key in ("train.precision", "train.log_every", "sample.max_new_tokens", "train.eval_every")
    }
    tuned |= {"train.checkpoint_every": 100, "train.sequence_length": 64, "data.validation_fraction": 0.2}
    arguments = ["preference", "--backend", "mlx", "--device", "cpu", "--from", run_of(whole), "--data", "pairs.jsonl"]
    arguments += settings(tuned)
    one, two = ([*arguments, "--name", name] for name in ("one", "two"))
    alone, both = Launched(tmp_path, [one]), None
    assert alone.exit_codes() == [0], alone.errors(0)
    rows = alone.rows()
    both = Launched(tmp_path, [two, two])
    assert both.exit_codes() == [0, 0], both.errors(0) + both.errors(1)
    assert both.rows() == rows
    assert_same_training(run_of(both, "two"), run_of(both, "one"))


def test_killed_ranks_leave_the_last_step_and_any_number_of_processes_goes_on_to_the_same_end(begin, whole, tmp_path):
    rows = []
    again = ["pretrain", "--resume", "runs/run"]

    first = Launched(tmp_path, [begin, begin], faults={0: ("SIGKILL", 3)})
    assert first.exit_codes() == [-signal.SIGKILL, LOST], first.errors(1)
    assert steps(first) == [2], "saved by the one that outlived the first"
    assert "another process of this run was lost" in first.errors(1)
    assert "the state after step 2 is saved" in first.errors(1)
    rows += first.rows()

    alone = Launched(tmp_path, [again], faults={0: ("SIGTERM", 1)})
    assert alone.exit_codes() == [128 + signal.SIGTERM], alone.errors(0)
    assert steps(alone)[-1] == 3
    rows += alone.rows()

    second = Launched(tmp_path, [again, again], faults={1: ("SIGKILL", 3)})
    assert second.exit_codes() == [LOST, -signal.SIGKILL], second.errors(0)
    assert steps(second)[-1] == 5
    rows += second.rows()

    last = Launched(tmp_path, [again, again])
    assert last.exit_codes() == [0, 0], last.errors(0) + last.errors(1)
    assert rows + last.rows() == whole.rows()
    assert_same_training(run_of(last), run_of(whole))


def test_a_signal_to_one_process_stops_all_after_the_same_step(begin, tmp_path):
    launched = Launched(tmp_path, [begin, begin], faults={1: ("SIGTERM", 3)})
    assert launched.exit_codes() == [128 + signal.SIGTERM] * 2, launched.errors(0)
    assert steps(launched) == [3]
    assert "stopped by signal 15; the state is saved" in launched.errors(0)


def test_a_process_that_stops_answering_is_given_up_after_the_timeout_with_the_last_step_saved(begin, tmp_path):
    arguments = [*begin, "--set", "train.rank_timeout_seconds=2.5"]
    launched = Launched(tmp_path, [arguments, arguments], faults={1: ("SIGSTOP", 3)})
    first, frozen = launched.processes
    first.join(30)
    assert first.exitcode == LOST, launched.errors(0)
    assert "it did not answer for 2.5 seconds" in launched.errors(0)
    assert steps(launched) == [2]

    # Awake again, it finds the run saved by another, and leaves it alone.
    os.kill(frozen.pid, signal.SIGCONT)
    assert launched.exit_codes()[1] == LOST, launched.errors(1)
    assert "others have gone on with it already" in launched.errors(1)
    assert steps(launched) == [2]


def test_processes_with_other_configurations_are_refused_before_anything_is_written(begin, tmp_path):
    launched = Launched(tmp_path, [begin, [*begin, "--set", "optim.lr=0.5"]])
    assert launched.exit_codes() == [2, 2]
    message = "the processes of this run do not agree on: the configuration (rank 0 has another value than rank 1)"
    assert launched.errors(0).count(message) == 1
    assert message not in launched.errors(1)
    assert not (tmp_path / "runs").exists()


def test_a_directory_that_a_process_does_not_share_is_refused(monkeypatch, tmp_path):
    class Two(Alone):
        size = 2

        def gathered(self, values: Any) -> np.ndarray:
            return np.array([values, [0.0] * len(values)])  # Another rank that has not found it.

    monkeypatch.setattr(shared_run, "SHARED_SECONDS", 0.0)
    with pytest.raises(RanksDiffer, match="is not shared: rank 1 does not see what rank 0 has written there"):
        shared_run._require_shared(tmp_path, Two())
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from anarcho_train.steps.mlx import MlxStep
train, calls = MlxStep.train, [0]
def wrapper(*args, **kwargs):
    calls[0] += 1
    if calls[0] == 3 and os.environ["MLX_RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return train(*args, **kwargs)
MlxStep.train = wrapper
sys.modules["torch"] = None
sys.argv[0] = "anarcho"
from anarcho_cli.main import run
run()
"""


def test_mlx_launch_itself_starts_the_command_and_a_killed_rank_ends_all_with_the_last_step_saved(begin, tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    launcher = Path(sys.executable).with_name("mlx.launch")
    command = [launcher, "-n", "2", "--", sys.executable, "killed.py", *begin]
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert "another process of this run was lost" in errors
    assert f"Node with rank 0 exited with code {LOST}" in errors
    assert [path.name for path in (tmp_path / "runs/run/checkpoints").iterdir()] == ["step-00000002"]
