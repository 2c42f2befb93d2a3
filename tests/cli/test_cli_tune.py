"""`anarcho sft` and `anarcho preference`: what is refused before anything is written, what comes from the base model, what is learned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a tokenizer, untrained."""
    pytest.importorskip("torch")
    from anarcho_tokenize import embedded_documents
    from bases import save_base

    shape = {"vocab_size": 400, "context_length": 64, "num_layers": 1, "dim": 32, "num_heads": 2, "hidden_dim": 48}
    return save_base(tmp_path_factory.mktemp("base"), [next(embedded_documents())], **shape)


def test_the_model_is_the_base_models_and_the_data_conversations(base: Path, anarcho) -> None:
    result = anarcho("sft", "--from", base, "--dry-run", "--json", "--set", "train.micro_batch=1")
    assert result.exit_code == 0, result.output
    config = json.loads(result.stdout)["config"]
    assert (config["model"]["dim"], config["model"]["hidden_dim"], config["tokenizer"]["vocab_size"]) == (32, 48, 400)
    assert (config["data"]["kind"], config["data"]["packing"], config["data"]["isolate_documents"]) == (
        "chat",
        "best-fit",
        True,
    )


def test_what_cannot_be_tuned_is_refused(base: Path, tmp_path: Path, refused) -> None:
    assert "--from" in refused("sft")
    assert "holds no model" in refused("sft", "--from", tmp_path)
    assert "absent.jsonl" in refused("sft", "--from", base, "--data", tmp_path / "absent.jsonl")
    assert "expected 'chat'" in refused("sft", "--from", base, "--set", "data.kind=text")
    assert "expected 'text'" in refused("pretrain", "--set", "data.kind=chat")
    assert "cannot go with --resume" in refused("sft", "--from", base, "--resume", tmp_path)
    (tmp_path / "text.txt").write_text("no conversation")
    assert "data.kind is 'chat'" in refused("sft", "--from", base, "--data", tmp_path / "text.txt")


def test_a_shape_that_the_base_model_does_not_have_is_refused_and_its_own_is_not(
    base: Path, tmp_path: Path, refused, anarcho
) -> None:
    place = ["--from", base, "--runs-dir", tmp_path, "--dry-run"]
    own = json.loads(anarcho("sft", *place, "--json").stdout)["config"]
    layers, words = own["model"]["num_layers"], own["tokenizer"]["vocab_size"]
    said = refused("sft", *place, "--set", f"model.num_layers={layers + 1}")
    assert f"--set: model.num_layers is {layers + 1}, but the model {base}" in said
    assert f"has {layers}, which stays" in said
    file = tmp_path / "words.toml"
    file.write_text(f"[tokenizer]\nvocab_size = {words + 1}\n[model]\nnum_layers = {layers}\n")
    assert f"tokenizer.vocab_size is {words + 1}" in refused("sft", *place, "--config", file)
    same = [f"model.num_layers={layers}", "model.num_kv_heads=none", f"tokenizer.vocab_size={words}"]
    anarcho("sft", *place, *(word for setting in same for word in ("--set", setting)))


def test_a_base_model_learns_the_answers_and_keeps_its_beginning(base: Path, tmp_path: Path, anarcho) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "whale"}]}
        for n in range(40)
    ]
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "train.steps": 30,
        "train.batch_tokens": 128,
        "train.eval_every": 0,
        "optim.lr": 0.02,
        "optim.adamw_lr": 0.02,
        "optim.embedding_lr": 0.05,
        "data.validation_fraction": 0.2,
        "sample.prompt": "7?",
        "sample.max_new_tokens": 8,
    }
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    result = anarcho(
        "sft", "--from", base, "--data", data, "--runs-dir", tmp_path / "runs", "--name", "a", *options, "--json"
    )
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["sample"] == "7?\nwhale"
    run = Path(summary["run_directory"])
    assert (run / "base" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert (run / "tokenizer" / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    saved = json.loads((Path(summary["checkpoint"]) / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [1, 6], "other programs stop at the end of a text and of an answer"


def test_preferences_are_learned_from_the_base_models_own_view(base: Path, tmp_path: Path, anarcho) -> None:
    rows = [{"prompt": f"{n}?", "chosen": "whale", "rejected": "ship"} for n in range(40)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "train.steps": 12,
        "train.batch_tokens": 512,
        "train.micro_batch": 4,
        "train.eval_every": 0,
        "optim.lr": 0.01,
        "optim.adamw_lr": 0.01,
        "data.validation_fraction": 0.3,
        "sample.max_new_tokens": 2,
    }
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    common = ["preference", "--from", base, "--data", data, "--runs-dir", tmp_path / "runs"]
    summary = json.loads(anarcho(*common, "--name", "dpo", *options, "--json").stdout)
    assert summary["validation_measures"]["accuracy"] == 1
    assert summary["validation_measures"]["margin"] > 0
    run = Path(summary["run_directory"])
    assert json.loads((run / "reference" / "reference.json").read_text())["complete"]
    first = next(line for line in (run / "metrics.jsonl").read_text().splitlines() if '"train"' in line)
    assert "kl" in json.loads(first)
    free = json.loads(anarcho(*common, "--name", "free", *options, "--set", "preference.loss=simpo", "--json").stdout)
    assert not (Path(free["run_directory"]) / "reference").exists(), "this loss needs none"


def conversations(folder: Path) -> Path:
    """Forty questions with one answer, as a file."""
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "whale"}]}
        for n in range(40)
    ]
    data = folder / "chat.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


