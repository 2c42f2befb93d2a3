"""Routing: which parameter of a model goes to which half of the optimizer, by module type and identity, never by name.

Notable: a parameter that an embedding owns is an embedding under every other name, so tied heads and aliases never reach Muon; matrices
of one row or column and depthwise convolutions, whose channels are filters of their own, have nothing to orthogonalise and go to AdamW.
What a parametrization makes a module's weight from counts as that weight. Names are the model's own, whatever wraps it or its parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from anarcho_optim.config import OptimConfig
from anarcho_optim.groups import ParamGroups, adamw_options, blocks, muon_options

Named = tuple[str, Tensor]

EMBEDDING_MODULES = (nn.Embedding, nn.EmbeddingBag)


WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
"""The attributes under which torch.compile, activation checkpointing and FSDP keep what they wrap."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel and DistributedDataParallel."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def plain_name(name: str) -> str:
    """A parameter's name without the parts that wrappers of its modules add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _roles(model: nn.Module) -> dict[int, str]:
    """What the type of its module says about a parameter, by the parameter's id; parameters of other modules are not listed."""
    embeddings = [m for m in model.modules() if isinstance(m, EMBEDDING_MODULES)]
    tables = {(m.num_embeddings, m.embedding_dim) for m in embeddings}
    # A shape that several linear layers share is that of hidden layers, which a table of positions may have by chance.
    linears = [(m.out_features, m.in_features) for m in model.modules() if isinstance(m, nn.Linear)]
    shapes = Counter(shape for shape in linears if shape in tables)
    roles: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, _ConvNd):
            depthwise = module.groups > 1 and module.groups == module.in_channels
            roles |= _role_of_weights(module, "small matrices" if depthwise else "convolutions")
        elif isinstance(module, nn.Linear) and shapes[(module.out_features, module.in_features)] == 1:
            roles |= _role_of_weights(module, "heads")
    # Last, because an embedding stays one wherever else its table is used.
    for module in embeddings:
        roles |= _role_of_weights(module, "embeddings")
    return roles


def _role_of_weights(module: nn.Module, role: str) -> dict[int, str]:
    """``role`` for a module's weight and for what a parametrization, a module below it, computes it from; not for the bias."""
    return {id(p): role for p in module.parameters() if p.ndim >= 2}


def check_parameter(name: str, parameter: Tensor) -> None:
    """Raises ValueError that names a parameter which no update rule can take: not floating point, complex, or sparse."""
    if parameter.is_complex() or not parameter.is_floating_point():
        raise ValueError(
            f"parameter {name} has dtype {parameter.dtype}; expected a floating-point parameter, or freeze it"
        )
    if parameter.layout != torch.strided:
        raise ValueError(f"parameter {name} has layout {parameter.layout}; expected a dense parameter, or freeze it")


def _kind(name: str, parameter: Tensor, role: str | None) -> str:
    """The group of a parameter whose module gives it ``role``."""
    check_parameter(name, parameter)
    if role in ("embeddings", "heads", "small matrices"):
        return role
    if parameter.ndim < 2:
        return "gains and biases"
    if parameter.ndim > 2 and role != "convolutions":
        raise ValueError(
            f"parameter {name} has shape {tuple(parameter.shape)} and is no convolution's; expected at most two dimensions: "
            "give it to a group of its own, with algorithm 'adamw', or 'muon' and flatten=True or flatten=False"
        )
    rows = parameter.shape[0]
    if min(rows, parameter.numel() // max(1, rows)) <= 1:
        return "small matrices"
    return "convolutions" if parameter.ndim > 2 else "matrices"


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


def _settings_of(
    name: str, split_sizes: Mapping[str, tuple[int, ...]], num_heads: Mapping[str, int]
) -> tuple[str, dict[str, Any]]:
    """The suffix of the group's name and its keys for a matrix that a pattern of either mapping matches."""
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

    Embeddings, everything tied to them, output heads, matrices of one row or column, depthwise convolutions and every parameter with fewer
    than two dimensions go to AdamW; other matrices and the weights of convolutions go to Muon. Convolutions are flattened as they are
    stored: one row per output channel, (out, in / groups x kernel); one per input channel, (in, out / groups x kernel), where transposed.
    ``split_sizes`` and ``num_heads`` say, by a pattern of parameter names (``*`` allowed), which fused weights are orthogonalised in
    blocks of rows: ``{"*.qkv.weight": (768, 256, 256)}``, ``{"*.q_proj.weight": 12}``. Names, in patterns and in the groups, are the
    same whether or not ``model`` or a part of it is compiled, checkpointed or wrapped for data parallelism.

    Raises ValueError that names the parameter for one that fits neither half, and the pattern for one that matches no matrix.
    """
    split_sizes, num_heads = split_sizes or {}, num_heads or {}
    options = _options(config or OptimConfig())
    model = unwrapped(model)
    roles = _roles(model)
    members: dict[str, list[Named]] = {}
    muon_names: list[str] = []
    for full_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = plain_name(full_name)
        kind = _kind(name, parameter, roles.get(id(parameter)))
        if options[kind]["algorithm"] == "muon":
            suffix, settings = _settings_of(name, split_sizes, num_heads)
            group = options.setdefault(kind + suffix, options[kind] | settings)
            blocks(parameter.shape, group, where=f"parameter {name}")
            muon_names.append(name)
            kind += suffix
        members.setdefault(kind, []).append((name, parameter))
    _check_patterns([*split_sizes, *num_heads], muon_names)
    return ParamGroups({"name": kind, "params": members[kind], **options[kind]} for kind in options if kind in members)
