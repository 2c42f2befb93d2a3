"""Runs of several PyTorch processes through the whole command: they train what one does, miss each other in bounded time, and go on."""

from __future__ import annotations

import json
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from anarcho_monitor import read_curve, read_metrics
from anarcho_train import CheckpointStore

from .conftest import settings
from .torch_launched import Launched

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch knows one process alone"),
    pytest.mark.skipif(sys.platform != "linux", reason="the processes are forked, which Metal does not allow"),
]

STEPS = 20
TINY = {
    "tokenizer.vocab_size": 300,
    "model.num_layers": 1,
    "model.dim": 16,
    "model.num_heads": 2,
    "model.hidden_dim": 32,
    "model.context_length": 32,
    "train.steps": STEPS,
    "train.batch_tokens": 384,  # Twelve sequences.
    "train.micro_batch": 3,
    "train.eval_every": 10,
    "train.checkpoint_every": 100,
    "train.log_every": 1,
    "train.precision": "float32",
    "optim.warmup_steps": 2,
    "optim.ns_dtype": "float32",
    "sample.max_new_tokens": 1,
    "monitor.tensorboard": "false",
}
LOST = 75
FSDP = ["--set", "train.strategy=fsdp"]
HYBRID = ["--set", "train.strategy=hybrid"]
AGAIN = ["pretrain", "--resume", "runs/run"]


@pytest.fixture(scope="module")
def begin(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A run on forty paragraphs of made-up words."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghij", k=5)) for _ in range(50)]
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    corpus.write_text("\n\n".join(" ".join(chance.choices(words, k=100)) for _ in range(40)))
    return ["pretrain", "--device", "cpu", "--data", corpus, *settings(TINY), "--name", "run"]


@pytest.fixture(scope="module")
def whole(begin, tmp_path_factory) -> Launched:
    """The run in one process."""
    launched = Launched(tmp_path_factory.mktemp("whole"), [begin])
    assert launched.exit_codes() == [0], launched.errors()
    return launched


def run_of(launched: Launched, name: str = "run") -> Path:
    return launched.directory / "runs" / name


def saved(launched: Launched) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run_of(launched) / "checkpoints").glob("step-*"))


def losses(run: Path, kind: str = "train") -> dict[int, float]:
    return {step: value for step, *_, value in read_curve(run / "metrics.jsonl", kind, "loss")}


def assert_same_losses(run: Path, expected: Path, *, atol: float) -> None:
    for kind in ("train", "validation"):
        ours, theirs = losses(run, kind), losses(expected, kind)
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose([ours[s] for s in theirs], [*theirs.values()], atol=atol, rtol=0)


@pytest.mark.parametrize(("count", "strategy"), [(2, "ddp"), (4, "ddp"), (4, "fsdp"), (4, "hybrid")])
def test_any_number_of_processes_trains_what_one_does_on_the_same_samples(begin, whole, tmp_path, count, strategy):
    machines = 2 if strategy == "hybrid" else 1
    options = {"train.strategy": strategy, "train.save_in_background": "true", "train.checkpoint_every": 7}
    launched = Launched(tmp_path, [[*begin, *settings(options)]] * count, machines=machines)
    assert launched.exit_codes() == [0] * count, launched.errors()
    store = CheckpointStore(run_of(launched) / "checkpoints")
    assert [(info.step, info.problem) for info in store.list()] == [(14, None), (STEPS, None)]
    parts = len(list(store.path(STEPS).glob("optimizer-*.safetensors")))
    assert parts == (0 if strategy == "ddp" else count)
    assert launched.rows() == whole.rows()
    assert_same_losses(run_of(launched), run_of(whole), atol=1e-5)
    records = read_metrics(run_of(launched) / "metrics.jsonl")
    assert [record["processes"] for record in records if record["kind"] == "start"] == [count]
    assert records[-1]["tokens"] == STEPS * TINY["train.batch_tokens"]
    assert [launched.output(rank) for rank in range(count)] == ["runs/run\n", *[""] * (count - 1)]
    assert "anarcho" not in launched.errors(1)


def test_shards_in_bfloat16_train_as_replicas_do(begin, whole, tmp_path):
    """Weights that travel narrow are those that autocast makes; norms, residual stream and sums of gradients are as wide as before."""
    narrow = [*begin[:-1], "narrow", "--set", "train.precision=bfloat16"]
    replicas = Launched(tmp_path, [narrow] * 2)
    assert replicas.exit_codes() == [0, 0], replicas.errors()
    (tmp_path / "shards").mkdir()
    shards = Launched(tmp_path / "shards", [[*narrow, *FSDP]] * 2)
    assert shards.exit_codes() == [0, 0], shards.errors()
    assert_same_losses(run_of(shards, "narrow"), run_of(replicas, "narrow"), atol=1e-4)
    wide, found = losses(run_of(whole)), losses(run_of(shards, "narrow"))
    assert max(abs(wide[step] - found[step]) for step in found) > 1e-4, "as close as that only because it is bfloat16"


