"""The factor that keeps gradients in float16's range: it is halved after an overflow and doubled after a long time without one.

The constants are those of torch.amp.GradScaler, so a run that goes on with another framework scales as before.
Source: Micikevicius et al. 2018, "Mixed Precision Training", arXiv:1710.03740.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GROWTH_FACTOR, BACKOFF_FACTOR, GROWTH_INTERVAL = 2.0, 0.5, 2000


@dataclass(kw_only=True)
class LossScale:
    """The scale, and how many steps it has held."""

    scale: float = 65536.0
    growth_tracker: int = 0
    """Steps without an overflow since the scale last changed."""

    def update(self, *, finite: bool) -> None:
        """Takes in whether the gradient of a step was finite."""
        if not finite:
            self.scale *= BACKOFF_FACTOR
            self.growth_tracker = 0
            return
        self.growth_tracker += 1
        if self.growth_tracker == GROWTH_INTERVAL:
            larger = self.scale * GROWTH_FACTOR
            self.scale = larger if np.isfinite(np.float32(larger)) else self.scale
            self.growth_tracker = 0
