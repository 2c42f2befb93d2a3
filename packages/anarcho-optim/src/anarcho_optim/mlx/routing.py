"""Routing: which parameter of a model goes to which half of the optimizer, by module type and identity, never by name.

Notable: a parameter that an embedding owns is an embedding under every other name, so tied heads and aliases never reach Muon; matrices
of one row or column, depthwise convolutions included, have nothing to orthogonalise and go to AdamW. Convolutions are (out, ..., in) in
MLX and (out, in, ...) in torch; flattened, their columns are only permuted, which the update does not see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from anarcho_optim.config import OptimConfig
from anarcho_optim.groups import ParamGroups
from anarcho_optim.routing import collect_groups, kind_of

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
    roles = _roles(model)

    def members() -> Iterator[tuple[str, mx.array, str]]:
        for name, parameter in dict(tree_flatten(model.trainable_parameters())).items():
            check_parameter(name, parameter)
            yield name, parameter, kind_of(name, parameter.shape, roles.get(id(parameter)))

    return collect_groups(members(), config=config, split_sizes=split_sizes, num_heads=num_heads)
