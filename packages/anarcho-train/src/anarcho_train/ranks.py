"""Several processes that train one model together, each with the whole model and a share of every step's samples.

Notable: this is all that the loop knows of them, so it is the same over MLX, over PyTorch and alone. Whatever could differ between ranks (a
signal, data that is not there yet, memory that runs out) is told to all with `Ranks.gathered` and decided by each from the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class RankLost(ConnectionError):
    """Another process of the run has ended or cannot be reached any more."""


class Ranks(Protocol):
    """The processes of a run, numbered from 0; every method is called by all of them, in the same order."""

    @property
    def rank(self) -> int:
        """The number of this process; rank 0 alone writes."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def gathered(self, values: Sequence[float]) -> np.ndarray:
        """Each rank's values, float64 (ranks, values), exact to the last bit and the same everywhere; raises `RankLost`."""
        ...


class Alone:
    """The one process of most runs."""

    rank = 0
    size = 1

    def gathered(self, values: Sequence[float]) -> np.ndarray:
        """Its own values, float64 (1, values)."""
        return np.array([values], dtype=np.float64)
