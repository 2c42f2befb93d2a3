"""An adapter begins as nothing, alone is trained, is part of what is saved, and drops the same inputs however rows are split."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from anarcho_model import LoraConfig, ModelConfig
from anarcho_model.footprint import training_memory
from anarcho_model.lora.config import adapter_shapes
from anarcho_model.lora.peft import load_adapter, save_adapter
from anarcho_model.lora.torch import adapter_parameters, add_adapter, merge_adapter
from anarcho_model.torch import GPT
from anarcho_model.weights import DirectoryError, load_pretrained, load_weights, save_pretrained

TOKENS = torch.arange(60).reshape(3, 20) % 67


def adapted(model: GPT, *, learned: bool = True, **options: object) -> GPT:
    """A copy of the model with an adapter, whose B is not zero if it has learned."""
    tuned = copy.deepcopy(model)
    add_adapter(tuned, LoraConfig(**{"rank": 3, **options}), seed=5)
    if learned:
        with torch.no_grad():
            for number, parameter in enumerate(adapter_parameters(tuned).values()):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return tuned


def test_a_new_adapter_changes_nothing_and_one_that_has_learned_does(model):
    assert torch.equal(adapted(model, learned=False)(TOKENS), model(TOKENS))
    assert not torch.allclose(adapted(model)(TOKENS), model(TOKENS), atol=1e-2)


@pytest.mark.parametrize("options", [{}, {"rank_stabilized": True, "alpha": 4.0}, {"targets": ("q", "down")}])
def test_merged_weights_have_the_logits_of_base_and_adapter(model, options, tmp_path):
    tuned = adapted(model, **options)
    expected = tuned(TOKENS)
    save_pretrained(tuned, tmp_path, eos_token_id=1, pad_token_id=2)
    torch.testing.assert_close(load_pretrained(tmp_path)(TOKENS), expected, atol=2e-5, rtol=1e-5)
    merge_adapter(tuned)
    torch.testing.assert_close(tuned(TOKENS), expected, atol=2e-5, rtol=1e-5)
    assert tuned.adapter is None
    assert all(parameter.requires_grad for parameter in tuned.parameters())
    assert list(tuned.state_dict()) == list(model.state_dict())


def test_the_scale_is_alpha_over_the_rank_or_over_its_root(small_model):
    tuned = adapted(small_model, rank=4, alpha=6.0)
    layer = tuned.model.layers[0].mlp.up_proj
    product = layer.lora_B.weight @ layer.lora_A.weight
    torch.testing.assert_close(layer.merged_weight() - layer.weight, 1.5 * product, atol=1e-6, rtol=1e-5)
    assert LoraConfig(rank=4, alpha=6.0, rank_stabilized=True).scale == 3.0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_adapter_has_gradients(small_model, checkpointing):
    tuned = adapted(small_model, learned=False, targets=("v", "gate"))
    tuned.gradient_checkpointing = checkpointing
    tuned.token_logprobs(TOKENS, TOKENS).sum().backward()
    with_gradient = {name: p.shape for name, p in tuned.named_parameters() if p.grad is not None}
    assert with_gradient == adapter_shapes(tuned.config, tuned.adapter.config)
    assert all(
        bool(p.grad.any()) is name.endswith("lora_B.weight") for name, p in tuned.named_parameters() if p.requires_grad
    )


def test_an_adapter_is_read_back_exactly_and_one_that_does_not_fit_is_refused(small_model, tmp_path):
    tuned = adapted(small_model)
    save_adapter(tuned, tmp_path)
    again = adapted(small_model, learned=False)
    load_adapter(again, tmp_path)
    assert torch.equal(again(TOKENS), tuned(TOKENS))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 3, 16.0)
    assert settings["target_modules"][0] == "q_proj"
    with pytest.raises(DirectoryError, match=r"lora_A.weight with the shape \(3, 48\), expected \(2, 48\)"):
        load_adapter(adapted(small_model, rank=2), tmp_path)
    with pytest.raises(ValueError, match="no adapter"):
        save_adapter(small_model, tmp_path)
    with pytest.raises(ValueError, match="adapter already"):
        add_adapter(tuned, LoraConfig(rank=1), seed=0)


def test_the_frozen_weights_can_be_loaded_under_an_adapter(small_model, build, tmp_path):
    save_pretrained(small_model, tmp_path, eos_token_id=1, pad_token_id=2)
    other = build()
    other.init_weights(seed=9)
    other = adapted(other)
    load_weights(other, tmp_path)
    merged = adapted(small_model)
    assert torch.equal(other(TOKENS), merged(TOKENS))


def test_dropout_depends_on_the_rows_number_alone_and_leaves_out_its_share(small_model):
    tuned = adapted(small_model, dropout=0.25)
    keys = torch.tensor([7, 123456, 7])
    tokens = TOKENS[:1].expand(3, -1)
    together = tuned.hidden_states(tokens, dropout_keys=keys)
    assert torch.equal(together[0], together[2])
    assert not torch.allclose(together[0], together[1], atol=1e-3)
    alone = torch.cat([tuned.hidden_states(tokens[i : i + 1], dropout_keys=keys[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)
    off = tuned.hidden_states(tokens, dropout_keys=torch.full((3,), -1))
    assert torch.equal(off, tuned.hidden_states(tokens))
    tuned.adapter.begin(torch.arange(50) * 7919, length=20)
    kept = tuned.adapter.drop(torch.ones(1000, 32), salt=99)
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (kept == 0).float().mean() == pytest.approx(0.25, abs=0.01)
    assert (kept == 0).float().mean(0).std() < 0.03, "no input is favoured"
    assert (kept == 0).float().mean(1).std() < 0.1, "no token is favoured"
    other = tuned.adapter.drop(torch.ones(1000, 32), salt=100)
    assert ((kept == 0) & (other == 0)).float().mean() == pytest.approx(0.25**2, abs=0.01), "layers are independent"


def test_recomputed_and_kept_activations_give_the_same_gradients_with_dropout(small_model):
    gradients = []
    for checkpointing in (False, True):
        tuned = adapted(small_model, dropout=0.5)
        tuned.gradient_checkpointing = checkpointing
        tuned.token_logprobs(TOKENS, TOKENS, dropout_keys=torch.tensor([1, 2, 3])).sum().backward()
        gradients.append([p.grad for p in tuned.parameters() if p.requires_grad])
    for kept, again in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, again, atol=1e-5, rtol=1e-5)


def test_noise_is_added_to_the_embeddings(small_model):
    noise = 0.1 * torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(0))
    moved = copy.deepcopy(small_model)
    table = moved.model.embed_tokens.weight
    with torch.no_grad():
        expected = table[TOKENS] + noise
    seen = []
    handle = moved.model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    moved.token_logprobs(TOKENS, TOKENS, embedding_noise=noise)
    handle.remove()
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", [{}, {"targets": ("q", "v")}, {"dropout": 0.1}], ids=["all", "few", "dropout"])
def test_the_forecast_of_activations_is_within_six_percent_of_what_autograd_saves(options, autocast, checkpointing):
    shape = {"vocab_size": 300, "context_length": 64, "num_layers": 3, "dim": 64, "num_heads": 4, "hidden_dim": 160}
    model = GPT(ModelConfig(**shape))
    model.init_weights(seed=0)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    add_adapter(model, LoraConfig(rank=8, **options), seed=0)
    own |= {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    model.gradient_checkpointing = checkpointing
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(0, 300, (4, 64))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model.token_logprobs(tokens, tokens, dropout_keys=torch.arange(4))
    forecast = training_memory(
        model.config,
        micro_batch=4,
        length=64,
        compute_dtype_bytes=2 if autocast else 4,
        gradient_checkpointing=checkpointing,
        adapter=model.adapter.config,
    )
    measured = sum(storage.nbytes() for storage in saved.values())
    assert forecast.activations + forecast.weight_casts == pytest.approx(measured, rel=0.06)


def test_an_adapter_is_forecast_to_need_no_gradients_and_states_of_the_rest():
    whole = training_memory(ModelConfig(), micro_batch=1, length=256)
    small = training_memory(ModelConfig(), micro_batch=1, length=256, adapter=LoraConfig(rank=8))
    numbers = sum(a * b for a, b in adapter_shapes(ModelConfig(), LoraConfig(rank=8)).values())
    assert (small.gradients, small.optimizer) == (4 * numbers, 8 * numbers)
    assert small.total < 0.65 * whole.total
    assert training_memory(ModelConfig(), micro_batch=1, length=256, adapter=LoraConfig()) == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "lora.rank is -1; expected zero or a positive whole number"),
        ({"alpha": 0.0}, "lora.alpha is 0.0; expected a positive number"),
        ({"dropout": 1.0}, "lora.dropout is 1.0; expected a share of at least 0 and below 1"),
        ({"targets": ("q", "head")}, "lora.targets names 'head'; expected some of q, k, v"),
        ({"targets": ()}, "at least one matrix"),
        ({"targets": ("q", "q")}, "each named once"),
        ({"optimizer": "sgd"}, "lora.optimizer is 'sgd'"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)


def test_a_rank_larger_than_a_matrix_is_refused(small_model):
    with pytest.raises(ValueError, match=r"lora.rank is 33, more than model.layers.0.self_attn.q_proj.weight"):
        add_adapter(copy.deepcopy(small_model), LoraConfig(rank=33), seed=0)


def test_an_adapted_model_compiles_as_a_whole(small_model, unchecked_shapes):
    tuned = adapted(small_model, dropout=0.5)
    compiled = torch.compile(tuned.token_logprobs, fullgraph=True, backend="eager")
    keys = torch.tensor([4, -1, 6])
    noise = torch.zeros(3, 20, 32)
    result = compiled(TOKENS, TOKENS, dropout_keys=keys, embedding_noise=noise)
    result.sum().backward()
    gradients = [p.grad.clone() for p in tuned.parameters() if p.requires_grad]
    tuned.zero_grad()
    plain = tuned.token_logprobs(TOKENS, TOKENS, dropout_keys=keys)
    plain.sum().backward()
    torch.testing.assert_close(result, plain, atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients, [p.grad for p in tuned.parameters() if p.requires_grad], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
