"""Saving and loading: nothing changes on the way, and a wrong file is refused with one sentence before anything is copied."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from anarcho_model.torch import GPT
from anarcho_model.weights import (
    DirectoryError,
    load_config,
    load_pretrained,
    load_stop_token_ids,
    load_weights,
    save_pretrained,
)
from safetensors.torch import load_file, save_file


def save(model: GPT, directory, **options):
    save_pretrained(model, directory, eos_token_id=1, pad_token_id=2, **options)
    return directory


def test_a_saved_model_is_loaded_bit_for_bit(model, tmp_path):
    loaded = load_pretrained(save(model, tmp_path))
    assert loaded.config == model.config == load_config(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_tied_weights_are_written_once_and_untied_ones_twice(build, tmp_path):
    assert "lm_head.weight" not in load_file(save(build(), tmp_path / "tied") / "model.safetensors")
    untied = load_file(save(build(tie_embeddings=False), tmp_path / "untied") / "model.safetensors")
    assert not torch.equal(untied["lm_head.weight"], untied["model.embed_tokens.weight"])


def test_weights_are_converted_when_written_and_when_read(build, tmp_path):
    model = build()
    save(model, tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for dtype, expected in ((None, torch.float32), (torch.float16, torch.float16)):
        weight = load_pretrained(tmp_path, dtype=dtype).head_weight
        assert weight.dtype == expected
        assert torch.equal(weight, model.head_weight.to(torch.bfloat16).to(expected))
    assert model.head_weight.dtype == torch.float32


def test_stop_ids_are_read_from_the_generation_settings_or_else_from_the_configuration(build, tmp_path):
    save_pretrained(build(), tmp_path, eos_token_id=(1, 6), pad_token_id=2)
    assert load_stop_token_ids(tmp_path) == (1, 6)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert load_stop_token_ids(tmp_path) == (9,)
    (tmp_path / "generation_config.json").unlink()
    assert load_stop_token_ids(tmp_path) == (1, 6)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(DirectoryError, match="eos_token_id is 'end', expected a token id"):
        load_stop_token_ids(tmp_path)


def test_a_redundant_output_layer_is_accepted_only_if_it_equals_the_embedding(build, tmp_path):
    path = save(build(), tmp_path) / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    assert torch.equal(load_pretrained(tmp_path).head_weight, tensors["model.embed_tokens.weight"])
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, path)
    with pytest.raises(DirectoryError, match=r"lm_head\.weight that differs from model\.embed_tokens\.weight"):
        load_pretrained(tmp_path)


def test_every_missing_unexpected_and_misshapen_tensor_is_named_and_nothing_is_copied(build, tmp_path):
    model = build()
    path = save(model, tmp_path) / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 2)
    tensors["surprise"] = torch.zeros(1)
    save_file(tensors, path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(DirectoryError) as caught:
        load_weights(model, tmp_path)
    for part in (
        str(path),
        "model.norm.weight is missing",
        "model.layers.1.mlp.up_proj.weight has shape (3, 2), expected (48, 32)",
        "surprise is unexpected",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: struct.pack("<Q", 2**60) + content[8:],
        lambda content: content[:8] + b"not json" + content[16:],
    ],
    ids=["truncated", "empty", "huge-header", "garbled-header"],
)
def test_a_damaged_weights_file_is_refused_by_name(build, tmp_path, damage):
    path = save(build(), tmp_path) / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DirectoryError, match=r"model\.safetensors is damaged"):
        load_pretrained(tmp_path)


def test_missing_files_and_broken_settings_are_named(build, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json not found, expected a model directory"):
        load_config(tmp_path)
    save(build(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors not found"):
        load_pretrained(tmp_path)
    for content, message in (
        ("{", "not valid JSON"),
        ("[]", "holds list, expected an object"),
        ("{}", "model_type is None"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(DirectoryError, match=rf"config\.json.*{message}"):
            load_config(tmp_path)


def split(directory, *, homes):
    """Part a model's file into several, with an index; `homes` says which file a tensor goes to."""
    whole = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    places = {name: homes(name) for name in whole}
    for home in set(places.values()):
        save_file({name: whole[name] for name in whole if places[name] == home}, directory / home)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_weights_in_several_files_load_like_those_in_one(build, tmp_path):
    model = build()
    save_pretrained(model, tmp_path, eos_token_id=1, pad_token_id=2, dtype=torch.bfloat16)
    expected = load_pretrained(tmp_path).state_dict()
    split(tmp_path, homes=lambda name: f"model-0000{1 + ('layers.1' in name)}-of-00002.safetensors")
    found = load_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_an_index_that_names_absent_or_foreign_files_is_refused_by_name(build, tmp_path):
    save_pretrained(build(), tmp_path, eos_token_id=1, pad_token_id=2)
    split(tmp_path, homes=lambda name: "a.safetensors" if "layers.1" in name else "b.safetensors")
    (tmp_path / "a.safetensors").rename(tmp_path / "c.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"a\.safetensors not found, expected it because .*index\.json names it"
    ):
        load_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for places, message in (
        ({"x": "../a.safetensors"}, "expected a file of the same directory"),
        ({}, "weight_map is"),
    ):
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(DirectoryError, match=message):
            load_pretrained(tmp_path)


def test_a_tensor_in_two_files_is_refused_by_name(build, tmp_path):
    save_pretrained(build(), tmp_path, eos_token_id=1, pad_token_id=2)
    split(tmp_path, homes=lambda name: "a.safetensors" if "layers.1" in name else "b.safetensors")
    norm = {"model.norm.weight": torch.ones(32)}
    save_file(load_file(tmp_path / "a.safetensors") | norm, tmp_path / "a.safetensors")
    with pytest.raises(DirectoryError, match=r"both hold model\.norm\.weight"):
        load_pretrained(tmp_path)
