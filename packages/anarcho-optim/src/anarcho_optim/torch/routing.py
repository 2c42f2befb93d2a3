"""Routing: which parameter of a model goes to which half of the optimizer, by module type and identity, never by name.

Notable: a parameter that an embedding owns is an embedding under every other name, so tied heads and aliases never reach Muon; matrices
of one row or column and depthwise convolutions, whose channels are filters of their own, have nothing to orthogonalise and go to AdamW.
What a parametrization makes a module's weight from counts as that weight. Names are the model's own, whatever wraps it or its parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from anarcho_optim.config import OptimConfig
from anarcho_optim.groups import ParamGroups
from anarcho_optim.routing import collect_groups, kind_of

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
    model = unwrapped(model)
    roles = _roles(model)

    def members() -> Iterator[tuple[str, Tensor, str]]:
        for full_name, parameter in model.named_parameters():
            if parameter.requires_grad:
                name = plain_name(full_name)
                check_parameter(name, parameter)
                yield name, parameter, kind_of(name, parameter.shape, roles.get(id(parameter)))

    return collect_groups(members(), config=config, split_sizes=split_sizes, num_heads=num_heads)
