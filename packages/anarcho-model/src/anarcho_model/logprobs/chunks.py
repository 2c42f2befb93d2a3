"""How many tokens' logits exist at a time, in any framework."""

from __future__ import annotations

__all__ = ["chunk_tokens"]

MAX_ELEMENTS = 2**31 - 1
"""Of a product that Apple's back-end of PyTorch computes right."""


def chunk_tokens(num_tokens: int, *, vocab_size: int, chunk_bytes: int) -> int:
    """Tokens per chunk, so that a chunk's float32 logits stay within `chunk_bytes` and chunks are of nearly equal size."""
    most = max(1, min(chunk_bytes // (4 * vocab_size), MAX_ELEMENTS // vocab_size))
    num_chunks = -(-num_tokens // most)
    return -(-num_tokens // num_chunks)
