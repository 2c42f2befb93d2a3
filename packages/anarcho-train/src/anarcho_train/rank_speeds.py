"""How long each rank works on a step and waits for its data, and whether one of them always holds up the others.

Notable: what is told travels in the exchange before the next step, so nothing waits for it. A rank's own seconds are those of its step
without what it waited for others, as far as it knows that (`Ranks.waited_seconds`): where replicas train, all of it but the exchange of
gradients; of a model in shards every block waits for all ranks, so that all seem equally slow and only their data tells them apart.

A rank is called a straggler where, of 50 steps, it was the slowest one in 45 and its median is a tenth above that of the others. Of two
ranks alike, one is the slowest so often by chance once in 10^8 times; a tenth is what a run would gain at least without it.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from anarcho_train.ranks import Ranks, texts

WINDOW = 50
"""Steps on which a judgement rests."""
TIMES_SLOWEST = 45
"""Of them, in which a straggler is the slowest."""
SLOWER_BY = 0.1
"""Share by which its median exceeds that of the others."""

Row = tuple[float, float]


class RankSpeeds:
    """The seconds of this rank and of all others; one that is alone has nothing to tell."""

    def __init__(self) -> None:
        self._read = 0.0
        self._told: Row = (0.0, 0.0)
        self._recent: list[np.ndarray] = []
        self._judged: list[np.ndarray] = []
        self._straggler: int | None = None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """This rank reads or waits for the samples of its next step."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._read += time.monotonic() - begin

    @contextmanager
    def stepping(self, ranks: Ranks) -> Iterator[None]:
        """This rank makes a step."""
        begin, waited = time.monotonic(), ranks.waited_seconds
        yield
        own = time.monotonic() - begin - (ranks.waited_seconds - waited)
        self._told, self._read = (max(own, 0.0), self._read), 0.0

    def to_tell(self) -> Row:
        """Seconds of the step that was made last, and of waiting for its data; once."""
        told, self._told = self._told, (0.0, 0.0)
        return told

    def take(self, told: Sequence[Row], ranks: Ranks) -> str | None:
        """Takes what every rank has told; returns a sentence about one that has become a straggler. All ranks judge alike."""
        rows = np.array(told)
        if ranks.size == 1 or not rows[:, 0].all():
            return None
        self._recent.append(rows)
        self._judged.append(rows)
        if len(self._judged) < WINDOW:
            return None
        seconds, self._judged = np.array(self._judged), []
        before, self._straggler = self._straggler, straggler(seconds.sum(axis=-1))
        if self._straggler in (None, before):
            return None
        return _sentence(self._straggler, seconds, machine=texts(ranks, platform.node())[self._straggler])

    def metrics(self) -> dict[str, float]:
        """The spread over the ranks of the means of a step's seconds since the last call."""
        if not self._recent:
            return {}
        steps, waits = np.array(self._recent).mean(axis=0).T
        self._recent = []
        return {
            "rank_seconds_fastest": float(steps.min()),
            "rank_seconds_median": float(np.median(steps)),
            "rank_seconds_slowest": float(steps.max()),
            "rank_data_wait_median": float(np.median(waits)),
            "rank_data_wait_longest": float(waits.max()),
            "slowest_rank": int((steps + waits).argmax()),
        }


def straggler(seconds: np.ndarray) -> int | None:
    """The rank that holds up the others, of seconds (steps, ranks); None where there is none."""
    counts = np.bincount(seconds.argmax(axis=1), minlength=seconds.shape[1])
    slowest = int(counts.argmax())
    own, others = np.median(seconds[:, slowest]), np.median(np.delete(seconds, slowest, axis=1))
    often = counts[slowest] >= TIMES_SLOWEST / WINDOW * len(seconds)
    return slowest if often and own > (1 + SLOWER_BY) * others else None


def _sentence(rank: int, seconds: np.ndarray, *, machine: str) -> str:
    own, data = np.median(seconds.sum(axis=-1)[:, rank]), np.median(seconds[:, rank, 1])
    others = np.median(np.delete(seconds.sum(axis=-1), rank, axis=1))
    return (
        f"rank {rank} on {machine or 'a machine without a name'} holds up the others: it takes {own:.3g} s for a step, {data:.3g} s of "
        f"them for its data, and they take {others:.3g} s (medians of {len(seconds)} steps, without waiting for each other)"
    )
