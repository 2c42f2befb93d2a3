"""The PyTorch half: Muon for matrices and AdamW for the rest, on CPU, MPS and CUDA, alone, under DDP and under FSDP2.

`newton_schulz` and `update` hold the mathematics, `routing` decides which parameter goes where, `optimizers` holds the classes and `state`
what they keep; `matrices` and `distributed` carry whole matrices between ranks, `fused` and `kernels` are the CUDA path.
"""

from anarcho_optim.groups import ParamGroups
from anarcho_optim.scaling import shape_scale
from anarcho_optim.torch.newton_schulz import native_bfloat16, orthogonalize, resolve_ns_dtype
from anarcho_optim.torch.optimizers import Muon, MuonAdamW
from anarcho_optim.torch.qk_clip import qk_clip
from anarcho_optim.torch.routing import param_groups

__all__ = [
    "Muon",
    "MuonAdamW",
    "ParamGroups",
    "native_bfloat16",
    "orthogonalize",
    "param_groups",
    "qk_clip",
    "resolve_ns_dtype",
    "shape_scale",
]
