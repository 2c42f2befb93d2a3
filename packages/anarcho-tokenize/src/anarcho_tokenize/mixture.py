"""Chooses the next source of a mixture: always the one that is furthest behind its weight.

The realised share of bytes thus differs from the weights by no more than one document of each source, at every moment and without chance.
It is stride scheduling (Waldspurger and Weihl 1995, https://hdl.handle.net/1721.1/149271) with bytes for time.
"""

from collections.abc import Iterable


def next_source(num_bytes: Iterable[int], weights: Iterable[float], *, candidates: Iterable[bool]) -> int | None:
    """Number of the candidate with the fewest bytes for its weight, the first of several; None where there is no candidate."""
    strides = [
        (taken / weight, number)
        for number, (taken, weight, is_candidate) in enumerate(zip(num_bytes, weights, candidates, strict=True))
        if is_candidate
    ]
    return min(strides)[1] if strides else None
