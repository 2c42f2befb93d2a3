"""An adapter in MLX is PyTorch's: first weights, dropout, logits, gradients, merged weights and files; what is frozen has no gradient."""

from __future__ import annotations

import copy
import hashlib

import pytest

pytest.importorskip("mlx.core")

import mlx.core as mx
import numpy as np
import torch
from anarcho_model import LoraConfig, weights, weights_mlx
from anarcho_model.directory import DirectoryError
from anarcho_model.logprobs.mlx import chunked_logprobs
from anarcho_model.lora import mlx as lora_mlx
from anarcho_model.lora import peft, peft_mlx
from anarcho_model.lora import torch as lora_torch
from anarcho_model.lora.config import adapter_shapes
from mlx.utils import tree_flatten
from mlx_models import assert_same_gradients, converted, gradients

TOKENS = np.arange(60).reshape(3, 20) % 67
KEYS = np.array([7, 2**32 - 1, -1])


def pair(model, folder, *, learned: bool = True, **options):
    """The model with the same adapter in both frameworks, whose B is not zero if it has learned."""
    config = LoraConfig(**{"rank": 3, **options})
    theirs, ours = copy.deepcopy(model), converted(model, folder)
    lora_torch.add_adapter(theirs, config, seed=5)
    lora_mlx.add_adapter(ours, config, seed=5)
    if learned:
        with torch.no_grad():
            for number, parameter in enumerate(lora_torch.adapter_parameters(theirs).values()):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        peft.save_adapter(theirs, folder)
        peft_mlx.load_adapter(ours, folder)
    return theirs, ours


def test_the_first_weights_of_a_seed_are_pytorchs_to_the_last_bit_and_change_nothing(model, tmp_path):
    theirs, ours = pair(model, tmp_path, learned=False)
    expected, found = lora_torch.adapter_parameters(theirs), lora_mlx.adapter_parameters(ours)
    assert list(found) == list(expected) == list(adapter_shapes(model.config, LoraConfig(rank=3)))
    for name, parameter in expected.items():
        assert np.array_equal(np.array(found[name]), parameter.detach().numpy())
    name = "model.layers.1.mlp.up_proj.lora_A.weight"
    seed = int.from_bytes(hashlib.sha256(f"5/{name}".encode()).digest()[:8], "little") >> 1
    drawn = torch.rand(3, 32, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(expected[name], (2 * drawn - 1) / 32**0.5), "PyTorch's own generator"
    tokens = mx.array(TOKENS)
    assert mx.array_equal(ours(tokens), converted(model, tmp_path)(tokens))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"targets": ("q", "down"), "rank_stabilized": True}])
def test_log_probabilities_and_gradients_are_pytorchs_and_frozen_weights_have_none(
    model, options, checkpointing, tmp_path
):
    theirs, ours = pair(model, tmp_path, **options)
    ours.gradient_checkpointing = checkpointing

    def total(tokens: mx.array, keys: mx.array) -> mx.array:
        return ours.token_logprobs(tokens, tokens, dropout_keys=keys).sum()

    found, grads = gradients(ours, total, mx.array(TOKENS), mx.array(KEYS))
    ids = torch.from_numpy(TOKENS)
    expected = theirs.token_logprobs(ids, ids, dropout_keys=torch.from_numpy(KEYS)).sum()
    assert found == pytest.approx(expected.item(), rel=1e-6)
    names, parameters = zip(*lora_torch.adapter_parameters(theirs).items(), strict=True)
    wanted = dict(zip(names, (grad.numpy() for grad in torch.autograd.grad(expected, parameters)), strict=True))
    assert_same_gradients(grads, wanted, relative=5e-5)  # 2e-5 was seen, on one kind of processor.


def test_the_same_inputs_are_dropped_and_none_in_an_evaluation(small_model, tmp_path):
    theirs, ours = pair(small_model, tmp_path, dropout=0.25)
    for adapter, keys in ((theirs.adapter, torch.from_numpy(KEYS)), (ours.adapter, mx.array(KEYS))):
        adapter.begin(keys, length=20)
    dropped = np.array(ours.adapter.drop(mx.ones((3, 20, 32)), salt=2**32 - 3))
    assert np.array_equal(dropped.reshape(60, 32), theirs.adapter.drop(torch.ones(60, 32), salt=2**32 - 3).numpy())
    assert 0 < (dropped[:2] == 0).mean() < 0.5
    assert (dropped[2] == 1).all(), "a negative number drops nothing"
    tokens = mx.array(TOKENS)
    trained = ours.hidden_states(tokens, dropout_keys=mx.array(KEYS))
    assert not mx.allclose(trained[0], ours.hidden_states(tokens)[0], atol=1e-3)
    assert mx.array_equal(trained[2], ours.hidden_states(tokens)[2])


