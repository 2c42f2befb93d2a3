"""The random numbers that decide which tokens are drawn, one for each token; free of any framework.

Notable: they are the 53-bit numbers that PyTorch's generator on the CPU draws from the same seed, so that a seed means
the same text in every back-end. Mersenne Twister (Matsumoto and Nishimura 1998), of which PyTorch takes the lower 32
bits of a seed.
"""

from __future__ import annotations

import secrets

import numpy as np

__all__ = ["Draws", "seeded_generator"]


class Draws:
    """Numbers in [0, 1), the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        # This class of NumPy's is the one whose stream is promised never to change (NEP 19).
        self._state = np.random.RandomState(seed % 2**32)

    def next(self) -> float:
        """The next number."""
        high, low = self._state.randint(0, 2**32, size=2, dtype=np.uint32).tolist()
        return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53


def seeded_generator(seed: int | None, *, row: int = 0) -> Draws:
    """The numbers of row `row` of a batch with this seed; without one, numbers that nobody can repeat."""
    return Draws(secrets.randbits(64) if seed is None else (seed + row) % 2**63)
