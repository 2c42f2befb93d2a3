"""Training on shards that `anarcho data prepare` has made: the same run as on the text itself."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from anarcho_cli.main import app
from anarcho_train import CheckpointStore
from typer.testing import CliRunner

TINY = {
    "model.num_layers": 1,
    "model.dim": 16,
    "model.num_heads": 2,
    "model.hidden_dim": 32,
    "model.context_length": 16,
    "train.steps": 3,
    "train.batch_tokens": 64,
    "train.micro_batch": 4,
    "train.eval_every": 0,
    "train.precision": "float32",
    "optim.warmup_steps": 1,
    "sample.max_new_tokens": 1,
    "monitor.tensorboard": "false",
}


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(item) for item in arguments])


def pretrain(folder: Path, name: str, *arguments: object):
    settings = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    return invoke("pretrain", "--device", "cpu", "--runs-dir", folder, "--name", name, *settings, *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a tokenizer, and the shards that they make."""
    folder = tmp_path_factory.mktemp("prepared")
    lines = [json.dumps({"text": f"The whale number {i} and the sea."}) for i in range(300)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    text, tokenizer = folder / "text.jsonl", folder / "tokenizer"
    made = invoke("tokenizer", "train", text, "--out", tokenizer, "--set", "tokenizer.vocab_size=300")
    assert made.exit_code == 0, made.output
    made = invoke("data", "prepare", text, "--tokenizer", tokenizer, "--out", folder / "shards")
    assert made.exit_code == 0, made.output
    return folder


def weights(run: Path) -> str:
    (checkpoint,) = CheckpointStore(run / "checkpoints").list()
    return hashlib.sha256((checkpoint.path / "model.safetensors").read_bytes()).hexdigest()


def test_a_run_on_prepared_shards_is_the_run_on_their_text_and_copies_nothing(folder, tmp_path):
    tokenizer = ("--tokenizer", folder / "tokenizer")
    for name, data in (("text", folder / "text.jsonl"), ("shards", folder / "shards")):
        result = pretrain(tmp_path, name, "--data", data, *tokenizer)
        assert result.exit_code == 0, result.output
    assert weights(tmp_path / "shards") == weights(tmp_path / "text")
    assert not (tmp_path / "shards" / "data").exists()
    resumed = invoke("pretrain", "--resume", tmp_path / "shards", "--set", "train.steps=4", "--allow-changes")
    assert resumed.exit_code == 0, resumed.output


def test_what_does_not_fit_is_refused_in_a_sentence_and_leaves_no_run(folder, tmp_path):
    other = tmp_path / "other"
    made = invoke("tokenizer", "train", folder / "text.jsonl", "--out", other, "--set", "tokenizer.vocab_size=310")
    assert made.exit_code == 0, made.output
    shards, tokenizer = folder / "shards", ("--tokenizer", folder / "tokenizer")
    unfinished = shutil.copytree(shards, tmp_path / "unfinished")
    index = json.loads((unfinished / "train" / "index.json").read_text())
    (unfinished / "train" / "index.json").write_text(json.dumps({**index, "complete": False}))
    for arguments, expected in (
        (
            ("--data", shards),
            "holds tokens, from which no tokenizer can be trained; give the one that made them as --tokenizer",
        ),
        (("--data", shards, "--tokenizer", other), "was made by another tokenizer than the run's"),
        (("--data", shards, *tokenizer, "--set", "data.streaming=true"), "data.streaming is true, but"),
        (("--data", unfinished, *tokenizer), "is not complete: its preparation was interrupted"),
    ):
        result = pretrain(tmp_path, "run", *arguments)
        assert result.exit_code == 2, result.output
        assert expected in " ".join(result.output.split())
        assert not (tmp_path / "run").exists()
