"""How far a run has come: the numbers that change while it goes on, and what a checkpoint keeps of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(kw_only=True)
class TrainResult:
    """How a run ended."""

    step: int
    """Optimizer steps made, earlier attempts included."""
    tokens: int
    """Tokens consumed, earlier attempts included."""
    validation_loss: float | None = None
    """Last validation loss, in nats per token or pair."""
    bits_per_byte: float | None = None
    """The same in bits per byte of text; None of a stage that has measures of its own."""
    validation_measures: dict[str, float] = field(default_factory=dict)
    """What the stage measures besides its loss, such as the accuracy of preferences, on the validation data."""
    best_step: int | None = None
    """Step of the lowest validation loss."""
    stopped_by: int | None = None
    """Number of the signal that stopped the run early."""
    checkpoint: Path | None = None
    """The last checkpoint."""


@dataclass(kw_only=True)
class Progress:
    """The run as of now."""

    result: TrainResult = field(default_factory=lambda: TrainResult(step=0, tokens=0))
    """How it would end now."""
    compared_loss: float | None = None
    """The validation loss by which steps are compared, where this step has one."""
    finished: bool = False
    """Whether it ends here, before the configured number of steps."""
    saved_step: int | None = None
    """The step of the newest checkpoint that is written, or being written."""
    whole: bool = True
    """Whether model and counters are of one step."""
    concluded: bool = True
    """Whether all is done that is due after it."""

    @classmethod
    def restored(cls, state: Mapping[str, Any], checkpoint: Path | None, *, best_step: int | None) -> Progress:
        """That of a checkpoint's state, or of the beginning."""
        result = TrainResult(
            step=int(state["step"]),
            tokens=int(state["tokens"]),
            validation_loss=state.get("validation_loss"),
            bits_per_byte=state.get("bits_per_byte"),
            validation_measures=state.get("validation_measures", {}),
            best_step=best_step,
            checkpoint=checkpoint,
        )
        return cls(
            result=result,
            compared_loss=state.get("compared_loss"),
            finished=bool(state.get("finished")),
            saved_step=result.step,
        )

    def count_step(self, tokens: int) -> None:
        """One step more, of which all is still to be done that is due after it."""
        self.whole = self.concluded = False
        self.result.step += 1
        self.result.tokens += tokens
        # The validation figures belong to the step at which they were measured.
        self.result.validation_measures = {}
        self.result.validation_loss = self.result.bits_per_byte = self.compared_loss = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it besides the step, as JSON values."""
        result = self.result
        state = {
            "tokens": result.tokens,
            "validation_loss": _finite(result.validation_loss),
            "bits_per_byte": _finite(result.bits_per_byte),
            "compared_loss": _finite(self.compared_loss),
            "finished": self.finished,
        }
        if result.validation_measures:
            state["validation_measures"] = {
                name: value for name, value in result.validation_measures.items() if math.isfinite(value)
            }
        return state


def _finite(value: float | None) -> float | None:
    """The value as JSON has it; what is not finite is no measurement."""
    return value if value is not None and math.isfinite(value) else None
