"""Directories go from MLX to PyTorch, Transformers and mlx-lm and back without a changed bit; a wrong one is refused by name."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("mlx.core")

import mlx.core as mx
import numpy as np
import torch
from anarcho_model import weights as torch_side
from anarcho_model.weights_mlx import (
    DirectoryError,
    load_config,
    load_pretrained,
    load_stop_token_ids,
    load_weights,
    save_pretrained,
)
from mlx_models import converted, sample
from safetensors.torch import load_file, save_file


def save(model, directory, **options):
    save_pretrained(model, directory, eos_token_id=1, pad_token_id=2, **options)
    return directory


def test_a_model_comes_back_bit_for_bit_from_mlx_and_from_pytorch(model, tmp_path):
    ours = converted(model, tmp_path / "torch")
    save(ours, tmp_path / "mlx")
    assert load_config(tmp_path / "mlx") == model.config
    assert load_stop_token_ids(tmp_path / "mlx") == (1,)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "mlx" / name).read_text() == (tmp_path / "torch" / name).read_text()
    again = load_pretrained(tmp_path / "mlx").named_parameters()
    theirs = torch_side.load_pretrained(tmp_path / "mlx").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(theirs[name], tensor)
        assert np.array_equal(np.array(again[name]), tensor.numpy())
        assert np.array_equal(np.array(ours.named_parameters()[name]), tensor.numpy())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_converted_when_written_and_when_read(build, tmp_path, dtype):
    model = build()
    save(converted(model, tmp_path / "torch"), tmp_path, dtype=getattr(mx, dtype))
    expected = model.state_dict()["model.norm.weight"].to(getattr(torch, dtype))
    assert torch.equal(load_file(tmp_path / "model.safetensors")["model.norm.weight"], expected)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype
    widened, kept = load_pretrained(tmp_path), load_pretrained(tmp_path, dtype=getattr(mx, dtype))
    assert (widened.head_weight.dtype, widened.compute_dtype) == (mx.float32, mx.float32)
    assert kept.head_weight.dtype == kept.compute_dtype == getattr(mx, dtype)
    for loaded in (widened, kept):
        found = np.array(loaded.named_parameters()["model.norm.weight"].astype(mx.float32))
        assert np.array_equal(found, expected.float().numpy())
    tokens = mx.array(sample(kept)[0])
    assert mx.abs(kept(tokens).astype(mx.float32) - widened(tokens)).max().item() < 0.2


def test_transformers_and_mlx_lm_compute_the_same_logits_from_a_saved_directory(build, small_tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    mlx_lm = pytest.importorskip("mlx_lm")
    for options in ({"num_kv_heads": 2}, {"qk_norm": True, "tie_embeddings": False, "head_dim": 12}):
        ours = converted(build(**options), tmp_path / "torch")
        save(ours, small_tokenizer)
        tokens = sample(ours)[0]
        logits = np.array(ours(mx.array(tokens)))
        theirs = AutoModelForCausalLM.from_pretrained(small_tokenizer, dtype=torch.float32)
        assert np.abs(theirs(torch.tensor(tokens)).logits.detach().numpy() - logits).max() < 1e-4
        model, _ = mlx_lm.load(str(small_tokenizer))
        assert np.abs(np.array(model(mx.array(tokens))) - logits).max() < 1e-4


@pytest.fixture
def small_tokenizer(tmp_path):
    """A directory with the files of a tokenizer, which mlx-lm wants beside a model."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(67)}, unk_token="w0"))
    directory = tmp_path / "with-tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(directory)
    return directory


def test_every_wrong_tensor_is_named_and_nothing_is_copied(build, tmp_path):
    ours = converted(build(), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 2)
    tensors["surprise"] = torch.zeros(1)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, path)
    before = ours.named_parameters()
    with pytest.raises(DirectoryError) as caught:
        load_weights(ours, tmp_path)
    for part in (
        str(path),
        "model.norm.weight is missing",
        "model.layers.1.mlp.up_proj.weight has shape (3, 2), expected (48, 32)",
        "surprise is unexpected",
    ):
        assert part in str(caught.value)
    assert all(mx.array_equal(array, before[name]) for name, array in ours.named_parameters().items())


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: content[:8] + b"no" + content[10:],
    ],
    ids=["truncated", "empty", "garbled-header"],
)
def test_a_damaged_or_missing_file_is_refused_by_name(build, tmp_path, damage):
    converted(build(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DirectoryError, match=r"model\.safetensors is damaged"):
        load_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors not found"):
        load_pretrained(tmp_path)


def test_a_redundant_output_layer_is_accepted_only_if_it_equals_the_embedding(build, tmp_path):
    expected = converted(build(), tmp_path).head_weight
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    assert mx.array_equal(load_pretrained(tmp_path).head_weight, expected)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, path)
    with pytest.raises(DirectoryError, match=r"lm_head\.weight that differs from model\.embed_tokens\.weight"):
        load_pretrained(tmp_path)


def test_weights_in_several_files_load_like_those_in_one_and_a_tensor_in_two_is_refused(build, tmp_path):
    expected = converted(build(), tmp_path).named_parameters()
    whole = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    homes = {name: "b.safetensors" if "layers.1" in name else "a.safetensors" for name in whole}
    for home in ("a.safetensors", "b.safetensors"):
        save_file({name: whole[name] for name in whole if homes[name] == home}, tmp_path / home)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    found = load_pretrained(tmp_path).named_parameters()
    assert all(mx.array_equal(found[name], array) for name, array in expected.items())
    save_file(
        {**load_file(tmp_path / "b.safetensors"), "model.norm.weight": torch.ones(32)}, tmp_path / "b.safetensors"
    )
    with pytest.raises(DirectoryError, match=r"both hold model\.norm\.weight"):
        load_pretrained(tmp_path)
