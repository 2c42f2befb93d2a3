"""`anarcho import` and `anarcho export`: a model comes back from every form as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from anarcho_model import InitConfig, ModelConfig
from anarcho_model.torch import GPT
from anarcho_model.weights import load_config, load_pretrained, load_stop_token_ids, save_pretrained
from anarcho_monitor import MetricsLog
from anarcho_tokenize import TokenizerConfig, load_tokenizer, train_tokenizer
from anarcho_tokenize.symbols import END
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "the whale and the sea, the ship."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with its tokenizer, whose vocabulary is smaller than the model's."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([TEXT * 100], config=TokenizerConfig(vocab_size=285))
    tokenizer.save(directory)
    network = GPT(ModelConfig(vocab_size=288, context_length=32, num_layers=1, dim=32, num_heads=2, num_kv_heads=1))
    network.init_weights(seed=0, init=InitConfig(zero_residual_outputs=False))
    save_pretrained(network, directory, eos_token_id=tokenizer.eot_id, pad_token_id=tokenizer.pad_id)
    return directory


def same(one: Path, other: Path) -> bool:
    first, second = load_pretrained(one).state_dict(), load_pretrained(other).state_dict()
    return load_config(one) == load_config(other) and all(torch.equal(first[name], second[name]) for name in first)


def test_a_directory_comes_back_from_gguf_with_its_tokenizer(model: Path, anarcho, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    exported = anarcho("export", model, "--to", "gguf", "--type", "f32", "--out", tmp_path / "x.gguf")
    assert exported.exit_code == 0, exported.output
    assert "U+2581" in exported.stderr, "what llama.cpp does otherwise is said"
    imported = anarcho("import", tmp_path / "x.gguf", "--out", tmp_path / "again", "--json")
    assert imported.exit_code == 0, imported.output
    assert json.loads(imported.stdout)["vocab_size"] == 288
    assert same(model, tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").encode(TEXT) == load_tokenizer(model).encode(TEXT)
    assert load_stop_token_ids(tmp_path / "again") == (*load_stop_token_ids(model), 6)


@pytest.mark.parametrize("form", ["hf", "mlx"])
def test_a_directory_is_exported_with_a_card_and_read_by_transformers(form, model, anarcho, tmp_path: Path) -> None:
    exported = anarcho("export", model, "--to", form, "--out", tmp_path / "small", "--license", "mit")
    assert exported.stdout == f"{tmp_path / 'small'}\n", exported.output
    assert same(model, tmp_path / "small")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    tokenizer, their_tokenizer = load_tokenizer(model), AutoTokenizer.from_pretrained(tmp_path / "small")
    assert their_tokenizer.encode(TEXT) == tokenizer.encode(TEXT)
    assert theirs.generation_config.eos_token_id == [tokenizer.eot_id, tokenizer.special_tokens[END]]
    card = (tmp_path / "small" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name:")
    assert 'license: "mit"' in card
    assert "# small" in card
    (line,) = (line for line in card.splitlines() if line.startswith("tokenizer("))
    prompt = eval(line, {"tokenizer": their_tokenizer, "prompt": TEXT})["input_ids"]
    assert prompt.tolist() == [[tokenizer.eot_id, *tokenizer.encode(TEXT)]], "as anarcho generate has it"
    assert not list(tmp_path.glob(".*.partial"))


def test_half_precision_is_written_and_kept_by_an_import(model: Path, anarcho, tmp_path: Path) -> None:
    anarcho("export", model, "--to", "hf", "--type", "bfloat16", "--out", tmp_path / "half")
    anarcho("import", tmp_path / "half", "--out", tmp_path / "kept")
    anarcho("import", tmp_path / "half", "--out", tmp_path / "wide", "--dtype", "float32")
    kinds = {
        name: json.loads((tmp_path / name / "config.json").read_text())["torch_dtype"] for name in ("kept", "wide")
    }
    assert kinds == {"kept": "bfloat16", "wide": "float32"}
    assert same(tmp_path / "kept", tmp_path / "wide")


def test_a_foreign_vocabulary_grows_by_rows_that_change_no_other_token(model: Path, anarcho, tmp_path: Path) -> None:
    small = GPT(ModelConfig(vocab_size=280, context_length=32, num_layers=1, dim=32, num_heads=2))
    small.init_weights(seed=0)
    save_pretrained(small, tmp_path / "given", eos_token_id=1, pad_token_id=2)
    load_tokenizer(model).save(tmp_path / "given")
    assert anarcho("import", tmp_path / "given", "--out", tmp_path / "out").exit_code == 0
    grown = load_pretrained(tmp_path / "out")
    tokens = torch.arange(20)[None]
    assert grown.config.vocab_size == 285
    torch.testing.assert_close(grown(tokens)[..., :280], small(tokens))


def test_the_card_of_a_run_names_its_data_and_figures(model: Path, anarcho, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text('[data]\nsource = "hf://some/corpus"\n[train]\nsteps = 3\nbatch_tokens = 4096\n')
    log = MetricsLog(run / "metrics.jsonl", run="run")
    log.write("start", step=0, tokens=0, device="cpu", precision="float32")
    log.write("validation", step=3, tokens=12288, loss=1.25, bits_per_byte=0.5)
    log.close()
    model.rename(run / "model")
    try:
        assert anarcho("export", run / "model", "--to", "hf", "--out", tmp_path / "out").exit_code == 0
    finally:
        (run / "model").rename(model)
    card = (tmp_path / "out" / "README.md").read_text()
    for expected in (
        'datasets: ["some/corpus"]',
        "| Tokens | 12,288 |",
        "| Loss | 1.2500 |",
        "| Bits per byte | 0.5000 |",
    ):
        assert expected in card
    assert "license:" not in card
    assert "Not stated." in card


def test_what_is_taken_absent_or_unknown_is_refused(model: Path, refused, tmp_path: Path) -> None:
    assert "expected a Hugging Face directory or a GGUF file" in refused(
        "import", tmp_path / "x", "--out", tmp_path / "y"
    )
    assert "exists already" in refused("import", model, "--out", tmp_path)
    small = refused("export", model, "--to", "gguf", "--type", "q4_k_m", "--out", tmp_path / "z")
    assert "q4_1, q4_0" in small
    assert "llama-quantize" in small
    assert "bfloat16" in refused("export", model, "--to", "hf", "--type", "q8_0", "--out", tmp_path / "z")
    assert "exists already" in refused("export", model, "--to", "hf", "--out", tmp_path)
    assert "config.json not found" in refused("import", tmp_path, "--out", tmp_path / "y")
    assert not list(tmp_path.iterdir())
