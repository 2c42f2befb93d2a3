"""The size of an update in MLX, by parameter group; `anarcho_train.steps.weight_samples` says how it is measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from anarcho_train.steps.weight_samples import ratio, stride


class UpdateSizes:
    """Notes weights of a model before an update; `ratios` compares them with those after it.

    ``groups`` has the names of the parameters of each group.
    """

    def __init__(self, model: nn.Module, groups: Mapping[str, Iterable[str]]) -> None:
        self._model = model
        parameters = _parameters(model)
        self._groups = {name: {p: _sample(parameters[p]) for p in members} for name, members in groups.items()}
        # Copies, or the weights before the update would stay in memory beside those after it.
        mx.async_eval(self._groups)

    def ratios(self) -> dict[str, float]:
        """``|update| / |weights|`` by group; a group without weights but zeros is left out."""
        parameters = _parameters(self._model)
        squares = {
            name: [(_square_sum(_sample(parameters[p]) - before), _square_sum(before)) for p, before in group.items()]
            for name, group in self._groups.items()
        }
        mx.eval(squares)
        found = {}
        for name, group in self._groups.items():
            shares = (parameters[p].size / max(1, before.size) for p, before in group.items())
            sums = ((float(np.array(update)), float(np.array(weights))) for update, weights in squares[name])
            found[name] = ratio((share, *pair) for share, pair in zip(shares, sums, strict=True))
        return {name: value for name, value in found.items() if value is not None}


def members(model: nn.Module, groups: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[str]]:
    """The parameters of each of an optimizer's groups, which are called ``names``; all are in the group of one that knows none."""
    trained = set(_parameters(model))
    return {
        name: [p for p in group.get("params", sorted(trained)) if p in trained]
        for name, group in zip(names, groups, strict=True)
    }


def _parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.trainable_parameters()))


def _sample(parameter: mx.array) -> mx.array:
    # Added to zero, a view of the whole array becomes an array of its own.
    return parameter.reshape(-1)[:: stride(parameter.size)] + 0.0


def _square_sum(values: mx.array) -> mx.array:
    return mx.square(values.astype(mx.float32)).sum()
