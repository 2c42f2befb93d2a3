"""Parameter groups: their defaults, their checks and the table they print as; the same for every framework.

Notable: `blocks` is the one place that says how a parameter is cut into the matrices that are orthogonalised separately: convolutions are
flattened, fused weights are split, attention weights are split by head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from anarcho_optim.coefficients import iteration
from anarcho_optim.config import NS_DTYPES, OptimConfig
from anarcho_optim.scaling import shape_scale

ALGORITHMS = ("muon", "adamw")

BOOKKEEPING_KEYS = (
    *("name", "params", "param_names"),
    *("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"),
)
"""Keys of a group besides its options: what it holds, and what schedulers of a previous optimizer may have left there."""


def muon_options(config: OptimConfig) -> dict[str, Any]:
    """The keys of a group with ``algorithm="muon"`` as ``config`` sets them."""
    return {
        "algorithm": "muon",
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "momentum": config.momentum,
        "nesterov": config.nesterov,
        "variant": config.variant,
        "ns_steps": None,
        "ns_coefficients": None,
        "adjust_lr_fn": config.adjust_lr_fn,
        "ns_dtype": config.ns_dtype,
        "cautious_weight_decay": config.cautious_weight_decay,
        "normuon": config.normuon,
        "normuon_beta2": config.normuon_beta2,
        "normuon_axis": config.normuon_axis,
        "row_equilibration": config.row_equilibration,
        "frobenius_normalization": config.frobenius_normalization,
        "flatten": None,
        "split_sizes": None,
        "split_dim": 0,
        "num_heads": None,
    }


def adamw_options(config: OptimConfig, *, lr: float | None = None, weight_decay: float = 0.0) -> dict[str, Any]:
    """The keys of a group with ``algorithm="adamw"`` as ``config`` sets them; ``lr`` left out is the AdamW half's."""
    default_lr = config.lr if config.adamw_lr is None else config.adamw_lr
    return {
        "algorithm": "adamw",
        "lr": default_lr if lr is None else lr,
        "weight_decay": weight_decay,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
    }


def check_keys(group: Mapping[str, Any], *, where: str) -> None:
    """Raises ValueError that names a key of a new group which neither half nor a learning-rate scheduler knows."""
    known = {*muon_options(OptimConfig()), *adamw_options(OptimConfig()), *BOOKKEEPING_KEYS}
    for key in group:
        if key not in known:
            nearest = get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where} has the unknown key {key!r}; expected an option of a group: is it {nearest!r}?")


def check_options(options: Mapping[str, Any], *, where: str) -> None:
    """Checks the keys of one group, which ``where`` names in the error; raises ValueError."""
    algorithm = options.get("algorithm")
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"{where} has algorithm {algorithm!r}; expected 'muon' or 'adamw': build the groups with param_groups(model)"
        )
    for name in ("lr", "weight_decay"):
        value = float(options[name])
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{where} has {name} {value}; expected zero or a positive number")
    if algorithm == "adamw":
        beta1, beta2 = options["betas"]
        fractions = {"betas[0]": beta1, "betas[1]": beta2}
    else:
        fractions = {name: options[name] for name in ("momentum", "normuon_beta2")}
    for name, value in fractions.items():
        if not 0 <= float(value) < 1:
            raise ValueError(f"{where} has {name} {value}; expected a number of at least 0 and below 1")
    if algorithm == "adamw":
        if not (math.isfinite(options["eps"]) and options["eps"] >= 0):
            raise ValueError(f"{where} has eps {options['eps']}; expected zero or a positive number")
        return
    try:
        iteration(options["variant"], ns_steps=options["ns_steps"], ns_coefficients=options["ns_coefficients"])
        shape_scale(options["adjust_lr_fn"], 1, 1)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if options["ns_dtype"] not in NS_DTYPES:
        raise ValueError(f"{where} has ns_dtype {options['ns_dtype']!r}; expected one of {', '.join(NS_DTYPES)}")
    for name, allowed in {"normuon_axis": (-1, -2), "split_dim": (0, 1)}.items():
        if options[name] not in allowed:
            raise ValueError(f"{where} has {name} {options[name]!r}; expected {allowed[0]} or {allowed[1]}")
    if options["split_sizes"] is not None and options["num_heads"] is not None:
        raise ValueError(f"{where} has both split_sizes and num_heads; expected one of them")


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How one parameter is cut: a stack of (rows, columns) matrices, each split along ``split_dim`` into ``sizes``."""

    lead: tuple[int, ...]
    """Leading dimensions of a stack of matrices; empty for a matrix or a flattened convolution."""
    rows: int
    columns: int
    split_dim: int
    sizes: tuple[int, ...]
    """Lengths of the blocks along ``split_dim``; their sum is ``rows`` or ``columns``."""

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of each block of one matrix."""
        if self.split_dim == 0:
            return tuple((size, self.columns) for size in self.sizes)
        return tuple((self.rows, size) for size in self.sizes)

    @property
    def count(self) -> int:
        """Number of matrices in the stack."""
        return math.prod(self.lead)

    def neuron_shape(self, axis: int) -> tuple[int, ...]:
        """Shape of NorMuon's second moment: (*lead, rows, blocks across) for axis -1, (*lead, blocks across, columns) for axis -2."""
        across = len(self.sizes)
        if axis == -1:
            return (*self.lead, self.rows, across if self.split_dim == 1 else 1)
        return (*self.lead, across if self.split_dim == 0 else 1, self.columns)