def test_a_run_goes_on_over_four_two_one_three_and_four_processes_in_any_strategy(begin, whole, tmp_path):
    rows = []
    for number, (arguments, count, machines) in enumerate(
        [([*begin, *FSDP], 4, 1), (AGAIN, 2, 1), ([*AGAIN, *HYBRID], 4, 2), (AGAIN, 1, 1), ([*AGAIN, *FSDP], 3, 1)]
    ):
        stop = 4 if number < 4 else None
        faults = {count - 1: ("SIGTERM", stop)} if stop else {}
        launched = Launched(tmp_path, [arguments] * count, faults=faults, machines=machines)
        assert launched.exit_codes() == [128 + signal.SIGTERM if stop else 0] * count, launched.errors()
        assert saved(launched)[-1] == min(STEPS, 4 * (number + 1))
        rows += launched.rows()
    assert rows == whole.rows()
    assert_same_losses(run_of(launched), run_of(whole), atol=1e-4)


def test_a_killed_process_ends_the_others_with_the_last_step_saved_where_that_is_whole(begin, whole, tmp_path):
    rows = []
    first = Launched(tmp_path, [begin] * 3, faults={0: ("SIGKILL", 3)})
    assert first.exit_codes() == [-signal.SIGKILL, LOST, LOST]
    assert saved(first) == [2], "saved by one that outlived the first"
    assert first.errors().count("the state after step 2 is saved") == 1
    assert "another process of this run was lost" in first.errors(1)
    assert "go on from the last checkpoint" in first.errors(2)
    rows += first.rows()

    second = Launched(tmp_path, [[*AGAIN, *FSDP, "--set", "train.checkpoint_every=3"]] * 2, faults={1: ("SIGKILL", 5)})
    assert second.exit_codes() == [LOST, -signal.SIGKILL]
    assert saved(second)[-1] == 6, "shards of a step are gone with a process"
    assert "this process saves nothing" in second.errors(0)
    rows += second.rows()[:4]

    last = Launched(tmp_path, [AGAIN] * 2)
    assert last.exit_codes() == [0, 0], last.errors()
    assert rows + last.rows() == whole.rows()
    assert losses(run_of(last))[STEPS] == pytest.approx(losses(run_of(whole))[STEPS], abs=1e-4)


def test_memory_that_runs_out_in_one_process_with_shards_makes_the_micro_batch_of_all_smaller(begin, whole, tmp_path):
    """Where the others can be told at once, else when all are started again, with the same losses."""
    arguments = [*begin, *FSDP, "--set", "train.checkpoint_every=2", "--set", "train.micro_batch=6"]
    first = Launched(tmp_path, [arguments] * 2, faults={0: ("block", 3), 1: ("update", 7)})
    assert first.exit_codes() == [LOST, LOST], first.errors()
    assert "ran out in the update of this process" in first.errors(1)
    assert "started again from the last checkpoint, 1 of 6 sequences go through the model at once" in first.errors(1)
    last = Launched(tmp_path, [AGAIN] * 2)
    assert last.exit_codes() == [0, 0], last.errors()
    sizes = [
        r["micro_batch_tokens"] for r in read_metrics(run_of(last) / "metrics.jsonl") if r.get("fault") == "memory"
    ]
    assert sizes == [3 * 32, 1 * 32]
    assert_same_losses(run_of(last), run_of(whole), atol=1e-4)


def test_processes_with_other_configurations_are_refused_before_anything_is_written(begin, tmp_path):
    launched = Launched(tmp_path, [begin, [*begin, "--set", "optim.lr=0.5"]])
    assert launched.exit_codes() == [2, 2]
    message = "the processes of this run do not agree on: the configuration (rank 0 has another value than rank 1)"
    assert launched.errors(0).count(message) == 1
    assert message not in launched.errors(1)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["sft", "preference"])
def test_tuning_over_two_processes_is_that_of_one(whole, tmp_path, command):
    chance = random.Random(1)
    asked = [f"say {i}" for i in range(60)]
    if command == "sft":
        rows = [
            {
                "messages": [
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": "yes " * chance.randint(1, 4)},
                ]
            }
            for text in asked
        ]
    else:
        rows = [
            {"prompt": text, "chosen": "yes " * chance.randint(1, 3), "rejected": "no " * chance.randint(1, 3)}
            for text in asked
        ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = ("train.precision", "train.log_every", "train.checkpoint_every", "train.eval_every")
    values = {key: TINY[key] for key in (*kept, "sample.max_new_tokens", "optim.ns_dtype")}
    values |= {"train.steps": STEPS, "train.epochs": "none", "train.batch_tokens": 256, "train.sequence_length": 32}
    values |= {"train.micro_batch": 2, "data.validation_fraction": 0.2, "monitor.tensorboard": "false"}
    arguments = [command, "--device", "cpu", "--from", run_of(whole), "--data", "rows.jsonl", *settings(values)]
    alone = Launched(tmp_path, [[*arguments, "--name", "one"]])
    assert alone.exit_codes() == [0], alone.errors()
    expected = alone.rows()
    for strategy in ("ddp", "fsdp"):
        both = Launched(tmp_path, [[*arguments, "--set", f"train.strategy={strategy}", "--name", strategy]] * 2)
        assert both.exit_codes() == [0, 0], both.errors()
        assert both.rows() == expected
        assert_same_losses(run_of(both, strategy), run_of(both, "one"), atol=1e-5)
