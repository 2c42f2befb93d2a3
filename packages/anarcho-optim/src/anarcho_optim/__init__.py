"""Muon and AdamW in one optimizer, with learning-rate schedules.

``anarcho_optim.torch`` holds the PyTorch half (`MuonAdamW`, `param_groups`); importing this package loads no framework.
"""

from anarcho_optim.coefficients import VARIANTS, Variant
from anarcho_optim.config import OptimConfig

__all__ = ["VARIANTS", "OptimConfig", "Variant"]
