"""Floating-point operations of a training step, for utilisation and time forecasts.

The convention is PaLM's (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), the one that published utilisations use: a
multiplication and an addition count as two, only matrix products count, backward is twice forward, attention is counted
as if every token saw the whole sequence, and recomputation is not counted.
"""

from __future__ import annotations

from anarcho_model.config import ModelConfig

__all__ = ["forward_flops_per_token", "training_flops_per_token"]


def forward_flops_per_token(config: ModelConfig, length: int) -> int:
    """Operations that one token of a sequence of `length` tokens costs in a forward pass, output layer included."""
    query, kv = config.num_heads * config.head_size, config.kv_heads * config.head_size
    matrices = config.dim * (2 * query + 2 * kv + 3 * config.ffn_size)
    return config.num_layers * (2 * matrices + _attention(config, length)) + 2 * config.vocab_size * config.dim


def training_flops_per_token(config: ModelConfig, length: int, *, frozen: bool = False) -> int:
    """Operations of forward and backward for one token of a sequence of `length` tokens.

    Of `frozen` weights, to which an adapter is added, no gradient is computed; the adapter's own few operations are not counted.
    """
    forward = forward_flops_per_token(config, length)
    return 2 * forward + config.num_layers * _attention(config, length) if frozen else 3 * forward


def _attention(config: ModelConfig, length: int) -> int:
    """Of one block: two products with a sequence of `length` keys and values."""
    return 4 * config.num_heads * config.head_size * length
