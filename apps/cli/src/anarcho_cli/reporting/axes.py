"""Scales of charts: round ticks, linear or logarithmic, and figures as people write them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from anarcho_cli.output import count_text

Unit = Literal["number", "rate", "count", "share", "bytes"]

GIB = 2**30

LOGARITHMIC_FROM = 50
"""Where the largest value is so many times the smallest, a linear scale would show one of them alone."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The stretch of values that a chart shows."""

    low: float
    high: float
    logarithmic: bool
    ticks: tuple[float, ...]

    def position(self, value: float) -> float:
        """Where a value lies, from 0 at the low end to 1 at the high end."""
        if self.logarithmic:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)


def make_scale(values: Sequence[float], *, from_zero: bool = False, unit: Unit = "number") -> Scale:
    """A scale for finite ``values``: linear with room to spare, or logarithmic where they span much and all are positive."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if not from_zero and low > 0 and high / low > LOGARITHMIC_FROM:
        return _logarithmic(low, high)
    if from_zero and low >= 0:
        low, high = 0.0, high or 1.0
    elif low == high:
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    spread = high - low
    bottom = low if from_zero and low == 0 else low - 0.04 * spread
    top = high + 0.06 * spread
    size = GIB if unit == "bytes" else 1
    ticks = tuple(size * tick for tick in linear_ticks(bottom / size, top / size))
    return Scale(low=bottom, high=top, logarithmic=False, ticks=ticks)


def step_scale(first: int, last: int) -> Scale:
    """The horizontal scale, from a step of a run to its last one."""
    low, high = float(first), float(max(first + 1, last))
    return Scale(low=low, high=high, logarithmic=False, ticks=linear_ticks(low, high, count=6, whole=True))


def linear_ticks(low: float, high: float, *, count: int = 5, whole: bool = False) -> tuple[float, ...]:
    """About ``count`` round numbers between ``low`` and ``high``."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    width = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    if whole:
        width = max(1.0, math.ceil(width))
    first, last = math.ceil(low / width - 1e-9), math.floor(high / width + 1e-9)
    # Rounded, because 3 * 0.1 is 0.30000000000000004.
    return tuple(float(f"{number * width:.12g}") for number in range(first, last + 1))


def _logarithmic(low: float, high: float) -> Scale:
    low, high = low / 1.15, high * 1.15
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(decades) > 4 else (1, 3)
    every = -(-len(decades) // 6)
    ticks = [factor * 10.0**power for power in decades[::every] for factor in factors]
    return Scale(low=low, high=high, logarithmic=True, ticks=tuple(tick for tick in ticks if low <= tick <= high))


def figure(value: float | None, unit: Unit = "number") -> str:
    """A value with the digits that matter, and its unit."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if unit == "share":
        return f"{100 * value:.3g} %"
    if unit == "bytes":
        return f"{value / GIB:.3g} GiB"
    if unit == "count":
        return count_text(value) if abs(value) >= 1000 else f"{value:.4g}"
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.3g}".split("e") if "e" in f"{value:.3g}" else f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.4g}" if abs(value) >= 1e-2 or unit == "rate" else f"{value:.3g}"


def tick_text(value: float, unit: Unit) -> str:
    """A tick's label; ticks are round, so few digits do."""
    if unit == "share":
        return f"{100 * value:g} %"
    if unit == "bytes":
        return f"{value / GIB:g}"
    if unit == "count":
        size, name = next(((s, n) for s, n in ((1e9, " B"), (1e6, " M"), (1e3, " k")) if abs(value) >= s), (1, ""))
        return f"{value / size:g}{name}"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{round(value, 10):g}"
