"""QK-clip: keeps attention logits bounded by rescaling query and key weights after an update.

Source: Kimi Team, "Kimi K2", arXiv:2507.20534, section 2.1 (MuonClip).
"""

from __future__ import annotations

import mlx.core as mx


def qk_clip(
    query: mx.array, key: mx.array, *, max_logits: mx.array, threshold: float = 100.0
) -> tuple[mx.array, mx.array]:
    """Rescales the rows of each head of ``query`` and ``key``, so that no logit of the last batch would exceed ``threshold``.

    ``query`` is (heads x head_dim, dim), ``key`` (key heads x head_dim, dim), ``max_logits`` (heads,): the largest pre-softmax logit of
    each head. With gamma = min(1, threshold / max_logit), query and key of a head take sqrt(gamma) each. Where several query heads share
    a key head, the key takes the root of the smallest gamma among them and each query what is left of its own. Returns the new query and
    key, in their dtypes. Raises ValueError for sizes that do not fit.
    """
    heads = max_logits.size
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}; expected a positive number")
    if heads == 0 or query.shape[0] % heads:
        raise ValueError(f"query has {query.shape[0]} rows; expected a multiple of the {heads} heads of max_logits")
    head_dim = query.shape[0] // heads
    key_heads = key.shape[0] // max(1, head_dim)
    if key_heads == 0 or key_heads * head_dim != key.shape[0] or heads % key_heads:
        raise ValueError(f"key has {key.shape[0]} rows; expected a divisor of {heads} heads of {head_dim} rows")
    gamma = threshold / mx.maximum(max_logits.astype(mx.float32), threshold)
    gamma = gamma.reshape(key_heads, heads // key_heads)
    shared = mx.sqrt(gamma.min(axis=1, keepdims=True))
    return _scale_heads(query, gamma / shared), _scale_heads(key, shared)


def _scale_heads(weights: mx.array, factors: mx.array) -> mx.array:
    """Multiplies the rows of each head of (heads x head_dim, dim) by that head's factor."""
    heads = weights.astype(mx.float32).reshape(factors.size, -1, *weights.shape[1:])
    scaled = heads * factors.reshape(-1, *(1 for _ in weights.shape))
    return scaled.reshape(weights.shape).astype(weights.dtype)
