"""A saved directory means the same to Transformers as to this package, and theirs means the same here."""

from __future__ import annotations

import pytest
import torch
from anarcho_model import RopeScaling
from anarcho_model.generate.sampling import SamplingConfig
from anarcho_model.generate.torch import generate
from anarcho_model.torch import GPT
from anarcho_model.weights import load_pretrained, save_pretrained
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

LENGTHS = (1, 7, 40)


def tokens_of(model: GPT, length: int) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (3, length), generator=torch.Generator().manual_seed(length))


def theirs_of(directory):
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return theirs.eval()


@torch.no_grad()
def test_transformers_computes_the_same_logits_from_a_saved_directory(model, tmp_path):
    save_pretrained(model, tmp_path, eos_token_id=1, pad_token_id=2)
    theirs = theirs_of(tmp_path)
    assert type(theirs) is (Qwen3ForCausalLM if model.config.qk_norm else LlamaForCausalLM)
    for length in LENGTHS:
        tokens = tokens_of(model, length)
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(kind="linear", factor=3.0),
        RopeScaling(kind="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=3.0, original_context_length=16),
    ],
    ids=lambda scaling: scaling.kind,
)
def test_transformers_stretches_rotary_frequencies_alike(build, scaling, tmp_path):
    model, tokens = build(rope_scaling=scaling), torch.arange(40)[None]
    save_pretrained(model, tmp_path, eos_token_id=1, pad_token_id=2)
    expected = theirs_of(tmp_path)(tokens).logits
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(load_pretrained(tmp_path)(tokens), expected, rtol=0, atol=1e-4)
    assert (build()(tokens) - expected).abs().max() > 1e-2


def test_greedy_continuations_equal_those_of_transformers(model, tmp_path):
    save_pretrained(model, tmp_path, eos_token_id=None, pad_token_id=2)
    prompt = tokens_of(model, 5)[0].tolist()
    expected = theirs_of(tmp_path).generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)
    found = list(generate(model, prompt, config=SamplingConfig(max_new_tokens=30, temperature=0.0)))
    assert found == expected[0, 5:].tolist()


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_directory_that_transformers_saved_is_read_with_the_same_logits(kind, tied, tmp_path):
    make_config, make_model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[kind]
    theirs = make_model(
        make_config(
            vocab_size=53,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=16,
            tie_word_embeddings=tied,
            initializer_range=0.3,
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(0, 53, (2, 13))
    ours = load_pretrained(tmp_path)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)
    assert ours.config.num_parameters == theirs.num_parameters()
