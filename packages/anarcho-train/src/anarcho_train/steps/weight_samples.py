"""How large an update is beside the weights that it changes, from a sample of each tensor's weights; what both frameworks share.

Notable: ``|update| / |weights|``, the 2-norms over a group of parameters, says more about a learning rate than the rate itself; around 1e-3
is a usual aim (notes of Stanford's CS231n, "Ratio of weights:updates"). The weights before an update would have to be kept whole to
measure it exactly. Evenly spread ones give it within a per cent, for 256 KiB a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

SAMPLED_WEIGHTS = 1 << 16
"""So many weights of a tensor are looked at; smaller tensors are measured exactly."""


def stride(size: int) -> int:
    """The distance of sampled weights in a flattened tensor of ``size``: odd, so that they do not all lie in a few columns."""
    return 1 if size <= SAMPLED_WEIGHTS else -(-size // SAMPLED_WEIGHTS) | 1


def ratio(sizes: Iterable[tuple[float, float, float]]) -> float | None:
    """The ratio of a group from (weights that a sampled one stands for, sum of squared updates, sum of squared weights) of each tensor.

    None where all weights are zero, to which nothing compares.
    """
    tensors = list(sizes)
    update = sum(share * squares for share, squares, _ in tensors)
    weights = sum(share * squares for share, _, squares in tensors)
    return math.sqrt(update / weights) if weights > 0 else None
