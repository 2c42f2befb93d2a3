"""The shape of a model, and its translation to and from Hugging Face's `config.json`.

Notable: fields left at None are derived when they are read, never stored, so `dataclasses.replace(config, dim=1024)`
    widens the heads and the feed-forward layer, too. A configuration with QK-norm is written as Qwen3, any other as
    Llama: the two architectures that Transformers, mlx-lm and llama.cpp read and that differ from this model in nothing
    but names. No framework is imported here.

Sources: Llama (Touvron et al. 2023, arXiv:2302.13971), Qwen3 (arXiv:2505.09388), RoPE (Su et al. 2021,
    arXiv:2104.09864).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["ConfigError", "InitConfig", "ModelConfig", "RopeScaling"]

ROPE_TYPES = ("linear", "llama3")
FLOAT32_MAX = (2 - 2**-23) * 2.0**127
"""The largest number of float32, the type of the weights."""
MAX_LAYERS = 2**16
"""Far more than models have: the names of all tensors have to fit into memory."""


class ConfigError(ValueError):
    """A model configuration that cannot be built; the message names the key, what was found and what was expected."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched so that a model reads more than the context it was trained at."""

    kind: Literal["linear", "llama3"]
    """`linear` divides every frequency by `factor`; `llama3` only the slow ones (Llama 3.1)."""
    factor: float
    """How many times longer the context becomes."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths beyond `original_context_length / low_freq_factor` are stretched fully."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths under `original_context_length / high_freq_factor` are left alone."""
    original_context_length: int = 8192
    """llama3: tokens of context at which the model was trained before stretching."""

    def __post_init__(self) -> None:
        if self.kind not in ROPE_TYPES:
            raise ConfigError(f"model.rope_scaling.kind is {self.kind!r}, expected one of {', '.join(ROPE_TYPES)}.")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_context_length"):
            _require_positive(
                f"model.rope_scaling.{name}", getattr(self, name), whole=name == "original_context_length"
            )
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"model.rope_scaling.high_freq_factor is {self.high_freq_factor}, "
                f"expected more than low_freq_factor = {self.low_freq_factor}."
            )

    def scale(self, frequency: float) -> float:
        """The stretched form of one rotary frequency (radians per token), by the rules of Transformers' `modeling_rope_utils.py`."""
        if self.kind == "linear":
            return frequency / self.factor
        wavelength = 2 * math.pi / frequency
        if wavelength > self.original_context_length / self.low_freq_factor:
            return frequency / self.factor
        if wavelength < self.original_context_length / self.high_freq_factor:
            return frequency
        turns = self.original_context_length / wavelength
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return (1 - kept) * frequency / self.factor + kept * frequency

    def to_huggingface(self) -> dict[str, Any]:
        """The `rope_scaling` object of `config.json`."""
        if self.kind == "linear":
            return {"rope_type": "linear", "factor": self.factor}
        return {
            "rope_type": "llama3",
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_context_length,
        }


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only GPT; the defaults are the reference model of 137,841,408 parameters."""

    vocab_size: int = 32000
    """Number of token ids."""
    context_length: int = 4096
    """The most tokens that one sequence may hold."""
    num_layers: int = 12
    """Number of blocks (attention and feed-forward), at most 65,536."""
    dim: int = 768
    """Width of the residual stream."""
    num_heads: int = 12
    """Number of query heads; must divide `dim`."""
    num_kv_heads: int | None = None
    """Number of key and value heads, a divisor of `num_heads`; None means as many as query heads."""
    head_dim: int | None = None
    """Width of one head, an even number; None means `dim / num_heads`."""
    hidden_dim: int | None = None
    """Width of the feed-forward layer; None means `4 * dim`."""
    norm_eps: float = 1e-5
    """Added to the mean square inside every RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Stretching of the rotary frequencies; None means none."""
    qk_norm: bool = False
    """Whether queries and keys pass through an RMSNorm per head before the rotation, as in Qwen3."""
    tie_embeddings: bool = True
    """Whether the output layer shares the embedding's weights."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "num_layers", "dim", "num_heads"):
            _require_positive(f"model.{name}", getattr(self, name), whole=True)
        if self.num_layers > MAX_LAYERS:
            raise ConfigError(f"model.num_layers is {self.num_layers}, expected at most {MAX_LAYERS}.")
        for name in ("num_kv_heads", "head_dim", "hidden_dim"):
            if getattr(self, name) is not None:
                _require_positive(f"model.{name}", getattr(self, name), whole=True)
        for name in ("norm_eps", "rope_theta"):
            _require_positive(f"model.{name}", getattr(self, name), whole=False)
        for name in ("qk_norm", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"model.{name} is {getattr(self, name)!r}, expected true or false.")
        if self.dim % self.num_heads:
            raise ConfigError(f"model.num_heads is {self.num_heads}, expected a divisor of model.dim = {self.dim}.")
        if self.num_heads % self.kv_heads:
            raise ConfigError(
                f"model.num_kv_heads is {self.kv_heads}, expected a divisor of model.num_heads = {self.num_heads}."
            )
        if self.head_size % 2:
            raise ConfigError(
                f"model.head_dim is {self.head_size}, expected an even number because rotary embeddings turn pairs; "
                "set model.head_dim or change model.num_heads."
            )

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, with the default filled in."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """Width of one head, with the default filled in."""
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def ffn_size(self) -> int:
        """Width of the feed-forward layer, with the default filled in."""
        return 4 * self.dim if self.hidden_dim is None else self.hidden_dim

    @property
    def parameters_per_layer(self) -> int:
        """Number of parameters of one block."""
        query, kv = self.num_heads * self.head_size, self.kv_heads * self.head_size
        attention = self.dim * (2 * query + 2 * kv) + (2 * self.head_size if self.qk_norm else 0)
        return attention + 3 * self.dim * self.ffn_size + 2 * self.dim

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the whole model; a tied embedding counts once."""
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return embeddings + self.num_layers * self.parameters_per_layer + self.dim

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the weights file, in the model's order, with Hugging Face's names."""
        query, kv, head = self.num_heads * self.head_size, self.kv_heads * self.head_size, self.head_size
        block: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (query, self.dim),
            "self_attn.k_proj.weight": (kv, self.dim),
            "self_attn.v_proj.weight": (kv, self.dim),
            "self_attn.o_proj.weight": (self.dim, query),
            **({"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)} if self.qk_norm else {}),
            "mlp.gate_proj.weight": (self.ffn_size, self.dim),
            "mlp.up_proj.weight": (self.ffn_size, self.dim),
            "mlp.down_proj.weight": (self.dim, self.ffn_size),
            "input_layernorm.weight": (self.dim,),
            "post_attention_layernorm.weight": (self.dim,),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.dim)}
        for index in range(self.num_layers):
            shapes.update({f"model.layers.{index}.{name}": shape for name, shape in block.items()})
        shapes["model.norm.weight"] = (self.dim,)
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.dim)
        return shapes

    def to_huggingface(
        self, *, eos_token_id: int | Sequence[int] | None, pad_token_id: int | None, dtype: str = "float32"
    ) -> dict[str, Any]:
        """The object of `config.json`: a Llama, or with QK-norm a Qwen3.

        Both spellings of the rotary settings are written: `rope_parameters` for Transformers 5, `rope_theta` and
        `rope_scaling` for everything older. `dtype` is the name of the element type in the weights file.
        """
        scaling = None if self.rope_scaling is None else {**self.rope_scaling.to_huggingface()}
        return {
            "architectures": ["Qwen3ForCausalLM" if self.qk_norm else "LlamaForCausalLM"],
            "model_type": "qwen3" if self.qk_norm else "llama",
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context_length,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.dim,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "intermediate_size": self.ffn_size,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": self.rope_theta},
            "attention_bias": False,
            "attention_dropout": 0.0,
            **({"use_sliding_window": False} if self.qk_norm else {"mlp_bias": False}),
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": None,
            "eos_token_id": eos_token_id if eos_token_id is None or isinstance(eos_token_id, int) else [*eos_token_id],
            "pad_token_id": pad_token_id,
            "torch_dtype": dtype,
            "use_cache": True,
        }

    @staticmethod
    def from_huggingface(values: Mapping[str, Any]) -> ModelConfig:
        """Read the object of a `config.json` of a Llama or Qwen3.

        Raises:
            ConfigError: the architecture is another one, or it uses a feature that this model does not have (biases,
                another activation, sliding windows, other rope scalings, quantised weights); the message names the key.
        """
        from anarcho_model.huggingface import read_config

        return read_config(values)


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """How `GPT.init_weights` draws the weights of a new model."""

    embedding_std: float = 0.02
    """Standard deviation of the token embedding (and of the output layer when the two are tied)."""
    head_std: float = 0.02
    """Standard deviation of an output layer that is not tied."""
    linear_scale: float = 1.0
    """Linear layers have the standard deviation `linear_scale / sqrt(inputs)`."""
    zero_residual_outputs: bool = True
    """Whether `o_proj` and `down_proj` start at zero, so that every block starts as the identity; otherwise their
    standard deviation is divided by `sqrt(2 * num_layers)`, as in GPT-2."""
    qk_norm_gain: float = 1.0
    """What the gains of QK-norm start at; the logits of attention are proportional to its square."""

    def __post_init__(self) -> None:
        for name in ("embedding_std", "head_std", "linear_scale", "qk_norm_gain"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise ConfigError(f"init.{name} is {value!r}, expected a finite number of at least 0.")
            _require_float32(f"init.{name}", value)

    def gain(self, name: str) -> float:
        """First value of a norm's gain, by its name in the file."""
        return self.qk_norm_gain if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0

    def std(self, name: str, shape: Sequence[int], *, num_layers: int) -> float:
        """Standard deviation of a matrix, by its name in the file and its shape, (outputs, inputs)."""
        if name == "model.embed_tokens.weight":
            return self.embedding_std
        if name == "lm_head.weight":
            return self.head_std
        std = self.linear_scale / math.sqrt(shape[1])
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return 0.0 if self.zero_residual_outputs else std / math.sqrt(2 * num_layers)
        return std


def _require_positive(key: str, value: Any, *, whole: bool) -> None:
    kind, expected = (int, "a whole number of at least 1") if whole else (int | float, "a finite number above 0")
    if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"{key} is {value!r}, expected {expected}.")
    if not whole:
        _require_float32(key, value)


def _require_float32(key: str, value: float) -> None:
    if value > FLOAT32_MAX:
        raise ConfigError(f"{key} is {value!r}, expected at most {FLOAT32_MAX:.2g}, which float32 can hold.")
