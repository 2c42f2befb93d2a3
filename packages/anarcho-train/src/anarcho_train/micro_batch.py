"""How a step's samples are cut into what goes through the model at once: the arithmetic of choosing it, and making it smaller on the way.

Notable: the samples of a step are fixed, so a smaller micro-batch changes neither what is learned nor from what, but for rounding. All
micro-batches of a step have one shape where samples are sequences, because compiled functions are made for each shape anew. One loss
looks beyond its rows: KTO estimates its point of reference from the answers that go through the model together, so from fewer then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anarcho_train.interfaces import TrainingBatches
from anarcho_train.step import Batch

ROWS_TOGETHER = 2
"""Rows of a whole batch that are never parted: rows 2i and 2i + 1 may be two answers to one prompt."""


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def next_smaller(size: int, *, sequences: int) -> int | None:
    """The largest divisor of the step's ``sequences`` that is at most half of ``size``; None below 1."""
    return max((d for d in divisors(sequences) if 2 * d <= size), default=None)


def largest_fitting(size: int, *, sequences: int) -> int:
    """The largest divisor of a step's ``sequences`` that is at most ``size``."""
    return max(d for d in divisors(sequences) if d <= size)


@dataclass(frozen=True, kw_only=True)
class LinearPeak:
    """Peak memory as a line through measured peaks: what does not depend on the micro-batch, and what each sequence adds."""

    fixed_bytes: float
    sequence_bytes: float

    @classmethod
    def fit(cls, peaks: Mapping[int, int]) -> LinearPeak:
        """The least-squares line through ``{micro-batch: peak}`` of at least two sizes; it never falls."""
        sizes, values = np.array(list(peaks), dtype=np.float64), np.array(list(peaks.values()), dtype=np.float64)
        if len(sizes) < 2:
            raise ValueError(f"there are peaks of {len(sizes)} micro-batches; expected two sizes at least")
        spread = sizes - sizes.mean()
        slope = max(0.0, float((spread * values).sum() / (spread**2).sum()))
        # Where memory does not grow, the largest peak is what there must be room for.
        fixed = float((values - slope * sizes).max()) if slope == 0 else float(values.mean() - slope * sizes.mean())
        return cls(fixed_bytes=fixed, sequence_bytes=slope)

    def __call__(self, size: int) -> float:
        """Bytes at the peak of steps with this micro-batch."""
        return self.fixed_bytes + self.sequence_bytes * size


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some rows of a batch: views, not copies."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    positions: np.ndarray | None = None
    segments: np.ndarray | None = None
    reference: np.ndarray | None = None
    """What a reference model thinks of each row, where the batch has that."""

    @classmethod
    def of(cls, batch: Batch, first: int, stop: int) -> Rows:
        """Rows ``first`` to ``stop - 1``."""
        return cls._each(batch, lambda array: array[first:stop])

    @classmethod
    def cut(cls, batch: Batch, length: int) -> Rows:
        """All rows, each cut into sequences of ``length`` tokens, a divisor of theirs, which follow each other."""
        return cls._each(batch, lambda array: array.reshape(-1, length))

    @classmethod
    def _each(cls, batch: Batch, change: Callable[[np.ndarray], np.ndarray]) -> Rows:
        arrays: dict[str, Any] = {name: getattr(batch, name, None) for name in cls.__dataclass_fields__}
        parts: dict[str, Any] = {name: None if array is None else change(array) for name, array in arrays.items()}
        return cls(**parts)


class MicroBatches:
    """The cut of a run's steps.

    Samples are sequences of ``length`` tokens, of which ``size`` go through the model at once and ``samples`` make a step (or a
    process's share of it). Where ``whole``, samples are batches of changing shape, each of which goes through the model by itself, at
    most ``tokens`` of it at once: their rows are parted, those of a pair never.
    """

    def __init__(
        self, *, samples: int, length: int, size: int = 1, whole: bool = False, tokens: int | None = None
    ) -> None:
        self.samples, self.length, self.whole = samples, length, whole
        self.tokens = tokens if whole else size * length
        """Most tokens that go through the model at once; None is a whole sample, whatever its size."""
        self._begun_with = self.tokens

    @property
    def size(self) -> int:
        """Samples that are read at once: sequences, or one batch."""
        return 1 if self.whole or self.tokens is None else self.tokens // self.length

    def of(self, batches: TrainingBatches, first: int, count: int) -> list[Batch]:
        """The micro-batches of samples ``first`` to ``first + count - 1``."""
        read = [batches.batch(first + i, self.size) for i in range(0, count, self.size)]
        return [part for batch in read for part in self.parts(batch)]

    def parts(self, batch: Batch) -> Sequence[Batch]:
        """The batch in parts of one shape, none larger than what goes through the model at once."""
        rows = len(batch.tokens)
        most = self._rows_at_once(batch)
        if most >= rows:
            return [batch]
        return [Rows.of(batch, first, min(rows, first + most)) for first in range(0, rows, most)]

    def shrink(self, micro_batches: Sequence[Batch]) -> bool:
        """Makes what goes through the model at once at most half as large; False where ``micro_batches`` cannot be any smaller."""
        if not self.whole:
            smaller = next_smaller(self.size, sequences=self.samples)
            self.tokens = self.tokens if smaller is None else smaller * self.length
            return smaller is not None
        halves = [
            len(batch.tokens) // 2 * batch.tokens.shape[1]
            for batch in micro_batches
            if len(batch.tokens) > ROWS_TOGETHER
        ]
        self.tokens = max(halves, default=self.tokens)
        return bool(halves)

    def __str__(self) -> str:
        if self.whole:
            return "whole batches" if self.tokens is None else f"at most {self.tokens} tokens of a batch"
        return f"{self.size} of {self.samples} sequences"

    def state(self) -> dict[str, int | None]:
        """What a checkpoint keeps of it, as JSON values."""
        return {"tokens": self.tokens, "begun_with": self._begun_with}

    def load_state(self, state: Mapping[str, object]) -> None:
        """Takes up a size that memory has made smaller, unless a run that goes on begins with another one: that is then meant."""
        tokens = state.get("tokens")
        if not isinstance(tokens, int) or tokens < 1 or state.get("begun_with") != self._begun_with:
            return
        size, rest = divmod(tokens, self.length)
        fits = self.whole or (rest == 0 and size > 0 and self.samples % size == 0)
        if fits and (self.tokens is None or tokens < self.tokens):
            self.tokens = tokens

    def _rows_at_once(self, batch: Batch) -> int:
        rows, length = batch.tokens.shape
        together = ROWS_TOGETHER if self.whole else 1
        if self.tokens is None or rows * length <= self.tokens:
            return rows
        units = -(-rows // together)
        most = max(1, self.tokens // (length * together))
        return together * max(d for d in divisors(units) if d <= most)
