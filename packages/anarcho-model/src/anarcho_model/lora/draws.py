"""What is random in an adapter: first weights and dropout, as numbers that are the same in every framework.

Notable: A is drawn uniformly with the variance 1 / (3 inputs) of PyTorch's linear layers, from a stream that the seed and its name have;
dropout hashes a number of the row, of the column, of the layer and of the feature, so that no generator has a state.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from anarcho_model.initial_draws import standard_uniform

__all__ = ["COLUMN", "FACTOR", "FEATURE", "drop_threshold", "first_matrix", "layer_salt"]

FACTOR = 0x45D9F3B
"""Of the multiply and xor-shift that scatters numbers of 32 bits over all of them, one to one."""
COLUMN, FEATURE = 0x1E3779B9, 0x27D4EB2F
"""Odd factors below 2**31, so that products with numbers of 32 bits stay within 63."""


def first_matrix(shape: Sequence[int], *, seed: int, name: str) -> np.ndarray:
    """The first weights, float32 (rank, inputs), of the A with this name."""
    return (2 * standard_uniform(shape, seed=seed, name=name) - 1) / np.float32(math.sqrt(shape[1]))


def layer_salt(*, seed: int, name: str) -> int:
    """The number under 2**32 by which the dropout of the A with this name differs from all others."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "little")


def drop_threshold(rate: float) -> int:
    """A draw of 32 bits under this number drops its input."""
    return int(rate * 2**32)
