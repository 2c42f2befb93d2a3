"""Rotary positions in PyTorch (RoPE, arXiv:2104.09864): the angles of all positions, and the rotation of queries and keys by them.

The angles are float32 whatever the weights' type. Shapes as in `anarcho_model.torch`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from anarcho_model.config import ModelConfig

__all__ = ["RotaryTables", "rotate", "rotate_halves"]


class RotaryTables(nn.Module):
    """Cosines and sines of every position, kept in float32 whatever the weights are cast to; not part of the state."""

    cos: Float[Tensor, "positions half"]
    sin: Float[Tensor, "positions half"]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._build(None)

    def _build(self, device: torch.device | None) -> None:
        positions = torch.arange(self.config.context_length, dtype=torch.float32, device=device)
        exponents = (
            torch.arange(0, self.config.head_size, 2, dtype=torch.float32, device=device) / self.config.head_size
        )
        frequencies = 1.0 / self.config.rope_theta**exponents  # in float32 like Transformers, or long texts drift apart
        if self.config.rope_scaling is not None:
            scaled = [self.config.rope_scaling.scale(frequency) for frequency in frequencies.tolist()]
            frequencies = torch.tensor(scaled, dtype=torch.float32, device=device)
        angles = positions[:, None] * frequencies
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def _apply(self, fn, recurse: bool = True):  # pyright: ignore[reportMissingParameterType]
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32:  # model.to(torch.bfloat16) has rounded the angles' cosines: make them anew
            self._build(self.cos.device)
        return self

    def forward(
        self, positions: Int[Tensor, "batch length"] | None, *, length: int
    ) -> tuple[Float[Tensor, "rows 1 length half"], Float[Tensor, "rows 1 length half"]]:
        """Tables for the given positions (rows = batch), or for 0 .. length - 1 (rows = 1)."""
        if positions is None:
            return self.cos[None, None, :length], self.sin[None, None, :length]
        return self.cos[positions][:, None], self.sin[positions][:, None]


def rotate(
    x: Float[Tensor, "batch heads length head"],
    cos: Float[Tensor, "rows 1 length half"],
    sin: Float[Tensor, "rows 1 length half"],
) -> Float[Tensor, "batch heads length head"]:
    """Turn the pairs (i, i + head/2) of each head by its position's angles, in float32; returned in the type of `x`."""
    if torch.compiler.is_compiling():
        return rotate_halves(x, cos, sin)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotate_halves(
    x: Float[Tensor, "batch heads length head"],
    cos: Float[Tensor, "rows 1 length half"],
    sin: Float[Tensor, "rows 1 length half"],
) -> Float[Tensor, "batch heads length head"]:
    """The same sums, of halves that change places: what is put together of two parts is compiled into slower code."""
    halves = x.unflatten(-1, (2, -1))
    signed = torch.stack((-sin, sin), dim=-2)
    return (halves * cos.unsqueeze(-2) + halves.flip(-2) * signed).flatten(-2).to(x.dtype)
