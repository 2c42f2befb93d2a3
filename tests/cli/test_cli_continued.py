"""`anarcho pretrain --from`: a model that has been trained goes on with other text, with its own shape, tokenizer and weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TEXT = "The sea was calm and the whale swam on. " * 400


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a tokenizer, untrained."""
    pytest.importorskip("torch")
    from bases import save_base

    shape = {"vocab_size": 300, "context_length": 32, "num_layers": 1, "dim": 32, "num_heads": 2, "hidden_dim": 48}
    return save_base(tmp_path_factory.mktemp("base"), [TEXT], seed=3, **shape)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def test_shape_and_vocabulary_are_the_models_and_the_preset_is_for_going_on(base, text, anarcho) -> None:
    options = ["--data", text, "--dry-run", "--json", "--set", "train.micro_batch=1"]
    config = json.loads(anarcho("pretrain", "--from", base, *options).stdout)["config"]
    assert (config["model"]["dim"], config["model"]["hidden_dim"], config["tokenizer"]["vocab_size"]) == (32, 48, 300)
    assert config["optim"]["lr"] == 0.001
    chosen = json.loads(
        anarcho(
            "pretrain", "--from", base, "--preset", "small-15m", *options, "--set", "train.sequence_length=32"
        ).stdout
    )
    assert (chosen["config"]["model"]["dim"], chosen["config"]["train"]["steps"]) == (32, 6000)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_it_begins_with_the_models_weights_and_tokenizer(backend, base, text, tmp_path, anarcho) -> None:
    pytest.importorskip("mlx.core" if backend == "mlx" else "torch")
    from safetensors.numpy import load_file

    settings = {
        "steps": 2,
        "batch_tokens": 64,
        "micro_batch": 2,
        "eval_every": 0,
        "precision": "float32",
        "compile": "off",
    }
    rates = {"optim.lr": 1e-7, "optim.adamw_lr": 1e-7, "optim.embedding_lr": 1e-7}
    given = {f"train.{key}": value for key, value in settings.items()} | rates | {"data.validation_fraction": 0.1}
    options = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
    result = anarcho(
        *(
            "pretrain",
            "--from",
            base,
            "--data",
            text,
            "--runs-dir",
            tmp_path / "runs",
            "--name",
            "on",
            "--backend",
            backend,
        ),
        *("--device", "cpu", *options, "--json"),
    )
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    before, after = (load_file(Path(place) / "model.safetensors") for place in (base, summary["checkpoint"]))
    assert before.keys() == after.keys()
    assert all(abs(after[name] - before[name]).max() < 1e-5 for name in before)
    assert any((after[name] != before[name]).any() for name in before), "it was trained"
    assert (tmp_path / "runs/on/tokenizer/tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()


def test_what_cannot_be_continued_is_refused(base, text, tmp_path, refused) -> None:
    assert "holds no model" in refused("pretrain", "--from", tmp_path, "--data", text)
    assert "has its own" in refused("pretrain", "--from", base, "--tokenizer", base, "--data", text)
    assert "cannot go with --resume" in refused("pretrain", "--from", base, "--resume", tmp_path)
    assert "expected 'text'" in refused("pretrain", "--from", base, "--set", "data.kind=chat")
