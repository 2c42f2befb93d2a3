"""Estimates with standard errors, all of one form: a ratio of sums over independent items, or its exponential.

An accuracy is right answers by answers, bits per byte are bits by bytes of documents, a perplexity is the exponential of nats by tokens.
The standard error is that of the ratio to first order (Taylor linearisation; Cochran 1977, Sampling Techniques, chapter 6), with a document
as the unit that is drawn, since the tokens of one depend on each other. For an accuracy p of n answers it is sqrt(p (1 - p) / (n - 1)).
Each item's influence on the estimate is kept, so that the difference of two models on equal items has a paired standard error, which is
much smaller than that of independent ones (Miller 2024, arXiv:2411.00640).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """A number, and what each item adds to its error."""

    value: float
    influences: npt.NDArray[np.float64]
    """First-order effect of each item on the value, of shape (items,); their sum is 0."""

    @property
    def standard_error(self) -> float | None:
        """Of the value over samples of items; None where a single item says nothing of it."""
        count = len(self.influences)
        if count < 2:
            return None
        return math.sqrt(count / (count - 1) * float(np.square(self.influences).sum()))

    def minus(self, other: Estimate) -> Estimate:
        """The difference on the same items, in the same order."""
        if len(self.influences) != len(other.influences):
            raise ValueError(
                f"estimates of {len(self.influences)} and {len(other.influences)} items have no paired difference; "
                "expected the same items"
            )
        return Estimate(value=self.value - other.value, influences=self.influences - other.influences)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """The sum of the one by the sum of the other, whose sum must be above 0."""
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    total = below.sum()
    value = above.sum() / total
    return Estimate(value=float(value), influences=(above - value * below) / total)


def mean(values: Sequence[float]) -> Estimate:
    """The mean of at least one value."""
    return ratio(values, np.ones(len(values)).tolist())


def exponential(estimate: Estimate) -> Estimate:
    """e to the estimate; infinite where it is beyond the range of floating point."""
    value = math.exp(estimate.value) if estimate.value < 700 else math.inf
    return Estimate(value=value, influences=value * estimate.influences if value < math.inf else estimate.influences)
