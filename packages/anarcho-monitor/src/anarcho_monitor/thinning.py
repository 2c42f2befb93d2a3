"""Fewer points of a long curve, with all that a person must not miss.

Notable: of each bucket of steps the smallest and the largest value stay, so that a spike of one step among millions is drawn at its full
height; averages would hide it, every n-th point would mostly skip it. A value that is not finite stays as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from anarcho_monitor.errors import MonitorError
from anarcho_monitor.metrics import Point


def thin(points: Sequence[Point], *, buckets: int) -> list[Point]:
    """At most ``3 * buckets + 2`` of ``points``, which are sorted by step: the first, the last, and of each bucket the extremes.

    Buckets are equal stretches of steps. Where there are no more than ``2 * buckets`` points, all stay.
    """
    if buckets < 1:
        raise MonitorError(f"The number of buckets is {buckets}, but it must be at least 1: raise it.")
    if len(points) <= 2 * buckets:
        return list(points)
    begin, width = points[0].step, (points[-1].step - points[0].step) / buckets or 1
    kept = {0, len(points) - 1}
    bucket: list[int] = []
    number = 0
    for index, point in enumerate(points):
        own = min(buckets - 1, int((point.step - begin) / width))
        if own != number:
            kept |= _extremes(points, bucket)
            bucket, number = [], own
        bucket.append(index)
    kept |= _extremes(points, bucket)
    return [points[index] for index in sorted(kept)]


def _extremes(points: Sequence[Point], bucket: Sequence[int]) -> set[int]:
    """The places of the smallest and the largest finite value, and of the first one that is not finite."""
    finite = [index for index in bucket if math.isfinite(points[index].value)]
    others = next((index for index in bucket if not math.isfinite(points[index].value)), None)
    kept = set() if others is None else {others}
    if finite:
        kept |= {min(finite, key=lambda index: points[index].value), max(finite, key=lambda index: points[index].value)}
    return kept
