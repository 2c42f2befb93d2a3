"""Routing: which parameter of a model goes to which half of the optimizer, by module type and identity, never by name.

Notable: a parameter that an embedding owns is an embedding under every other name, so tied heads and aliases never reach Muon; matrices
of one row or column, depthwise convolutions included, have nothing to orthogonalise and go to AdamW. Convolutions are (out, ..., in) in
MLX and (out, in, ...) in torch; flattened, their columns are only permuted, which the update does not see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from anarcho_optim.config import OptimConfig
from anarcho_optim.groups import ParamGroups, adamw_options, blocks, muon_options

Named = tuple[str, mx.array]

EMBEDDING_MODULES = (nn.Embedding, nn.QuantizedEmbedding)
CONVOLUTION_MODULES = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def _table_shape(embedding: nn.Embedding | nn.QuantizedEmbedding) -> tuple[int, ...]:
    """(vocabulary, width) of an embedding, of which a quantized table is a packed form."""
    if isinstance(embedding, nn.QuantizedEmbedding):
        return (embedding.num_embeddings, embedding.dims)
    return tuple(embedding.weight.shape)


def _roles(model: nn.Module) -> dict[int, str]:
    """What the type of its module says about an array, by the array's id; arrays of other modules are not listed."""
    modules = [module for _, module in model.named_modules()]
    embeddings = [m for m in modules if isinstance(m, EMBEDDING_MODULES)]
    tables = {_table_shape(m) for m in embeddings}
    # A shape that several linear layers share is that of hidden layers, which a table of positions may have by chance.
    shapes = Counter(tuple(m.weight.shape) for m in modules if isinstance(m, nn.Linear))
    roles: dict[int, str] = {}
    for module in modules:
        if isinstance(module, CONVOLUTION_MODULES):
            depthwise = getattr(module, "groups", 1) > 1 and module.weight.shape[-1] == 1
            roles[id(module.weight)] = "small matrices" if depthwise else "convolutions"
        elif (
            isinstance(module, nn.Linear)
            and tuple(module.weight.shape) in tables
            and shapes[tuple(module.weight.shape)] == 1
        ):
            roles[id(module.weight)] = "heads"
    # Last, because an embedding stays one wherever else its table is used.
    return roles | {id(p): "embeddings" for m in embeddings for p in m.values() if isinstance(p, mx.array)}


def check_parameter(name: str, parameter: mx.array) -> None:
    """Raises ValueError that names a parameter which no update rule can take: integers, complex numbers."""
    if not mx.issubdtype(parameter.dtype, mx.floating):
        raise ValueError(
            f"parameter {name} has dtype {parameter.dtype}; expected a floating-point parameter, or freeze it"
        )


def _kind(name: str, parameter: mx.array, role: str | None) -> str:
    """The group of a parameter whose module gives it ``role``."""
    check_parameter(name, parameter)
    if role in ("embeddings", "heads", "small matrices"):
        return role
    if parameter.ndim < 2:
        return "gains and biases"
    if parameter.ndim > 2 and role != "convolutions":
        raise ValueError(
            f"parameter {name} has shape {parameter.shape} and is no convolution's; expected at most two dimensions: "
            "give it to a group of its own, with algorithm 'adamw', or 'muon' and flatten=True or flatten=False"
        )
    rows = parameter.shape[0]
    if min(rows, parameter.size // max(1, rows)) <= 1:
        return "small matrices"
    return "convolutions" if role == "convolutions" else "matrices"


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


def _cut(
    name: str, split_sizes: Mapping[str, tuple[int, ...]], num_heads: Mapping[str, int]
) -> tuple[str, dict[str, Any]]:
    """The suffix of the group's name and its keys for a matrix that a pattern of either mapping matches; the first one counts."""
    for pattern, sizes in split_sizes.items():
        if fnmatchcase(name, pattern):
            return f" split {'+'.join(map(str, sizes))}", {"split_sizes": tuple(sizes)}
    for pattern, heads in num_heads.items():
        if fnmatchcase(name, pattern):
            return f" by {heads} heads", {"num_heads": heads}
    return "", {}


def _check_patterns(patterns: Iterable[str], names: list[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"the pattern {pattern!r} matches none of the {len(names)} matrices; expected the name of a matrix, * allowed"
            )


def param_groups(
    model: nn.Module,
    *,
    config: OptimConfig | None = None,
    split_sizes: Mapping[str, tuple[int, ...]] | None = None,
    num_heads: Mapping[str, int] | None = None,
) -> ParamGroups:
    """Routes every trainable parameter of ``model`` to one half of the optimizer; frozen ones are left out.

    Embeddings, everything tied to them, output heads, matrices of one row or column, depthwise convolutions and every parameter with
    fewer than two dimensions go to AdamW; other matrices and the weights of convolutions, flattened, go to Muon. ``split_sizes`` and
    ``num_heads`` say, by a pattern of parameter names (``*`` allowed), which fused weights are orthogonalised in blocks of rows:
    ``{"*.qkv.weight": (768, 256, 256)}``, ``{"*.q_proj.weight": 12}``.

    Raises ValueError that names the parameter for one that fits neither half, and the pattern for one that matches no matrix.
    """
    split_sizes, num_heads = split_sizes or {}, num_heads or {}
    options = _options(config or OptimConfig())
    roles = _roles(model)
    members: dict[str, list[Named]] = {}
    muon_names: list[str] = []
    for name, parameter in dict(tree_flatten(model.trainable_parameters())).items():
        kind = _kind(name, parameter, roles.get(id(parameter)))
        if options[kind]["algorithm"] == "muon":
            suffix, settings = _cut(name, split_sizes, num_heads)
            group = options.setdefault(kind + suffix, options[kind] | settings)
            blocks(parameter.shape, group, where=f"parameter {name}")
            muon_names.append(name)
            kind += suffix
        members.setdefault(kind, []).append((name, parameter))
    _check_patterns([*split_sizes, *num_heads], muon_names)
    return ParamGroups({"name": kind, "params": members[kind], **options[kind]} for kind in options if kind in members)
