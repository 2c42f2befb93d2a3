"""`anarcho import` takes over what transformers saves: equal logits for each form of a directory, one sentence for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from anarcho_model.weights import load_config, load_pretrained, load_stop_token_ids
from anarcho_tokenize import TokenizerConfig, load_tokenizer, train_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

SHAPE = {
    "vocab_size": 288,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "llama, tied": (LlamaConfig(**SHAPE, tie_word_embeddings=True), {}),
    "llama, untied, sharded": (LlamaConfig(**SHAPE, tie_word_embeddings=False), {"max_shard_size": "40KB"}),
    "llama, stretched": (LlamaConfig(**SHAPE, rope_parameters=LLAMA3), {}),
    "qwen3, tied, wide heads": (Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True), {}),
    "qwen3, untied, sharded": (Qwen3Config(**SHAPE, head_dim=16), {"max_shard_size": "40KB"}),
}


def made(config, directory: Path, *, dtype: torch.dtype = torch.float32, **options):
    """A directory with random weights and a tokenizer, and its model in float32."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    network.save_pretrained(directory, **options)
    train_tokenizer(["the whale and the sea, the ship. " * 100], config=TokenizerConfig(vocab_size=285)).save(directory)
    return network.float()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, dtype: torch.dtype, anarcho, tmp_path: Path) -> None:
    config, options = CASES[case]
    theirs = made(config, tmp_path / "theirs", dtype=dtype, **options)
    sharded = len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert sharded == ("sharded" in case)
    imported = anarcho("import", tmp_path / "theirs", "--out", tmp_path / "ours", "--json")
    assert imported.exit_code == 0, imported.output
    assert json.loads(imported.stdout)["architecture"].lower() == config.model_type
    tokens = torch.arange(60)[None] + 7
    ours = load_pretrained(tmp_path / "ours")
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-3)
    assert load_stop_token_ids(tmp_path / "ours")[0] == 1
    assert load_tokenizer(tmp_path / "ours").vocab_size <= load_config(tmp_path / "ours").vocab_size
    kind = json.loads((tmp_path / "ours" / "config.json").read_text())["torch_dtype"]
    assert kind == str(dtype).removeprefix("torch.")


def change(file: str, **values: object):
    """A step that sets keys of a JSON file."""

    def apply(directory: Path) -> None:
        path = directory / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
DAMAGES = {
    "another architecture": (change("config.json", model_type="mistral"), "model_type is 'mistral', expected one of"),
    "another stretching": (change("config.json", rope_parameters=YARN), "rope_type is 'yarn'"),
    "biases": (change("config.json", attention_bias=True), "attention_bias is True"),
    "quantised": (change("config.json", quantization_config={"bits": 4}), "quantization_config is {'bits': 4}"),
    "another width": (change("config.json", intermediate_size=64), "has shape"),
    "one more layer": (change("config.json", num_hidden_layers=3), "model.layers.2"),
    "no shape": (change("config.json", hidden_size=None), "hidden_size missing"),
    "no JSON": (lambda directory: (directory / "config.json").write_text("{"), "config.json is not valid JSON"),
    "no configuration": (lambda directory: (directory / "config.json").unlink(), "config.json not found"),
    "no weights": (lambda directory: (directory / "model.safetensors").unlink(), "model.safetensors not found"),
    "cut weights": (
        lambda directory: (directory / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{"),
        "model.safetensors",
    ),
    "no tokenizer": (lambda directory: (directory / "tokenizer.model").write_bytes(b"x"), "tokenizer.model"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("good")
    made(LlamaConfig(**SHAPE), directory)
    return directory


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_directory_gives_one_sentence_and_leaves_nothing(damage, good, refused, tmp_path: Path) -> None:
    import shutil

    apply, message = DAMAGES[damage]
    shutil.copytree(good, tmp_path / "bad")
    apply(tmp_path / "bad")
    assert message in refused("import", tmp_path / "bad", "--out", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"bad"}


def test_pickled_weights_are_refused(good: Path, refused, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(good, tmp_path / "bad")
    (tmp_path / "bad" / "model.safetensors").rename(tmp_path / "bad" / "pytorch_model.bin")
    assert "model.safetensors not found" in refused("import", tmp_path / "bad", "--out", tmp_path / "out")
