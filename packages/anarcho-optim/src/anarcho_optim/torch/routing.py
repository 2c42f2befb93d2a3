"""Routing: which parameter of a model goes to which half of the optimizer, by module type and identity, never by name.

Notable: a parameter that an embedding owns is an embedding under every other name, so tied heads and aliases never reach Muon; matrices of one
row or column, depthwise convolutions included, have nothing to orthogonalise and go to AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from anarcho_optim.config import OptimConfig
from anarcho_optim.groups import ParamGroups, adamw_options, blocks, muon_options

Named = tuple[str, Tensor]

EMBEDDING_MODULES = (nn.Embedding, nn.EmbeddingBag)


def _embedding_tables(model: nn.Module) -> list[Tensor]:
    """Tables of embeddings, which whatever is tied to them shares."""
    return [p for m in model.modules() if isinstance(m, EMBEDDING_MODULES) for p in m.parameters(recurse=False)]


def _output_heads(model: nn.Module, tables: list[Tensor]) -> Iterator[Tensor]:
    """Weights of linear layers from an embedding's width to its vocabulary; tied ones are among ``tables`` themselves."""
    vocabularies = {tuple(p.shape) for p in tables}
    for module in model.modules():
        if isinstance(module, nn.Linear) and (module.out_features, module.in_features) in vocabularies:
            yield module.weight


def check_parameter(name: str, parameter: Tensor) -> None:
    """Raises ValueError that names a parameter which no update rule can take: not floating point, complex, or sparse."""
    if parameter.is_complex() or not parameter.is_floating_point():
        raise ValueError(
            f"parameter {name} has dtype {parameter.dtype}; expected a floating-point parameter, or freeze it"
        )
    if parameter.layout != torch.strided:
        raise ValueError(f"parameter {name} has layout {parameter.layout}; expected a dense parameter, or freeze it")


def _kind(name: str, parameter: Tensor, *, embeddings: set[int], heads: set[int], convolutions: set[int]) -> str:
    check_parameter(name, parameter)
    if id(parameter) in embeddings:
        return "embeddings"
    if id(parameter) in heads:
        return "heads"
    if parameter.ndim < 2:
        return "gains and biases"
    rows, columns = parameter.shape[0], parameter.numel() // max(1, parameter.shape[0])
    if id(parameter) in convolutions or parameter.ndim == 2:
        depthwise = parameter.ndim > 2 and parameter.shape[1] == 1
        if min(rows, columns) <= 1 or depthwise:
            return "small matrices"
        return "matrices" if parameter.ndim == 2 else "convolutions"
    raise ValueError(
        f"parameter {name} has shape {tuple(parameter.shape)} and is no convolution's; expected at most two dimensions: "
        "give it to a group of its own, with algorithm 'adamw', or 'muon' and flatten=True or flatten=False"
    )


def _settings_of(
    name: str, split_sizes: Mapping[str, tuple[int, ...]], num_heads: Mapping[str, int]
) -> tuple[str, dict[str, Any]]:
    """The suffix of the group's name and its keys for a matrix that a pattern of either mapping matches."""
    for pattern, sizes in split_sizes.items():
        if fnmatch(name, pattern):
            return f" split {'+'.join(map(str, sizes))}", {"split_sizes": tuple(sizes)}
    for pattern, heads in num_heads.items():
        if fnmatch(name, pattern):
            return f" by {heads} heads", {"num_heads": heads}
    return "", {}


def _check_patterns(patterns: Iterable[str], names: Iterable[str]) -> None:
    names = list(names)
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
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

    Embeddings, everything tied to them, output heads, matrices of one row or column and every parameter with fewer than two dimensions go to
    AdamW; other matrices and the weights of convolutions, flattened, go to Muon. ``split_sizes`` and ``num_heads`` say, by a pattern of
    parameter names (``*`` allowed), which fused weights are orthogonalised in blocks of rows: ``{"*.qkv.weight": (768, 256, 256)}``,
    ``{"*.q_proj.weight": 12}``.

    Raises ValueError that names the parameter for one that fits neither half, and the pattern for one that matches no matrix.
    """
    config = config or OptimConfig()
    split_sizes, num_heads = split_sizes or {}, num_heads or {}
    tables = _embedding_tables(model)
    ids = {
        "embeddings": {id(p) for p in tables},
        "heads": {id(p) for p in _output_heads(model, tables)},
        "convolutions": {id(m.weight) for m in model.modules() if isinstance(m, _ConvNd)},
    }
    adamw_lr = config.lr if config.adamw_lr is None else config.adamw_lr
    decay = config.adamw_weight_decay
    options: dict[str, dict[str, Any]] = {
        "matrices": muon_options(config),
        "convolutions": muon_options(config) | {"flatten": True},
        "embeddings": adamw_options(config, lr=config.embedding_lr or adamw_lr, weight_decay=decay),
        "heads": adamw_options(config, weight_decay=decay),
        "small matrices": adamw_options(config, weight_decay=decay),
        "gains and biases": adamw_options(config),
    }
    members: dict[str, list[Named]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = _kind(name, parameter, **ids)
        if kind in ("matrices", "convolutions"):
            suffix, settings = _settings_of(name, split_sizes, num_heads)
            group = options.setdefault(kind + suffix, options[kind] | settings)
            blocks(parameter.shape, group, where=f"parameter {name}")
            kind += suffix
        members.setdefault(kind, []).append((name, parameter))
    muon_names = [name for kind, group in members.items() if "momentum" in options[kind] for name, _ in group]
    _check_patterns([*split_sizes, *num_heads], muon_names)
    order = sorted(members, key=lambda kind: list(options).index(kind))
    return ParamGroups({"name": kind, "params": members[kind], **options[kind]} for kind in order)
