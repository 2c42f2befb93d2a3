"""Generating one text with MLX from guesses; see `anarcho_model.generate.speculation`."""

from __future__ import annotations

from functools import partial

from anarcho_model.generate import speculation
from anarcho_model.generate.stepping.mlx import Stepper

__all__ = ["DraftModel", "DraftedText"]

DraftedText = partial(speculation.DraftedText, stepping=Stepper)
DraftModel = partial(speculation.DraftModel, stepping=Stepper)
