"""How GGUF names and orders what `model.safetensors` holds, in both directions.

Notable: llama.cpp turns a Llama's heads in neighbouring pairs (2i, 2i + 1), Hugging Face in halves (i, i + head / 2). Its files hold
    the rows of the query and key projections in the order that makes the two equal; a Qwen3 is turned in halves by both.

Sources: the tables of gguf-py (https://github.com/ggml-org/llama.cpp/tree/master/gguf-py), and for the order of rows the
    converter of llama.cpp.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import numpy as np
import numpy.typing as npt

from anarcho_model.config import ModelConfig

__all__ = ["ARCHITECTURES", "ROPE_FACTORS", "GgufError", "gguf_names", "load_gguf", "to_halves", "to_pairs"]

ARCHITECTURES = ("llama", "qwen3")
ROPE_FACTORS = "rope_freqs.weight"
"""The tensor of Llama 3.1: what each rotary frequency is divided by."""

_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

Weight = npt.NDArray[np.floating]


class GgufError(ValueError):
    """A GGUF file that cannot be read or written; the message names the file or key, what was found and what was expected."""


def load_gguf() -> ModuleType:
    """The `gguf` package. Raises GgufError where it is not installed."""
    try:
        return import_module("gguf")
    except ImportError as error:
        raise GgufError("GGUF files need the package gguf; install anarcho-model[gguf].") from error


def gguf_names(config: ModelConfig) -> dict[str, str]:
    """Name of each tensor in `model.safetensors` -> its name in GGUF, in the model's order."""
    return {name: _gguf_name(name) for name in config.tensor_shapes()}


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.weight"
    index, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{index}.{_BLOCK[part]}.weight"


def to_pairs(name: str, weight: Weight, config: ModelConfig) -> Weight:
    """The weight as llama.cpp wants it, given with the name that it has in `model.safetensors`."""
    if not (heads := _turned_heads(name, config)):
        return weight
    return weight.reshape(heads, 2, config.head_size // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def to_halves(name: str, weight: Weight, config: ModelConfig) -> Weight:
    """The inverse of `to_pairs`."""
    if not (heads := _turned_heads(name, config)):
        return weight
    return weight.reshape(heads, config.head_size // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _turned_heads(name: str, config: ModelConfig) -> int:
    """Number of heads in a projection whose rows are in another order; 0 for every other tensor."""
    if config.qk_norm:
        return 0
    if name.endswith("q_proj.weight"):
        return config.num_heads
    return config.kv_heads if name.endswith("k_proj.weight") else 0
