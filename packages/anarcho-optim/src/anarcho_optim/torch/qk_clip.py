"""QK-clip: keeps attention logits bounded by rescaling query and key weights after an update.

Source: Kimi Team, "Kimi K2", arXiv:2507.20534, section 2.1 (MuonClip).
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def qk_clip(query: Tensor, key: Tensor, *, max_logits: Tensor, threshold: float = 100.0) -> None:
    """Multiplies the rows of each head of ``query`` and ``key`` in place, so that no logit of the last batch would exceed ``threshold``.

    ``query`` is (heads x head_dim, dim), ``key`` (key heads x head_dim, dim), ``max_logits`` (heads,): the largest pre-softmax logit of
    each head. With gamma = min(1, threshold / max_logit), query and key of a head take sqrt(gamma) each. Where several query heads share a
    key head, the key takes the root of the smallest gamma among them and each query what is left of its own. Raises ValueError for sizes
    that do not fit.
    """
    heads = max_logits.numel()
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}; expected a positive number")
    if heads == 0 or query.shape[0] % heads:
        raise ValueError(f"query has {query.shape[0]} rows; expected a multiple of the {heads} heads of max_logits")
    head_dim = query.shape[0] // heads
    if key.shape[0] % head_dim or heads % (key.shape[0] // head_dim):
        raise ValueError(f"key has {key.shape[0]} rows; expected a divisor of {heads} heads of {head_dim} rows")
    key_heads = key.shape[0] // head_dim
    gamma = (threshold / max_logits.float().clamp(min=threshold)).view(key_heads, -1)
    shared = gamma.amin(dim=1, keepdim=True).sqrt()
    query.view(heads, head_dim, -1).mul_((gamma / shared).reshape(heads, 1, 1).to(query.dtype))
    key.view(key_heads, head_dim, -1).mul_(shared.reshape(key_heads, 1, 1).to(key.dtype))
