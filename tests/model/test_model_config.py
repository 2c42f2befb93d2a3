"""The configuration counts itself rightly, survives a round trip and refuses what cannot be built."""

from __future__ import annotations

import dataclasses

import pytest
from anarcho_model import ConfigError, InitConfig, ModelConfig, RopeScaling

HF = ModelConfig(dim=64, num_heads=4).to_huggingface(eos_token_id=1, pad_token_id=2)
QWEN = ModelConfig(dim=64, num_heads=4, qk_norm=True).to_huggingface(eos_token_id=1, pad_token_id=2)


def test_the_reference_model_has_the_published_number_of_parameters():
    assert ModelConfig().num_parameters == 137_841_408


def test_parameters_are_counted_as_the_model_has_them(model):
    assert model.config.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert model.config.tensor_shapes() == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert [*model.config.tensor_shapes()] == [name for name, _ in model.named_parameters()]


def test_fields_left_open_follow_a_changed_width():
    wider = dataclasses.replace(ModelConfig(), dim=1536)
    assert (wider.head_size, wider.ffn_size, wider.kv_heads) == (128, 6144, 12)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(),
        ModelConfig(num_kv_heads=4, hidden_dim=2000, tie_embeddings=False, norm_eps=1e-6),
        ModelConfig(qk_norm=True, head_dim=80, rope_theta=5e5),
        ModelConfig(rope_scaling=RopeScaling(kind="linear", factor=2.0)),
        ModelConfig(qk_norm=True, rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_context_length=1024)),
    ],
)
def test_a_configuration_survives_the_round_trip_through_hugging_face(config):
    assert ModelConfig.from_huggingface(config.to_huggingface(eos_token_id=1, pad_token_id=2)) == config


def test_keys_that_older_files_leave_out_take_the_defaults_of_transformers():
    shape = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    llama = ModelConfig.from_huggingface({"model_type": "llama", "num_attention_heads": 2, **shape})
    assert (llama.context_length, llama.norm_eps, llama.rope_theta, llama.tie_embeddings) == (2048, 1e-6, 1e4, False)
    assert (llama.kv_heads, llama.head_size) == (2, 4)
    qwen = ModelConfig.from_huggingface(
        {"model_type": "qwen3", "num_attention_heads": 4, **shape, "num_key_value_heads": 2}
    )
    assert (qwen.context_length, qwen.head_size, qwen.kv_heads, qwen.qk_norm) == (32768, 128, 2, True)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"num_heads": 7}, "model.num_heads is 7"),
        ({"num_kv_heads": 5}, "model.num_kv_heads is 5"),
        ({"dim": 36}, "model.head_dim is 3"),
        ({"head_dim": 5}, "model.head_dim is 5"),
        ({"num_layers": 0}, "model.num_layers is 0"),
        ({"vocab_size": -1}, "model.vocab_size is -1"),
        ({"context_length": 2.5}, "model.context_length is 2.5"),
        ({"hidden_dim": True}, "model.hidden_dim is True"),
        ({"norm_eps": float("nan")}, "model.norm_eps is nan"),
        ({"rope_theta": 0.0}, "model.rope_theta is 0.0"),
        ({"rope_theta": 1e39}, "model.rope_theta is 1e\\+39"),
        ({"norm_eps": 1e300}, "model.norm_eps is 1e\\+300"),
        ({"num_layers": 10**20}, "model.num_layers is 100000000000000000000"),
    ],
)
def test_an_impossible_shape_is_refused_by_its_key(options, key):
    # The shape checker of the tests would refuse wrong types first, so these go past it as they do in use.
    with pytest.raises(ConfigError, match=f"^{key}, expected"):
        _construct(ModelConfig, options)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"kind": "yarn", "factor": 2.0}, "kind is 'yarn'"),
        ({"kind": "linear", "factor": 0.0}, "factor is 0.0"),
        ({"kind": "llama3", "factor": 2.0, "high_freq_factor": 1.0}, "high_freq_factor is 1.0"),
    ],
)
def test_an_impossible_rope_scaling_is_refused_by_its_key(options, key):
    with pytest.raises(ConfigError, match=f"model.rope_scaling.{key}, expected"):
        _construct(RopeScaling, options)


def test_a_negative_standard_deviation_is_refused_by_its_key():
    with pytest.raises(ConfigError, match=r"init\.head_std is -1\.0, expected"):
        InitConfig(head_std=-1.0)


@pytest.mark.parametrize("name", ["embedding_std", "head_std", "linear_scale", "qk_norm_gain"])
def test_initial_weights_beyond_float32_are_refused_by_their_key(name):
    with pytest.raises(
        ConfigError, match=rf"init\.{name} is 1e\+300, expected at most 3\.4e\+38, which float32 can hold"
    ):
        InitConfig(**{name: 1e300})
    assert getattr(InitConfig(**{name: 3.4e38}), name) == 3.4e38


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**HF, "model_type": "gpt2"}, "model_type is 'gpt2', expected one of llama, qwen3"),
        ({**HF, "architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({**HF, "attention_bias": True}, "attention_bias is True"),
        ({**HF, "mlp_bias": True}, "mlp_bias is True"),
        ({**HF, "hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({**HF, "quantization_config": {"bits": 4}}, "quantization_config"),
        ({**QWEN, "use_sliding_window": True}, "use_sliding_window is True"),
        ({**QWEN, "layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({**HF, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ({**HF, "rope_scaling": {"rope_type": "linear"}}, "no factor"),
        ({**HF, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({key: value for key, value in HF.items() if key != "hidden_size"}, "hidden_size missing"),
        ({**HF, "num_attention_heads": "4"}, "num_attention_heads is '4'"),
    ],
)
def test_a_model_that_would_be_computed_differently_is_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_huggingface(values)


def _construct(kind, options):
    config = object.__new__(kind)
    for field in dataclasses.fields(kind):
        object.__setattr__(config, field.name, options.get(field.name, field.default))
    config.__post_init__()
