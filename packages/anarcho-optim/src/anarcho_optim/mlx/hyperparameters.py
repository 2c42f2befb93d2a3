"""A parameter group of an optimizer whose rates live in its state, as arrays, so that compiled steps see them change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import mlx.core as mx

from anarcho_optim.groups import check_options

SCHEDULED = ("lr", "weight_decay", "momentum")
"""The keys of a group that may change from step to step."""


class ParamGroup(MutableMapping[str, Any]):
    """The keys of one group: ``group["lr"]`` reads a float from the optimizer's state, ``group["lr"] = 0.01`` writes an array to it.

    ``arrays`` is the part of the state that holds the keys of `SCHEDULED` which the group has. The other options are fixed, because a
    compiled step would not see them change: setting one raises ValueError. Keys of one's own may be added and are only kept.
    """

    def __init__(self, options: Mapping[str, Any], arrays: dict[str, mx.array]) -> None:
        self._fixed = {key: value for key, value in options.items() if key not in SCHEDULED}
        self._own: dict[str, Any] = {}
        self._arrays = arrays
        for key in SCHEDULED:
            if key in options:
                arrays[key] = _rate(options[key])

    def array(self, key: str) -> mx.array:
        """The 0-D float32 array behind a key of `SCHEDULED`."""
        return self._arrays[key]

    def __getitem__(self, key: str) -> Any:
        if key in self._arrays:
            return self._arrays[key].item()
        return self._fixed[key] if key in self._fixed else self._own[key]

    def __setitem__(self, key: str, value: Any) -> None:
        where = f"group {self._fixed['name']!r}"
        if key in self._fixed:
            raise ValueError(
                f"{key} of {where} is fixed; expected one of {', '.join(self._arrays)}: build a new optimizer"
            )
        if key not in self._arrays:
            self._own[key] = value
            return
        if not isinstance(
            value, mx.array
        ):  # An array may be a placeholder of a compiled function, without a value yet.
            check_options(self._fixed | dict.fromkeys(self._arrays, 0.0) | {key: value}, where=where)
        self._arrays[key] = _rate(value)

    def __delitem__(self, key: str) -> None:
        del self._own[key]

    def __iter__(self) -> Iterator[str]:
        yield from (*self._fixed, *self._arrays, *self._own)

    def __len__(self) -> int:
        return len(self._fixed) + len(self._arrays) + len(self._own)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self)!r})"


def _rate(value: float | mx.array) -> mx.array:
    return value.astype(mx.float32) if isinstance(value, mx.array) else mx.array(value, mx.float32)
