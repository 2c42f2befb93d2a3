"""What routing parameters to the halves of the optimizer has in common for every framework: kinds, options and groups.

Notable: a framework's own routing only says, by the type of the module that owns a parameter, which role it has; the rest follows from its
shape. Matrices of one row or column have nothing to orthogonalise and go to AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from anarcho_optim.config import OptimConfig
from anarcho_optim.groups import ParamGroups, adamw_options, blocks, muon_options

SplitSizes = Mapping[str, tuple[int, ...]]
NumHeads = Mapping[str, int]


def kind_of(name: str, shape: Sequence[int], role: str | None) -> str:
    """The group of a parameter of ``shape`` whose module gives it ``role``; raises ValueError that names one that fits none."""
    if role in ("embeddings", "heads", "small matrices"):
        return role
    if len(shape) < 2:
        return "gains and biases"
    if len(shape) > 2 and role != "convolutions":
        raise ValueError(
            f"parameter {name} has shape {tuple(shape)} and is no convolution's; expected at most two dimensions: "
            "give it to a group of its own, with algorithm 'adamw', or 'muon' and flatten=True or flatten=False"
        )
    if min(shape[0], math.prod(shape) // max(1, shape[0])) <= 1:
        return "small matrices"
    return "convolutions" if len(shape) > 2 else "matrices"


def _options(config: OptimConfig) -> dict[str, dict[str, Any]]:
    """The keys of each group by its name."""
    matrices, decay = muon_options(config), config.adamw_weight_decay
    return {
        "matrices": matrices,
        "convolutions": matrices | {"flatten": True},
        "embeddings": adamw_options(config, lr=config.embedding_lr, weight_decay=decay),
        "heads": adamw_options(config, weight_decay=decay),
        "small matrices": adamw_options(config, weight_decay=decay),
        "gains and biases": adamw_options(config),
    }


def _cut(name: str, split_sizes: SplitSizes, num_heads: NumHeads) -> tuple[str, dict[str, Any]]:
    """The suffix of the group's name and its keys for a matrix that a pattern of either mapping matches; the first one counts."""
    for pattern, sizes in split_sizes.items():
        if fnmatchcase(name, pattern):
            return f" split {'+'.join(map(str, sizes))}", {"split_sizes": tuple(sizes)}
    for pattern, heads in num_heads.items():
        if fnmatchcase(name, pattern):
            return f" by {heads} heads", {"num_heads": heads}
    return "", {}


def _check_patterns(patterns: Iterable[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"the pattern {pattern!r} matches none of the {len(names)} matrices; expected the name of a matrix, * allowed"
            )


def collect_groups(
    members: Iterable[tuple[str, Any, str]],
    *,
    config: OptimConfig | None,
    split_sizes: SplitSizes | None,
    num_heads: NumHeads | None,
) -> ParamGroups:
    """The groups of (name, parameter, kind) triples, kinds as `kind_of` gives them; raises ValueError as ``param_groups`` does."""
    split_sizes, num_heads = split_sizes or {}, num_heads or {}
    options = _options(config or OptimConfig())
    found: dict[str, list[tuple[str, Any]]] = {}
    muon_names: list[str] = []
    for name, parameter, kind in members:
        if options[kind]["algorithm"] == "muon":
            suffix, settings = _cut(name, split_sizes, num_heads)
            group = options.setdefault(kind + suffix, options[kind] | settings)
            blocks(parameter.shape, group, where=f"parameter {name}")
            muon_names.append(name)
            kind += suffix
        found.setdefault(kind, []).append((name, parameter))
    _check_patterns([*split_sizes, *num_heads], muon_names)
    return ParamGroups({"name": kind, "params": found[kind], **options[kind]} for kind in options if kind in found)
