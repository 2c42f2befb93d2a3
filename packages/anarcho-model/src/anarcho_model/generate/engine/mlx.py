"""Generating for many requests at once with MLX; see `anarcho_model.generate.batching`."""

from __future__ import annotations

from functools import partial

from anarcho_model.generate import batching
from anarcho_model.generate.batching import EndedBy, NewToken, Request
from anarcho_model.generate.stepping.mlx import Stepper

__all__ = ["EndedBy", "Engine", "NewToken", "Request"]

Engine = partial(batching.Engine, stepping=Stepper)
