"""The first array that is not finite in a step of MLX: among the weights, else among the gradients.

MLX has no hooks within the differentiation, so what is found is a parameter, not a function.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten


def first_anomaly(model: nn.Module, gradients: Any) -> str | None:
    """The first weight or gradient of ``model`` that is not finite, in the order of its parameters; None if all are finite."""
    if found := _first(model.parameters()):
        return f"the weights {found} are not finite themselves: go back to an earlier checkpoint"
    if found := _first(gradients):
        return f"the first parameter whose gradient is not finite is {found}"
    return None


def _first(tree: Any) -> str | None:
    arrays: dict[str, mx.array] = dict(tree_flatten(tree))
    counts = {name: (~mx.isfinite(array)).sum() for name, array in arrays.items()}
    mx.eval(counts)
    for name, count in counts.items():
        if number := int(np.array(count)):
            return f"{name} ({number} of {arrays[name].size} numbers)"
    return None
