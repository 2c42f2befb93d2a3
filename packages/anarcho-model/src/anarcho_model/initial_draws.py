"""Draws for initial weights, whatever the framework: those of PyTorch's generator, without PyTorch.

Notable: `torch.randn` on a CPU takes 24 bits of the Mersenne Twister for each number, and turns each block of 16 into
normal ones, the first eight giving radii and the others angles; an incomplete last block is drawn again as a whole. Only
the logarithm, sine and cosine are others than its vectorised ones, so a draw may differ in its last bits.

Sources: Mersenne Twister (Matsumoto and Nishimura 1998), Box and Muller 1958.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

__all__ = ["standard_normal", "standard_uniform"]

BLOCK = 16
PIECE = 2**20
"""Numbers that are turned at a time, a multiple of the block."""


def standard_normal(shape: Sequence[int], *, seed: int, name: str) -> np.ndarray:
    """Float32 draws of the stream that `seed` and a tensor's name have, as `anarcho_model.torch.GPT.init_weights` draws them.

    Of a tensor of fewer than 16 numbers PyTorch draws others.
    """
    generator = _generator(seed, name)
    size = math.prod(shape)
    drawn = np.empty(max(size, BLOCK), dtype=np.float32)
    whole = drawn.size // BLOCK * BLOCK
    for start in range(0, whole, PIECE):
        stop = min(start + PIECE, whole)
        drawn[start:stop] = _normal(_uniform(generator, stop - start))
    rest = drawn.size - whole
    if rest:
        _uniform(generator, rest)  # drawn with the others and overwritten
        drawn[-BLOCK:] = _normal(_uniform(generator, BLOCK))
    return drawn[:size].reshape(shape)


def standard_uniform(shape: Sequence[int], *, seed: int, name: str) -> np.ndarray:
    """Float32 draws in [0, 1) of the stream that `seed` and a tensor's name have: `torch.rand`'s to the last bit."""
    return _uniform(_generator(seed, name), math.prod(shape)).reshape(shape)


def _generator(seed: int, name: str) -> np.random.RandomState:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    # PyTorch takes the lower 32 bits of a seed. NumPy promises that this class's stream never changes (NEP 19).
    return np.random.RandomState((int.from_bytes(digest[:8], "little") >> 1) % 2**32)


def _uniform(generator: np.random.RandomState, size: int) -> np.ndarray:
    """Numbers in [0, 1) with 24 bits."""
    words = generator.randint(0, 2**32, size=size, dtype=np.uint32)
    return (words & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2**-24)


def _normal(uniform: np.ndarray) -> np.ndarray:
    """Box and Muller's transform of blocks of 16."""
    first, second = np.split(uniform.reshape(-1, BLOCK), 2, axis=1)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - first))
    angle = np.float32(2 * math.pi) * second
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
