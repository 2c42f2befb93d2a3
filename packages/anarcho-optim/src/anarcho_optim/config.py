"""The optimizer's settings, free of any framework, so that a configuration can be read and checked without loading one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from anarcho_optim.coefficients import variant
from anarcho_optim.scaling import ADJUST_LR_FNS

NS_DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Names of the arithmetic of the Newton-Schulz iteration."""

SCHEDULES = ("cosine", "linear", "wsd", "constant")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Muon for the matrices of the blocks, AdamW for everything else, under one learning-rate schedule."""

    lr: float = 2e-3
    """Learning rate of the Muon half at the top of the schedule."""
    adamw_lr: float | None = None
    """Learning rate of the AdamW half at the top of the schedule; left out, the same as `lr`."""
    embedding_lr: float | None = None
    """Learning rate of embedding tables at the top of the schedule, heads tied to them included; left out, `adamw_lr`."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices: each step multiplies them by `1 - lr * weight_decay`."""
    adamw_weight_decay: float = 0.0
    """Decoupled weight decay of embeddings and output heads; gains and biases are never decayed."""
    momentum: float = 0.95
    """Muon's momentum."""
    nesterov: bool = True
    """Whether Muon looks ahead along the momentum."""
    variant: Literal["polar-express", "polar-express-8", "jordan", "you"] = "polar-express"
    """Newton-Schulz coefficients."""
    adjust_lr_fn: Literal["original", "match_rms_adamw", "spectral"] = "match_rms_adamw"
    """How the update is scaled for a matrix's shape; `match_rms_adamw` lets one learning rate serve both halves."""
    ns_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the Newton-Schulz iteration; `auto` takes float16 on CUDA, bfloat16 on CPUs that have it natively, else float32."""
    cautious_weight_decay: bool = False
    """Whether a matrix entry is decayed only where the update moves it towards zero."""
    normuon: bool = False
    """Whether each neuron's update is divided by the root of its running mean square (NorMuon)."""
    normuon_beta2: float = 0.95
    """Decay of NorMuon's running mean square."""
    normuon_axis: Literal[-1, -2] = -1
    """Axis that NorMuon averages over: -1 gives one value per row (output), -2 one per column (input)."""
    row_equilibration: bool = False
    """Whether the rows of the momentum are brought to one norm before the iteration."""
    frobenius_normalization: bool = False
    """Whether the orthogonal update is rescaled to the Frobenius norm of an exactly orthogonal matrix."""
    beta1: float = 0.9
    """AdamW's decay of the mean of gradients."""
    beta2: float = 0.95
    """AdamW's decay of the mean of squared gradients."""
    eps: float = 1e-10
    """AdamW's guard of the denominator."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: int = 100
    """Optimizer steps of linear warm-up."""
    decay_fraction: float = 0.2
    """Share of all steps that the `wsd` schedule spends on its final linear decay."""
    final_lr_fraction: float = 0.1
    """Learning rate at the last step as a fraction of the top."""
    momentum_warmup_steps: int = 0
    """Steps over which Muon's momentum rises linearly from 0.85 to `momentum`; 0 keeps it constant."""

    def __post_init__(self) -> None:
        variant(self.variant)
        for name in ("lr", "eps", "adamw_lr", "embedding_lr"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"optim.{name} is {value}; expected a positive number")
        for name in ("weight_decay", "adamw_weight_decay"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"optim.{name} is {getattr(self, name)}; expected zero or a positive number")
        for name in ("momentum", "beta1", "beta2", "normuon_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; expected a number of at least 0 and below 1")
        for name in ("decay_fraction", "final_lr_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; expected a fraction between 0 and 1")
        for name in ("warmup_steps", "momentum_warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; expected zero or more steps")
        choices = {
            "adjust_lr_fn": ADJUST_LR_FNS,
            "ns_dtype": NS_DTYPES,
            "schedule": SCHEDULES,
            "normuon_axis": (-1, -2),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"optim.{name} is {getattr(self, name)!r}; expected one of {', '.join(map(str, allowed))}"
                )
