"""Muon and AdamW in one optimizer, with learning-rate schedules.

``anarcho_optim.torch`` and ``anarcho_optim.mlx`` hold the halves (`MuonAdamW`, `Muon`, `param_groups`), with the same names; importing this
package loads no framework.
"""

from anarcho_optim.coefficients import VARIANTS, Variant
from anarcho_optim.config import OptimConfig

__all__ = ["VARIANTS", "OptimConfig", "Variant"]
