"""The size of an update in PyTorch, by parameter group; `anarcho_train.steps.weight_samples` says how it is measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from anarcho_train.steps.weight_samples import ratio, stride


class UpdateSizes:
    """Notes weights before an update; `ratios` compares them with those after it."""

    def __init__(self, groups: Mapping[str, Iterable[Tensor]]) -> None:
        self._groups = {name: [(p, _sample(p).clone()) for p in parameters] for name, parameters in groups.items()}

    @torch.no_grad()
    def ratios(self) -> dict[str, float]:
        """``|update| / |weights|`` by group, in one transfer from the device; a group without weights but zeros is left out."""
        pairs = [pair for group in self._groups.values() for pair in group]
        squares = [sums for p, before in pairs for sums in (_square_sum(_sample(p) - before), _square_sum(before))]
        numbers = iter(torch.stack(squares).tolist() if squares else [])
        found = {
            name: ratio((p.numel() / max(1, before.numel()), next(numbers), next(numbers)) for p, before in group)
            for name, group in self._groups.items()
        }
        return {name: value for name, value in found.items() if value is not None}


def _sample(parameter: Tensor) -> Tensor:
    return parameter.detach().reshape(-1)[:: stride(parameter.numel())]


def _square_sum(values: Tensor) -> Tensor:
    return values.float().square().sum()
