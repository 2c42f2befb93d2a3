"""Coefficients of the odd quintic Newton-Schulz iterations that Muon uses.

One row ``(a, b, c)`` is one step of ``X <- aX + b(XX')X + c(XX')^2 X``.

Notable: ``polar-express`` is the optimal composition for singular values in [1e-3, 1] computed in bfloat16; its safety factor divides the
input, so that rounding cannot push a singular value past the interval in which the iteration converges.

Sources: ``jordan`` is Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon/), also torch.optim.Muon's default;
``polar-express`` is Amsel, Persson, Musco and Gower, "The Polar Express", arXiv:2505.16932 (safety 2e-2, cushion 2).
"""

from __future__ import annotations

from dataclasses import dataclass

Coefficients = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One named Newton-Schulz iteration."""

    coefficients: Coefficients
    """One (a, b, c) triple per step."""
    safety: float
    """The normalised input is divided by this factor (1 or slightly more) before the first step."""


VARIANTS: dict[str, Variant] = {
    "jordan": Variant(coefficients=((3.4445, -4.7750, 2.0315),) * 5, safety=1.0),
    "polar-express": Variant(
        coefficients=(
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        safety=1.02,
    ),
}


def variant(name: str) -> Variant:
    """The iteration called ``name``; raises ValueError that lists the known names."""
    if name not in VARIANTS:
        raise ValueError(f"optim.variant is {name!r}; expected one of {', '.join(VARIANTS)}")
    return VARIANTS[name]
