"""From raw text to a model, in one command: what is left on disk, and what others can do with it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from anarcho_cli.config import load
from anarcho_cli.main import app
from anarcho_cli.models import find_model
from anarcho_cli.writing import Writer
from anarcho_model.generate.sampling import SamplingConfig
from anarcho_model.weights import load_pretrained
from anarcho_monitor import read_curve, read_metrics
from anarcho_tokenize import Tokenizer, TokenShards
from anarcho_train import CheckpointStore
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from .conftest import LIGHT, SMALL, settings


@pytest.fixture(scope="module")
def finished(anarcho, small_text, tmp_path_factory) -> tuple[Path, CompletedProcess]:
    """A folder, and what the command said that made a small run in it."""
    folder = tmp_path_factory.mktemp("finished")
    values = SMALL | {"data.validation_fraction": 0.02}
    options = ["--data", small_text, "--name", "chained", "--device", "cpu", *settings(values)]
    return folder, anarcho("pretrain", *options, cwd=folder)


@pytest.fixture(scope="module")
def finished_run(finished) -> Path:
    """A small run that nothing interrupted."""
    folder, _ = finished
    return folder / "runs" / "chained"


def test_a_run_leaves_everything_that_it_promises(finished_run):
    config = load(finished_run / "config.toml")
    assert config.train.steps == 6
    assert json.loads((finished_run / "environment.json").read_text())["packages"]["torch"]
    assert [info.step for info in CheckpointStore(finished_run / "checkpoints").list() if info.valid] == [4, 6]
    data = {part: TokenShards.open(finished_run / "data" / part) for part in ("train", "validation")}
    for shards in data.values():
        shards.verify()
    tokenizer = Tokenizer.load(finished_run / "tokenizer")
    assert {shards.tokenizer_sha256 for shards in data.values()} == {tokenizer.sha256}
    assert config.model.vocab_size == tokenizer.vocab_size == 512


def test_the_metrics_tell_the_run_and_tensorboard_agrees(finished_run):
    records = read_metrics(finished_run / "metrics.jsonl")
    kinds = [record["kind"] for record in records]
    assert kinds[0] == "start"
    assert kinds[-2:] == ["sample", "end"]
    losses = read_curve(finished_run / "metrics.jsonl", "train", "loss")
    assert [point.step for point in losses] == [1, 2, 3, 4, 5, 6]
    assert losses[0].value == pytest.approx(math.log(512), abs=0.2)
    assert losses[-1].value < losses[0].value
    train = next(record for record in records if record["kind"] == "train" and record["step"] == 6)
    assert {
        "tokens_per_second",
        "eta_seconds",
        "grad_norm",
        "process_bytes",
        "lr_matrices",
        "lr_embeddings",
    } <= train.keys()
    events = EventAccumulator(str(finished_run / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(
        [point.value for point in losses], rel=1e-6
    )
    assert "validation/bits_per_byte" in events.Tags()["scalars"]


def test_transformers_reads_a_checkpoint_as_it_is_and_agrees_on_logits_and_text(finished_run):
    directory = find_model(finished_run)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ours, our_tokenizer = load_pretrained(directory), Tokenizer.load(directory)
    prompt = "The whale said: “I go—down the 12 seas.”"
    ids = [our_tokenizer.eot_id, *our_tokenizer.encode(prompt)]
    assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == ids[1:]
    with torch.no_grad():
        torch.testing.assert_close(ours(torch.tensor([ids])), theirs(torch.tensor([ids])).logits, atol=1e-4, rtol=0)
    config = SamplingConfig(temperature=0.0, max_new_tokens=24)
    completion = Writer(ours, our_tokenizer).complete(prompt, config=config)
    generated = theirs.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :]
    assert tokenizer.decode(generated, skip_special_tokens=True) == completion.text


def test_the_command_writes_a_text_with_the_model_that_it_trained(finished_run):
    result = CliRunner().invoke(app, ["generate", str(finished_run), "The whale", "--seed", "1"])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()


def test_standard_output_is_the_run_directory_so_that_scripts_chain(anarcho, small_text, finished):
    folder, result = finished
    assert result.stdout == f"{Path('runs') / 'chained'}\n"
    assert "bits per byte" in result.stderr
    again = anarcho("pretrain", "--data", small_text, "--name", "chained", "--device", "cpu", cwd=folder, check=False)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    assert "Traceback" not in again.stderr


def test_a_text_that_cannot_be_used_leaves_no_run_behind(anarcho, tmp_path):
    (tmp_path / "short.jsonl").write_text('{"text": "too short"}\n{"text": "for this"}\n')
    options = ["--data", "short.jsonl", "--backend", LIGHT, "--device", "cpu", *settings(SMALL)]
    result = anarcho("pretrain", *options, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("anarcho: error: ")
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "runs").iterdir())
