"""Reading Hugging Face's `config.json` strictly: what this model would compute differently is refused by name, never ignored.

Notable: keys that a file leaves out take Transformers' own defaults for that architecture (older files hold only what
    differs from them); the five that give the model its shape must be there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anarcho_model.config import ConfigError, ModelConfig, RopeScaling

__all__ = ["read_config"]

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SHAPE_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
CONTEXT_DEFAULTS = {"llama": 2048, "qwen3": 32768}
"""Transformers' `max_position_embeddings` where a file has none."""
REQUIRED_VALUES: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
}
"""Keys whose other values mean a computation that this model does not do, with the values it does."""


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    """Translate a `config.json` object of a Llama or Qwen3; ConfigError names the key that cannot be honoured."""
    model_type = _architecture(values)
    for key, accepted in REQUIRED_VALUES.items():
        if key in values and values[key] not in accepted:
            raise ConfigError(f"{key} is {values[key]!r}, and this model supports only {accepted[0]!r}.")
    if "sliding_attention" in (values.get("layer_types") or ()):
        raise ConfigError("layer_types holds 'sliding_attention', and this model supports only 'full_attention'.")
    missing = [key for key in SHAPE_KEYS if values.get(key) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} missing, expected the shape of a {ARCHITECTURES[model_type]}.")
    for key in (*SHAPE_KEYS, "num_key_value_heads", "head_dim", "max_position_embeddings"):
        value = values.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"{key} is {value!r}, expected a whole number of at least 1.")
    dim, heads = values["hidden_size"], values["num_attention_heads"]
    default_kv_heads, default_head_dim = (32, 128) if model_type == "qwen3" else (heads, dim // heads)
    kv_heads = values.get("num_key_value_heads", default_kv_heads) or heads
    head_dim = values.get("head_dim") or default_head_dim
    rope_theta, rope_scaling = _rope(values)
    return ModelConfig(
        vocab_size=values["vocab_size"],
        context_length=values.get("max_position_embeddings") or CONTEXT_DEFAULTS[model_type],
        num_layers=values["num_hidden_layers"],
        dim=dim,
        num_heads=heads,
        num_kv_heads=None if kv_heads == heads else kv_heads,
        head_dim=None if head_dim * heads == dim else head_dim,
        hidden_dim=None if values["intermediate_size"] == 4 * dim else values["intermediate_size"],
        norm_eps=values.get("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        qk_norm=model_type == "qwen3",
        tie_embeddings=values.get("tie_word_embeddings", False),
    )


def _architecture(values: Mapping[str, Any]) -> str:
    model_type = values.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ConfigError(f"model_type is {model_type!r}, expected one of {', '.join(ARCHITECTURES)}.")
    for name in values.get("architectures") or ():
        if name != ARCHITECTURES[model_type]:
            raise ConfigError(f"architectures holds {name!r}, expected {ARCHITECTURES[model_type]!r}.")
    return model_type


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base frequency and scaling, from `rope_scaling` and `rope_theta` (older files) or `rope_parameters` (Transformers 5)."""
    settings = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(settings, Mapping):
        raise ConfigError(f"rope_parameters is {settings!r}, expected an object.")
    theta = settings.get("rope_theta") or values.get("rope_theta") or 10000.0
    if settings.get("partial_rotary_factor", 1) != 1:
        raise ConfigError(
            f"partial_rotary_factor is {settings['partial_rotary_factor']!r}, and this model supports only 1."
        )
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=_rope_value(settings, "factor"))
    if kind == "llama3":
        original = settings.get("original_max_position_embeddings") or values.get("max_position_embeddings") or 2048
        return theta, RopeScaling(
            kind="llama3",
            factor=_rope_value(settings, "factor"),
            low_freq_factor=_rope_value(settings, "low_freq_factor"),
            high_freq_factor=_rope_value(settings, "high_freq_factor"),
            original_context_length=original,
        )
    raise ConfigError(f"rope_type is {kind!r}, and this model supports only default, linear and llama3.")


def _rope_value(settings: Mapping[str, Any], key: str) -> float:
    if settings.get(key) is None:
        raise ConfigError(f"rope_scaling has no {key}, which its type {settings.get('rope_type')!r} needs.")
    return settings[key]
