"""Every option of a Muon group on tiny shapes: the list that each half is compared with the reference on, and with the other half."""

from __future__ import annotations

from typing import Any

from anarcho_optim import VARIANTS, OptimConfig
from anarcho_optim.groups import adamw_options, muon_options
from anarcho_optim.scaling import ADJUST_LR_FNS

Case = tuple[tuple[int, ...], dict[str, Any]]

_NORMUON: dict[str, Any] = {"normuon": True}
_ALL: dict[str, Any] = {
    "normuon": True,
    "row_equilibration": True,
    "frobenius_normalization": True,
    "cautious_weight_decay": True,
}

MUON: dict[str, Case] = {
    **{f"variant {name}": ((6, 10), {"variant": name}) for name in VARIANTS},
    **{f"{shape[0]}x{shape[1]} {name}": (shape, {"adjust_lr_fn": name}) for name in ADJUST_LR_FNS for shape in [(4, 9), (9, 4), (6, 6)]},
    "torch's name of the scale original": ((9, 4), {"adjust_lr_fn": None}),
    "three steps": ((6, 10), {"ns_steps": 3}),
    "seven steps": ((6, 10), {"ns_steps": 7}),
    "own coefficients": ((6, 10), {"ns_coefficients": (3.4445, -4.775, 2.0315), "ns_steps": 4}),
    "without Nesterov": ((6, 10), {"nesterov": False}),
    "without momentum": ((6, 10), {"momentum": 0.0}),
    "without decay": ((6, 10), {"weight_decay": 0.0}),
    "cautious decay": ((6, 10), {"cautious_weight_decay": True}),
    "row equilibration": ((10, 6), {"row_equilibration": True}),
    "Frobenius normalization": ((10, 6), {"frobenius_normalization": True}),
    "NorMuon by rows": ((10, 6), _NORMUON),
    "NorMuon by columns": ((10, 6), _NORMUON | {"normuon_axis": -2, "normuon_beta2": 0.8}),
    "everything at once": ((6, 10), _ALL),
    "split rows": ((12, 5), {"split_sizes": (6, 4, 2)}),
    "split columns": ((5, 12), {"split_sizes": (6, 4, 2), "split_dim": 1}),
    "heads of rows": ((12, 5), {"num_heads": 3}),
    "heads of columns": ((5, 12), {"num_heads": 3, "split_dim": 1}),
    "split rows, everything": ((12, 5), _ALL | {"split_sizes": (6, 4, 2)}),
    "split columns, everything": ((5, 12), _ALL | {"split_sizes": (6, 4, 2), "split_dim": 1}),
    "heads, NorMuon by columns": ((12, 5), _NORMUON | {"num_heads": 3, "normuon_axis": -2}),
    "heads of columns, NorMuon by columns": ((5, 12), _NORMUON | {"num_heads": 3, "split_dim": 1, "normuon_axis": -2}),
    "an empty block": ((12, 5), _NORMUON | {"split_sizes": (8, 0, 4), "normuon_axis": -2}),
    "convolution": ((6, 3, 2, 2), {"flatten": True}),
    "convolution, everything": ((6, 3, 2, 2), _ALL | {"flatten": True}),
    "convolution, NorMuon by columns": ((6, 3, 2, 2), _NORMUON | {"flatten": True, "normuon_axis": -2}),
    "stack": ((3, 4, 6), {"flatten": False}),
    "stack of stacks, everything": ((2, 2, 6, 4), _ALL | {"flatten": False}),
    "stack by heads, NorMuon by columns": ((3, 4, 6), _NORMUON | {"flatten": False, "num_heads": 2, "normuon_axis": -2}),
    "one row": ((1, 8), {}),
    "one column, everything": ((8, 1), _ALL),
    "one number": ((1, 1), _NORMUON),
    "no rows": ((0, 4), _ALL),
    "no columns": ((4, 0), _ALL),
}  # fmt: skip
"""Shape and options by name; the options are those that differ from `muon`'s."""

ADAMW: dict[str, Case] = {
    "default": ((4, 5), {}),
    "betas close to one": ((7,), {"betas": (0.99, 0.9999)}),
    "without averages": ((4, 5), {"betas": (0.0, 0.0)}),
    "large eps and decay": ((3, 2, 2), {"eps": 0.1, "weight_decay": 0.5}),
    "a number": ((), {}),
}
"""Shape and options by name; the options are those that differ from `adamw`'s."""


def muon(**options: Any) -> dict[str, Any]:
    """A Muon group's options in float32, with a rate at which one step of a small weight is well above rounding."""
    return muon_options(OptimConfig(lr=0.05, ns_dtype="float32")) | options


def adamw(**options: Any) -> dict[str, Any]:
    """An AdamW group's options, with a rate at which one step of a small weight is well above rounding."""
    return adamw_options(OptimConfig(lr=0.05), weight_decay=0.1) | options
