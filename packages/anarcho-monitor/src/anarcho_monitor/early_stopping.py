"""Early stopping on a value that should fall, such as the validation loss, and the best value seen so far.

Notable: the best value is the smallest one ever seen, so that it always names the best checkpoint, while patience counts
from the last fall of more than `min_delta`. The state is plain JSON and belongs into the checkpoint, or a resumed run would
stop later than one that was never interrupted.
"""

from __future__ import annotations

import math
from typing import Any

from anarcho_monitor.errors import MonitorError


class EarlyStopping:
    """Says when `patience` updates in a row brought no fall of more than `min_delta`; patience 0 never stops."""

    def __init__(self, *, patience: int, min_delta: float = 0.0) -> None:
        if patience < 0:
            raise MonitorError(
                f"Early-stopping patience is {patience}, but it must be 0 (never stop) or more: raise it."
            )
        if not min_delta >= 0:
            raise MonitorError(f"Early-stopping min_delta is {min_delta}, but it must be 0 or more: raise it.")
        self.patience = patience
        self.min_delta = min_delta
        self.best_value: float | None = None
        self.best_step: int | None = None
        self._reference: float | None = None
        self._updates_without_gain = 0

    def update(self, value: float, step: int) -> bool:
        """Takes the value measured at `step`; True where the run should stop. NaN counts as no gain."""
        if not math.isnan(value) and (self.best_value is None or value < self.best_value):
            self.best_value, self.best_step = value, step
        gained = not math.isnan(value) and (self._reference is None or value < self._reference - self.min_delta)
        if gained:
            self._reference = value
            self._updates_without_gain = 0
        else:
            self._updates_without_gain += 1
        return self.patience > 0 and self._updates_without_gain >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Everything that `update` depends on besides the settings, as JSON values."""
        return {
            "best_value": self.best_value,
            "best_step": self.best_step,
            "reference": self._reference,
            "updates_without_gain": self._updates_without_gain,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a `state_dict`; raises `MonitorError` where a key is missing."""
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise MonitorError(
                f"The early-stopping state lacks {', '.join(missing)}: it must be what state_dict() returned; "
                "resume from another checkpoint."
            )
        self.best_value, self.best_step = state["best_value"], state["best_step"]
        self._reference, self._updates_without_gain = state["reference"], state["updates_without_gain"]