def blocks(shape: Sequence[int], options: Mapping[str, Any], *, where: str) -> Blocks:
    """The matrices that a Muon parameter of ``shape`` consists of; raises ValueError that starts with ``where``, the parameter's name."""
    shape = tuple(shape)
    if len(shape) < 2:
        raise ValueError(
            f"{where} has shape {shape}; expected two dimensions or more: give it to a group with algorithm 'adamw'"
        )
    if len(shape) > 2 and options["flatten"] is None:
        raise ValueError(
            f"{where} has shape {shape}; expected two dimensions: set flatten=True for a convolution (one matrix of "
            f"{shape[0]} rows) or flatten=False for a stack of {shape[-2]} x {shape[-1]} matrices"
        )
    if len(shape) > 2 and not options["flatten"]:
        lead, rows, columns = shape[:-2], shape[-2], shape[-1]
    else:
        lead, rows, columns = (), shape[0], math.prod(shape[1:])
    split_dim = options["split_dim"]
    length = (rows, columns)[split_dim]
    if options["num_heads"] is not None:
        heads = options["num_heads"]
        if heads < 1 or length % heads:
            raise ValueError(
                f"{where} has {length} {('rows', 'columns')[split_dim]}; expected a multiple of num_heads {heads}"
            )
        sizes = (length // heads,) * heads
    else:
        sizes = tuple(options["split_sizes"] or (length,))
    if sum(sizes) != length or any(size < 0 for size in sizes):
        raise ValueError(
            f"{where} has {length} {('rows', 'columns')[split_dim]}, but split_sizes {sizes} add up to {sum(sizes)}; "
            "expected positive sizes whose sum is that number"
        )
    return Blocks(lead=lead, rows=rows, columns=columns, split_dim=split_dim, sizes=sizes)


class ParamGroups(list[dict[str, Any]]):
    """Parameter groups for `MuonAdamW`: ``params`` holds (name, parameter) pairs; ``str()`` gives a table of what is routed where."""

    def __str__(self) -> str:
        lines = [f"{'algorithm':<10}{'tensors':>8}{'parameters':>14}{'lr':>10}{'decay':>8}  name"]
        for group in self:
            count = sum(math.prod(parameter.shape) for _, parameter in group["params"])
            lines.append(
                f"{group['algorithm']:<10}{len(group['params']):>8}{count:>14,}{group['lr']:>10.2g}"
                f"{group['weight_decay']:>8.2g}  {group['name']}"
            )
        return "\n".join(lines)
