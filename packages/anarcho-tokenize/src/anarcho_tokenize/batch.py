"""A batch of packed rows, and how rows are read from token shards.

A row is made of pieces: ranges [start, stop) of the stored tokens that are to be predicted, each from the token before it, so the
inputs of a piece are the tokens [start - 1, stop - 1). Before the first token of all stands end-of-text. What follows the pieces of a
row is padding of weight 0.

A text's tokens are all targets, its first one after the end-of-text of the text before. Of a conversation, which has no end-of-text,
the first token is an input alone: its weight is 0 wherever it is a target. The other weights are 1, or the loss mask of the shards.

Shapes: B rows (samples), T = length.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from anarcho_tokenize.shards import TokenShards

Piece = tuple[int, int]
"""A range of stored tokens: its start and its end."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Inputs and what they should predict, as NumPy arrays of shape (B, T)."""

    tokens: npt.NDArray[np.int32]
    """Input ids."""

    targets: npt.NDArray[np.int32]
    """The id that follows each input."""

    weights: npt.NDArray[np.float32]
    """1 where the target counts, 0 where it does not and at padding."""

    positions: npt.NDArray[np.int32] | None = None
    """Distance from the document's start (or the piece's, if later); None where documents are not isolated."""

    segments: npt.NDArray[np.int32] | None = None
    """Number of the document within its row, from 0, padding having its own; None where documents are not isolated."""


class BatchReader:
    """Reads rows from shards."""

    def __init__(self, shards: TokenShards, *, length: int, isolate_documents: bool) -> None:
        self._shards = shards
        self._length = length
        self._isolate_documents = isolate_documents
        self._of_text = shards.kind == "text"
        self._documents_of_shard = lru_cache(maxsize=256)(shards.shard_documents)

    def batch(self, rows: Sequence[Sequence[Piece]]) -> Batch:
        """The rows of these pieces; a row of none is padding alone."""
        shape = (len(rows), self._length)
        tokens = np.full(shape, self._shards.pad_id, dtype=np.int32)
        targets = np.full(shape, self._shards.pad_id, dtype=np.int32)
        weights = np.zeros(shape, dtype=np.float32)
        begins = np.zeros(shape, dtype=np.bool_)  # whether a segment begins at an input
        begins[:, 0] = True
        for row, pieces in enumerate(rows):
            column = 0
            for start, stop in pieces:
                part = slice(column, column := column + stop - start)
                stream = self._stream(start, stop)
                tokens[row, part], targets[row, part] = stream[:-1], stream[1:]
                weights[row, part], begins[row, part] = self._weights(start, stop), self._begins(start, stream)
            begins[row, column : column + 1] = True
        if not self._isolate_documents:
            return Batch(tokens=tokens, targets=targets, weights=weights)
        segments, positions = _isolated(begins)
        return Batch(tokens=tokens, targets=targets, weights=weights, positions=positions, segments=segments)

    def total_weight(self) -> int:
        """The sum of the weights of all stored tokens."""
        if self._of_text:
            return self._shards.num_tokens - self._shards.damaged_tokens
        bounds = self._shards.shard_starts
        return sum(int(self._weights(start, stop).sum()) for start, stop in pairwise(bounds))

    def _stream(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """The tokens [start - 1, stop). The end-of-text before a shard of texts is known, also where what is before was deleted."""
        bounds = self._shards.shard_starts
        if start > 0 and not (self._of_text and bounds[bisect_left(bounds, start)] == start):
            return self._shards.tokens(start - 1, stop).astype(np.int32)
        stream = np.full(stop - start + 1, self._shards.eot_id, dtype=np.int32)
        stream[1:] = self._shards.tokens(start, stop)
        return stream

    def _weights(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """What the tokens [start, stop) count as targets."""
        if self._of_text and not self._shards.damaged:
            return np.ones(stop - start, dtype=np.float32)
        if self._of_text:
            return self._shards.loss_mask(start, stop).astype(np.float32)
        weights = self._shards.loss_mask(start, stop).astype(np.float32)
        weights[self._documents(start, stop) - start] = 0
        return weights

    def _begins(self, start: int, stream: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """Whether a segment begins at each input of the piece at `start`, which are the `stream` without its last token."""
        if self._of_text:
            begins = stream[:-1] == self._shards.eot_id
        else:
            begins = np.zeros(len(stream) - 1, dtype=np.bool_)
            begins[self._documents(max(start - 1, 0), start + len(begins) - 1) - (start - 1)] = True
        begins[0] = True
        return begins

    def _documents(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The documents' starts among the tokens [start, stop)."""
        bounds, found = self._shards.shard_starts, []
        for number in range(bisect_right(bounds, start) - 1, bisect_left(bounds, stop)):
            starts = self._documents_of_shard(number)[:-1]
            found.append(starts[np.searchsorted(starts, start) : np.searchsorted(starts, stop)])
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def _isolated(begins: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Segments and positions."""
    columns = np.arange(begins.shape[1], dtype=np.int32)
    last_start = np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    segments = np.cumsum(begins, axis=1, dtype=np.int32) - 1
    return segments.astype(np.int32), (columns - last_start).astype(np.int32)
