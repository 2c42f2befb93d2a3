"""A run that goes on with a changed configuration: judged key by key against its checkpoint, with a table of what has changed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from anarcho_cli import disk_space
from anarcho_cli.config import SECTIONS, load, resolve, to_dict
from anarcho_cli.disk_space import checkpoint_bytes, checkpoints_at_once
from anarcho_cli.main import app
from anarcho_cli.resume_changes import ACCEPTED_FILE, Verdict, changes_between, verdict_of
from anarcho_monitor import read_metrics
from anarcho_train import CheckpointStore
from typer.testing import CliRunner

TINY = {
    "tokenizer.vocab_size": 300,
    "model.num_layers": 1,
    "model.dim": 16,
    "model.num_heads": 2,
    "model.hidden_dim": 32,
    "model.context_length": 16,
    "train.steps": 4,
    "train.batch_tokens": 64,
    "train.micro_batch": 4,
    "train.eval_every": 0,
    "train.checkpoint_every": 2,
    "train.precision": "float32",
    "optim.warmup_steps": 1,
    "sample.max_new_tokens": 1,
    "monitor.tensorboard": "false",
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, of which only two are done: its last checkpoint is taken away."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"The whale number {i} and the sea."}) + "\n" for i in range(300))
    )
    settings = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    arguments = ["pretrain", "--device", "cpu", "--data", folder / "text.jsonl", "--runs-dir", folder, "--name", "run"]
    result = CliRunner().invoke(app, [str(item) for item in [*arguments, *settings]])
    assert result.exit_code == 0, result.output
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000004")
    return folder / "run"


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return shutil.copytree(begun, tmp_path / "run")


def edit(run: Path, old: str, new: str) -> None:
    text = (run / "config.toml").read_text()
    assert text.count(f"\n{old}\n") == 1, old
    (run / "config.toml").write_text(text.replace(f"\n{old}\n", f"\n{new}\n"))


def last_step(run: Path) -> int:
    return CheckpointStore(run / "checkpoints").list()[-1].step


def test_a_safe_key_changes_without_a_word_more_than_a_note(anarcho, run: Path) -> None:
    edit(run, "log_every = 10", "log_every = 1")
    result = anarcho("pretrain", "--resume", run)
    assert result.exit_code == 0, result.output
    words = [line.split() for line in result.stderr.splitlines()]
    assert ["train.log_every", "10", "1", "safe"] in words
    (event,) = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "event"]
    assert event["changes"] == [{"key": "train.log_every", "old": 10, "new": 1, "verdict": "safe"}]
    assert event["step"] == 2
    state = CheckpointStore(run / "checkpoints").read_state(run / "checkpoints" / "step-00000004")
    assert state["settings"] == to_dict(load(run / "config.toml"))


def test_a_key_that_changes_what_is_learned_needs_the_flag_once(anarcho, run: Path) -> None:
    edit(run, "lr = 0.04", "lr = 0.02")
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file())
    result = anarcho("pretrain", "--resume", run)
    assert result.exit_code == 2
    assert "optim.lr (0.04 to 0.02) changes what the run learns from here on: add --allow-changes" in result.stderr
    assert ["optim.lr", "0.04", "0.02", "needs", "--allow-changes"] in [x.split() for x in result.stderr.splitlines()]
    after = sorted(
        (path, path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file() and path.name != ".lock"
    )
    assert after == [entry for entry in before if entry[0].name != ".lock"], "a refusal changes nothing"
    assert anarcho("pretrain", "--resume", run, "--allow-changes").exit_code == 0
    # As if it had been killed before its next checkpoint: what was allowed need not be allowed again.
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    assert anarcho("pretrain", "--resume", run).exit_code == 0
    assert last_step(run) == 4
    edit(run, "lr = 0.02", "lr = 0.01")
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    assert "--allow-changes" in anarcho("pretrain", "--resume", run).stderr, "another change is another question"


def test_a_forbidden_key_is_refused_with_and_without_the_flag(anarcho, run: Path) -> None:
    edit(run, "num_layers = 1", "num_layers = 2")
    edit(run, "log_every = 10", "log_every = 1")
    for flag in ([], ["--allow-changes"]):
        result = anarcho("pretrain", "--resume", run, *flag)
        assert result.exit_code == 2
        assert "model.num_layers (1 to 2) cannot change in a run that has begun" in result.stderr.splitlines()[-1]
        assert sum(line.endswith(" forbidden") for line in result.stderr.splitlines()) == 1
        assert sum(line.endswith(" safe") for line in result.stderr.splitlines()) == 1


def test_set_goes_with_resume_and_becomes_the_runs_own(anarcho, run: Path) -> None:
    assert "--allow-changes" in anarcho("pretrain", "--resume", run, "--set", "train.steps=6").stderr
    result = anarcho("pretrain", "--resume", run, "--set", "train.steps=6", "--allow-changes")
    assert result.exit_code == 0, result.output
    assert load(run / "config.toml").train.steps == last_step(run) == 6
    assert json.loads((run / ACCEPTED_FILE).read_text())
    assert anarcho("pretrain", "--resume", run).exit_code == 0
    assert "cannot change" in anarcho("pretrain", "--resume", run, "--set", "data.source=embedded").stderr


def test_the_batch_may_change_and_the_samples_go_on(anarcho, run: Path) -> None:
    options = ["--set", "train.batch_tokens=128", "--allow-changes"]
    assert anarcho("pretrain", "--resume", run, *options).exit_code == 0
    store = CheckpointStore(run / "checkpoints")
    assert store.read_state(run / "checkpoints" / "step-00000002")["samples"] == 8
    assert store.read_state(run / "checkpoints" / "step-00000004")["samples"] == 8 + 16


def test_a_checkpoint_that_kept_no_configuration_falls_back_to_the_hash(anarcho, run: Path) -> None:
    checkpoint = run / "checkpoints" / "step-00000002"
    state = json.loads((checkpoint / "state.json").read_text())
    del state["settings"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    data = (checkpoint / "state.json").read_bytes()
    manifest["files"]["state.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    original = (run / "config.toml").read_text()
    edit(run, "log_every = 10", "log_every = 1")
    assert "was made with another config" in anarcho("pretrain", "--resume", run, "--allow-changes").stderr
    (run / "config.toml").write_text(original)
    result = anarcho("pretrain", "--resume", run, "--set", "train.log_every=1")
    assert result.exit_code == 0, result.output
    assert "safe" in result.stderr


def test_another_tokenizer_is_refused_before_the_first_step(anarcho, begun: Path, run: Path) -> None:
    other = anarcho("tokenizer", "train", begun.parent / "text.jsonl", "--vocab-size", 295, "--out", run / "other")
    assert other.exit_code == 0, other.output
    shutil.copy(run / "other" / "tokenizer.model", run / "tokenizer" / "tokenizer.model")
    result = anarcho("pretrain", "--resume", run)
    assert result.exit_code == 2
    assert "tokenizer" in result.stderr
    assert last_step(run) == 2


def test_the_policy_of_the_configuration_is_the_runs(anarcho, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anarcho_model.torch import GPT

    with monkeypatch.context() as patch:
        logprobs = GPT.token_logprobs
        patch.setattr(GPT, "token_logprobs", lambda *args, **options: logprobs(*args, **options) * float("nan"))
        policy = ["--set", "recovery.non_finite=stop", "--allow-changes"]
        result = anarcho("pretrain", "--resume", run, *policy)
    assert result.exit_code == 2
    assert "step 3 stopped the run, as recovery.non_finite = 'stop' asks for: loss nan" in result.stderr
    assert last_step(run) == 3, "nothing is lost"
    event = [record for record in read_metrics(run / "metrics.jsonl") if record.get("fault")][-1]
    assert (event["fault"], event["first_sample"], event["last_sample"]) == ("non_finite", 8, 11)
    assert anarcho("pretrain", "--resume", run).exit_code == 0
    assert last_step(run) == 4


def test_a_damaged_shard_is_named_and_left_out_only_if_the_policy_says_so(anarcho, run: Path) -> None:
    shard = run / "data" / "train" / "shard-00000.bin"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    refusal = anarcho("pretrain", "--resume", run)
    assert refusal.exit_code == 2
    assert "the sha256 of shard-00000.bin is not the one in index.json" in refusal.stderr
    policy = ["--set", "data.damaged_shards=skip", "--allow-changes"]
    assert "data.max_bad_share allows" in anarcho("pretrain", "--resume", run, *policy).stderr, (
        "all of the text is lost"
    )
    result = anarcho("pretrain", "--resume", run, *policy, "--set", "data.max_bad_share=1.0")
    assert result.exit_code == 0, result.output
    events = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "event"]
    assert [event.get("fault") for event in events] == ["shard", None, "empty", "empty"]
    assert "shard-00000 is damaged and left out" in events[0]["message"]


def test_the_verdicts_of_what_people_change_most() -> None:
    config = resolve()
    verdicts = {
        Verdict.safe: ["train.log_every", "train.keep_last", "train.eval_every", "train.checkpoint_every"],
        Verdict.flag: ["optim.lr", "train.steps", "train.batch_tokens", "recovery.spikes", "train.grad_clip"],
        Verdict.forbidden: ["model.dim", "train.seed", "train.sequence_length", "data.source", "tokenizer.vocab_size"],
    }
    verdicts[Verdict.safe] += ["monitor.progress", "sample.prompt", "data.num_workers", "recovery.max_rollbacks"]
    verdicts[Verdict.forbidden] += ["optim.normuon", "lora.rank", "init.embedding_std", "data.shuffle_tokens"]
    for verdict, keys in verdicts.items():
        for key in keys:
            assert verdict_of(*key.split("."), config) is verdict, key
    stopping = resolve(overrides=["train.early_stopping_patience=2"])
    assert verdict_of("train", "eval_every", stopping) is Verdict.flag
    with_pairs = resolve(preset="preference")
    assert verdict_of("train", "micro_batch", with_pairs) is Verdict.forbidden


def test_a_key_that_nobody_has_thought_about_is_forbidden() -> None:
    for section in SECTIONS:
        if section not in ("monitor", "sample", "optim", "preference", "recovery"):
            assert verdict_of(section, "new_key", resolve()) is Verdict.forbidden


def test_every_changed_key_is_found_and_one_that_is_not_saved_had_its_default() -> None:
    config = resolve(overrides=["train.steps=9", "optim.lr=0.5"])
    saved: dict[str, Any] = to_dict(resolve())
    assert {change.key for change in changes_between(saved, config)} == {"train.steps", "optim.lr"}
    del saved["recovery"]
    saved["monitor"] = {}
    assert {change.key for change in changes_between(saved, config)} == {"train.steps", "optim.lr"}
    epochs = resolve(overrides=["train.epochs=2"])
    assert changes_between(to_dict(epochs), epochs) == []
    assert {change.key for change in changes_between(saved, epochs)} == {"train.steps", "train.epochs"}


def test_a_disk_without_room_for_the_checkpoints_is_refused_before_anything_is_written(
    refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve()
    needed = checkpoint_bytes(config) * 4
    assert checkpoints_at_once(config) == 4
    monkeypatch.setattr(disk_space, "free_bytes", lambda directory: needed - 1)
    message = refused("pretrain", "--device", "cpu", "--runs-dir", tmp_path, "--name", "full")
    assert "up to 4 checkpoints" in message
    assert "lower train.keep_last" in message
    assert list(tmp_path.iterdir()) == []


def test_the_forecast_of_a_checkpoint_is_near_its_size_on_disk(begun: Path) -> None:
    (info,) = CheckpointStore(begun / "checkpoints").list()
    forecast = checkpoint_bytes(load(begun / "config.toml"))
    assert 0.5 * info.bytes < forecast < 2 * info.bytes
    assert dataclasses.asdict(info)["planned"] is True