ADAPTED = {
    "lora.rank": 8,
    "lora.alpha": 32,
    "lora.dropout": 0.1,
    "train.neftune_alpha": 1.0,
    "train.epochs": 20,
    "train.batch_tokens": 128,
    "train.eval_every": 0,
    "train.log_every": 1,
    "optim.adamw_lr": 0.05,
    "optim.warmup_steps": 2,
    "data.validation_fraction": 0.2,
    "sample.max_new_tokens": 8,
}


def test_pairs_that_do_not_fit_the_sequence_are_told_and_counted(base: Path, tmp_path: Path, anarcho) -> None:
    long = "sea " * 400
    rows = [{"prompt": f"{n}?", "chosen": "whale", "rejected": "ship"} for n in range(20)]
    rows += [{"prompt": f"{long}{n}?", "chosen": "whale", "rejected": "ship"} for n in range(5)]
    rows += [{"prompt": f"{n}!", "chosen": long, "rejected": "ship"} for n in range(3)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ("train.steps=1", "train.batch_tokens=256", "train.micro_batch=4", "data.validation_fraction=0")
    options = [part for setting in settings for part in ("--set", setting)]
    result = anarcho("preference", "--from", base, "--data", data, "--runs-dir", tmp_path, "--name", "long", *options)
    assert result.exit_code == 0, result.output
    assert "5 of 28 pairs of answers are left out, as an answer begins only after 64 tokens" in result.stderr
    assert "3 of 28 pairs of answers are cut at 64 tokens" in result.stderr
    start = json.loads((tmp_path / "long" / "metrics.jsonl").read_text().splitlines()[0])
    assert (start["pairs"], start["pairs_left_out"], start["pairs_cut"]) == (23, 5, 3)


def test_an_adapter_alone_learns_the_answers_and_the_checkpoint_is_a_whole_model(base, tmp_path, anarcho) -> None:
    import torch
    from anarcho_model.lora.peft import load_adapter
    from anarcho_model.lora.torch import add_adapter
    from anarcho_model.weights import load_pretrained

    options = [part for key, value in ADAPTED.items() for part in ("--set", f"{key}={value}")]
    common = ["sft", "--from", base, "--data", conversations(tmp_path), "--runs-dir", tmp_path / "runs", *options]
    plan = json.loads(anarcho(*common, "--dry-run", "--json").stdout)
    assert plan["trained_parameters"] == 8 * (4 * (32 + 32) + 3 * (32 + 48))
    assert plan["memory_bytes"]["gradients"] == 4 * plan["trained_parameters"]
    assert not (tmp_path / "runs").exists()
    result = anarcho(*common, "--name", "a", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["steps"] == plan["steps"] > 12
    checkpoint = Path(summary["checkpoint"])
    records = [json.loads(line) for line in (tmp_path / "runs" / "a" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.2, "the base has learned nothing, and its embeddings are frozen"
    assert "lr_adapter" in next(record for record in records if record["kind"] == "train")
    tokens = torch.arange(40)[None]
    model = load_pretrained(base)
    before = model(tokens)
    from anarcho_cli.config import load

    add_adapter(model, load(tmp_path / "runs" / "a" / "config.toml").lora, seed=1)
    load_adapter(model, checkpoint / "adapter")
    merged = load_pretrained(checkpoint)
    torch.testing.assert_close(merged(tokens), model(tokens), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(merged(tokens), before, atol=1e-2)
    frozen = "model.embed_tokens.weight"
    assert torch.equal(merged.state_dict()[frozen], load_pretrained(base).state_dict()[frozen])
    assert anarcho("generate", tmp_path / "runs" / "a", "1?", "--max-new-tokens", "2").exit_code == 0


def test_what_cannot_be_adapted_or_counted_is_refused(base: Path, tmp_path: Path, refused) -> None:
    tune = ("sft", "--from", base)
    assert "lora.rank is 64, more than" in refused(*tune, "--set", "lora.rank=64")
    assert "begins without a model to adapt" in refused("pretrain", "--set", "lora.rank=4")
    assert "lora.targets" in refused(*tune, "--set", 'lora.targets=["head"]')
    assert "streamed" in refused(*tune, "--set", "train.epochs=2", "--set", "data.streaming=true")
    both = ("--set", "train.epochs=2", "--set", "train.steps=5")
    assert "both train.steps and train.epochs" in refused(*tune, *both)
    preference = ("preference", "--from", base, "--set", "train.neftune_alpha=5.0")
    assert "tuning on conversations" in refused(*preference)


def test_of_steps_and_epochs_the_later_layer_counts_and_is_written_alone(tmp_path: Path) -> None:
    from anarcho_cli.config import dumps, loads, resolve

    epochs = resolve(preset="sft", overrides=["train.epochs=2"])
    assert epochs.train.epochs == 2
    assert "\nsteps" not in dumps(epochs)
    assert loads(dumps(epochs), origin="run") == epochs
    (tmp_path / "my.toml").write_text("[train]\nepochs = 2\nmicro_batch = 1\n")
    steps = resolve(preset="sft", file=tmp_path / "my.toml", overrides=["train.steps=9"])
    assert (steps.train.epochs, steps.train.steps) == (None, 9)
    assert loads(dumps(steps), origin="run") == steps
    assert resolve(preset="sft", file=tmp_path / "my.toml").train.epochs == 2