def test_merged_weights_have_the_logits_of_base_and_adapter_and_are_pytorchs(model, tmp_path):
    theirs, ours = pair(model, tmp_path, alpha=5.0)
    tokens = mx.array(TOKENS)
    expected = ours(tokens)
    weights_mlx.save_pretrained(ours, tmp_path / "mlx", eos_token_id=1, pad_token_id=2)
    weights.save_pretrained(theirs, tmp_path / "torch", eos_token_id=1, pad_token_id=2)
    found, wanted = (mx.load(str(tmp_path / name / "model.safetensors")) for name in ("mlx", "torch"))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_allclose(found[name], tensor, atol=1e-6)
    np.testing.assert_allclose(weights_mlx.load_pretrained(tmp_path / "mlx")(tokens), expected, atol=2e-5, rtol=1e-5)
    lora_mlx.merge_adapter(ours)
    np.testing.assert_allclose(ours(tokens), expected, atol=2e-5, rtol=1e-5)
    assert ours.adapter is None
    trained = dict(tree_flatten(ours.trainable_parameters()))
    assert set(trained) == set(ours.named_parameters()) == set(model.state_dict()), "all of it can be trained again"


def test_the_frozen_weights_can_be_loaded_under_an_adapter(small_model, build, tmp_path):
    _, ours = pair(small_model, tmp_path)
    other = build()
    other.init_weights(seed=9)
    _, loaded = pair(other, tmp_path / "other")
    weights_mlx.load_weights(loaded, tmp_path)
    peft_mlx.load_adapter(loaded, tmp_path)
    assert mx.array_equal(loaded(mx.array(TOKENS)), ours(mx.array(TOKENS)))


def test_both_write_the_same_files_of_an_adapter_and_one_that_does_not_fit_is_refused(small_model, tmp_path):
    theirs, ours = pair(small_model, tmp_path / "base", rank_stabilized=True, targets=("v", "gate"))
    peft.save_adapter(theirs, tmp_path / "torch")
    peft_mlx.save_adapter(ours, tmp_path / "mlx")
    settings = [(tmp_path / name / "adapter_config.json").read_bytes() for name in ("torch", "mlx")]
    assert settings[0] == settings[1]
    found, wanted = (mx.load(str(tmp_path / name / "adapter_model.safetensors")) for name in ("mlx", "torch"))
    assert found.keys() == wanted.keys() != set()
    assert all(mx.array_equal(found[name], wanted[name]) for name in wanted)
    _, fresh = pair(small_model, tmp_path / "fresh", learned=False, rank_stabilized=True, targets=("v", "gate"))
    peft_mlx.load_adapter(fresh, tmp_path / "torch")
    assert mx.array_equal(fresh(mx.array(TOKENS)), ours(mx.array(TOKENS)))
    _, other = pair(small_model, tmp_path / "other", rank=2)
    before = lora_mlx.adapter_parameters(other)
    with pytest.raises(DirectoryError, match=r"down_proj.lora_A.weight with the shape None, expected \(2, 48\)"):
        peft_mlx.load_adapter(other, tmp_path / "mlx")
    assert all(mx.array_equal(array, before[name]) for name, array in lora_mlx.adapter_parameters(other).items())
    with pytest.raises(FileNotFoundError, match="expected the weights of an adapter"):
        peft_mlx.load_adapter(other, tmp_path)
    (tmp_path / "mlx" / "adapter_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(DirectoryError, match="is damaged"):
        peft_mlx.load_adapter(other, tmp_path / "mlx")


def test_what_cannot_be_adapted_is_refused(small_model, tmp_path):
    _, ours = pair(small_model, tmp_path)
    with pytest.raises(ValueError, match="adapter already"):
        lora_mlx.add_adapter(ours, LoraConfig(rank=1), seed=0)
    plain = converted(small_model, tmp_path)
    with pytest.raises(ValueError, match="no adapter"):
        peft_mlx.save_adapter(plain, tmp_path)
    for rank, message in ((0, "expected at least 1"), (33, "lora.rank is 33, more than")):
        with pytest.raises(ValueError, match=message):
            lora_mlx.add_adapter(plain, LoraConfig(rank=rank), seed=0)


def test_a_frozen_output_layer_has_the_other_gradient_alone_over_chunks():
    hidden, weight = mx.random.normal((6, 8), key=mx.random.key(0)), mx.random.normal((11, 8), key=mx.random.key(1))
    targets = mx.arange(6)

    def both(frozen: bool) -> list[mx.array]:
        def total(hidden: mx.array, weight: mx.array) -> mx.array:
            options = {"compute_dtype": mx.float32, "chunk_bytes": 2 * 11 * 4, "frozen": frozen}
            return mx.square(chunked_logprobs(hidden, weight, targets, **options)).sum()

        return mx.grad(total, argnums=(0, 1))(hidden, weight)

    trained, frozen = both(False), both(True)
    assert mx.array_equal(trained[0], frozen[0])
    assert trained[1].any().item()
    assert not frozen[1].any().item()


@pytest.mark.skipif(not weights_mlx.Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_is_an_error_that_names_the_file(small_model, tmp_path):
    _, ours = pair(small_model, tmp_path)
    for file in ("model.safetensors", "adapter_model.safetensors"):
        (tmp_path / file).unlink()
        (tmp_path / file).symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"/model\.safetensors cannot be written"):
        weights_mlx.save_pretrained(ours, tmp_path, eos_token_id=1, pad_token_id=2)
    with pytest.raises(OSError, match=r"/adapter_model\.safetensors cannot be written"):
        peft_mlx.save_adapter(ours, tmp_path)
