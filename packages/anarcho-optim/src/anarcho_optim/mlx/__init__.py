"""Muon for matrices and AdamW for the rest, for MLX: the same names and the same numbers as `anarcho_optim.torch`.

Notable: matrices of one shape run as one batched iteration across layers; parameters are routed by module type and identity, never by name;
the state holds arrays only, under the names ``momentum``, ``neuron_mean_sq``, ``exp_avg``, ``exp_avg_sq`` and ``step``; gradients are never
modified; everything works inside `mx.compile`.

Sources: see `update`, `newton_schulz` and `qk_clip`.
"""

from anarcho_optim.groups import ParamGroups
from anarcho_optim.mlx.newton_schulz import orthogonalize, resolve_ns_dtype
from anarcho_optim.mlx.optimizers import Muon, MuonAdamW
from anarcho_optim.mlx.qk_clip import qk_clip
from anarcho_optim.mlx.routing import param_groups
from anarcho_optim.scaling import shape_scale

__all__ = [
    "Muon",
    "MuonAdamW",
    "ParamGroups",
    "orthogonalize",
    "param_groups",
    "qk_clip",
    "resolve_ns_dtype",
    "shape_scale",
]
