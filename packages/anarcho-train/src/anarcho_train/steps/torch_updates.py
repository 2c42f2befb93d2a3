"""The size of an update in PyTorch, by parameter group; `anarcho_train.steps.weight_samples` says how it is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from anarcho_train.steps.weight_samples import ratio, stride


class UpdateSizes:
    """Notes weights before an update; `ratios` compares them with those after it.

    Of a tensor in shards, each process looks at its own; ``total`` is the sum of numbers over them.
    """

    def __init__(
        self, groups: Mapping[str, Iterable[Tensor]], *, total: Callable[[Tensor], Tensor] = lambda numbers: numbers
    ) -> None:
        self._groups = {name: [(p, _sample(p).clone()) for p in parameters] for name, parameters in groups.items()}
        self._total = total

    @torch.no_grad()
    def ratios(self) -> dict[str, float]:
        """``|update| / |weights|`` by group, in one transfer from the device; a group without weights but zeros is left out."""
        pairs = [pair for group in self._groups.values() for pair in group]
        sums = [numbers for p, before in pairs for numbers in _sums(_sample(p) - before, before)]
        numbers = iter(self._total(torch.stack(sums)).tolist() if sums else [])
        found = {
            name: ratio((p.numel() / max(1.0, next(numbers)), next(numbers), next(numbers)) for p, _ in group)
            for name, group in self._groups.items()
        }
        return {name: value for name, value in found.items() if value is not None}


def _sample(parameter: Any) -> Tensor:
    own: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return own.detach().reshape(-1)[:: stride(own.numel())]


def _sums(update: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How many weights are looked at, and the sums of squares of their updates and of themselves."""
    count = torch.full((), float(before.numel()), device=before.device)
    return count, update.float().square().sum(), before.float().square().sum()
