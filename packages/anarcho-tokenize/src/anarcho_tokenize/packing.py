"""Batches from token shards: windows of one long stream, in an order that integers describe.

The stream is end-of-text followed by all tokens of the shards (each document ends in end-of-text, which so also stands before
the next). Window k of length L has the inputs stream[kL : kL+L] and the targets stream[kL+1 : kL+L+1]: every stored token is a target
exactly once an epoch, and nothing is dropped. The last window is filled up with padding of weight 0.

Sample i, counted from 0 without end, is window `Permutation(seed, epoch)(cursor)` with epoch, cursor = divmod(i, num_windows): a run
that consumed n samples resumes at sample n.

Shapes: B rows (samples), T = length.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anarcho_tokenize.errors import ShardError
from anarcho_tokenize.permutation import Permutation
from anarcho_tokenize.shards import TokenShards


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Inputs and what they should predict, as NumPy arrays of shape (B, T)."""

    tokens: npt.NDArray[np.int32]
    """Input ids."""

    targets: npt.NDArray[np.int32]
    """The id that follows each input."""

    weights: npt.NDArray[np.float32]
    """1 where the target counts, 0 at padding."""

    positions: npt.NDArray[np.int32] | None = None
    """Distance from the document's start (or the window's, if later); None where documents are not isolated."""

    segments: npt.NDArray[np.int32] | None = None
    """Number of the document within its row, from 0; None where documents are not isolated."""


class ConcatBatches:
    """Endless shuffled batches for training; documents are joined and cut into windows, no token is dropped."""

    def __init__(self, shards: TokenShards, *, length: int, seed: int, isolate_documents: bool = False) -> None:
        """`length` is in tokens. Raises ShardError where the shards hold less than one sequence."""
        _check_length(length)
        if shards.num_tokens < length:
            raise ShardError(
                f"{shards.directory} holds {shards.num_tokens} tokens, less than one sequence of {length}; give more text or a "
                "shorter train.sequence_length."
            )
        self._windows = _Windows(shards, length=length, isolate_documents=isolate_documents)
        self.length = length
        self.seed = seed
        self.num_tokens = shards.num_tokens
        self.num_windows = self._windows.count
        """Samples in an epoch."""

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples `first_sample` to `first_sample + count - 1`, counted from 0 over all epochs; B = count."""
        if first_sample < 0 or count < 1:
            raise ShardError(
                f"Samples from {first_sample}, {count} of them, were asked for; expected at least 0 and 1."
            )
        return self._windows.batch(self.windows(first_sample, count))

    def windows(self, first_sample: int, count: int) -> npt.NDArray[np.int64]:
        """The numbers of the windows that these samples are; shape (count,)."""
        samples = np.arange(first_sample, first_sample + count, dtype=np.int64)
        epochs, cursors = np.divmod(samples, self.num_windows)
        return np.concatenate(
            [
                Permutation(self.num_windows, seed=self.seed, epoch=int(epoch))(cursors[epochs == epoch])
                for epoch in np.unique(epochs)
            ]
        )

    def position(self, sample: int) -> dict[str, int]:
        """Where in which epoch a sample is."""
        epoch, cursor = divmod(sample, self.num_windows)
        return {"epoch": epoch, "cursor": cursor}


class SequentialBatches:
    """All windows once and in order, for evaluation; every batch has the same shape."""

    def __init__(self, shards: TokenShards, *, length: int, isolate_documents: bool = False) -> None:
        """`length` is in tokens; shards of less than one sequence are padded. Raises ShardError for empty shards."""
        _check_length(length)
        if shards.num_tokens == 0:
            raise ShardError(f"{shards.directory} holds no token; expected some to evaluate on.")
        self._windows = _Windows(shards, length=length, isolate_documents=isolate_documents)
        self.length = length
        self.num_tokens = shards.num_tokens
        self.num_bytes = shards.num_bytes
        """UTF-8 bytes of all documents: bits per byte = loss per token * num_tokens / num_bytes / ln 2."""
        self.num_windows = self._windows.count

    def batches(self, batch_size: int, *, max_windows: int | None = None) -> Iterator[Batch]:
        """Yield batches of B = batch_size rows; missing rows of the last one are padding of weight 0.

        `max_windows` limits the windows; they are then spread evenly over all text, so that a limited evaluation is a fair sample.
        """
        if batch_size < 1 or (max_windows is not None and max_windows < 1):
            raise ShardError(f"batch_size is {batch_size}, max_windows {max_windows}; expected at least 1.")
        total = self.num_windows
        taken = total if max_windows is None else min(max_windows, total)
        chosen = np.arange(taken, dtype=np.int64) * total // taken
        for start in range(0, taken, batch_size):
            yield self._windows.batch(chosen[start : start + batch_size], rows=batch_size)


class _Windows:
    """The windows of the stream, by number."""

    def __init__(self, shards: TokenShards, *, length: int, isolate_documents: bool) -> None:
        self.count = -(-shards.num_tokens // length)
        self._shards = shards
        self._length = length
        self._isolate_documents = isolate_documents

    def batch(self, numbers: npt.NDArray[np.int64], *, rows: int | None = None) -> Batch:
        shape = (rows or len(numbers), self._length)
        tokens = np.full(shape, self._shards.pad_id, dtype=np.int32)
        targets = np.full(shape, self._shards.pad_id, dtype=np.int32)
        weights = np.zeros(shape, dtype=np.float32)
        for row, number in enumerate(numbers.tolist()):
            stream = self._stream(number * self._length)
            filled = len(stream) - 1
            tokens[row, :filled] = stream[:-1]
            targets[row, :filled] = stream[1:]
            weights[row, :filled] = 1
        if not self._isolate_documents:
            return Batch(tokens=tokens, targets=targets, weights=weights)
        segments, positions = _isolated(tokens, weights, eot_id=self._shards.eot_id)
        return Batch(tokens=tokens, targets=targets, weights=weights, positions=positions, segments=segments)

    def _stream(self, start: int) -> npt.NDArray[np.int32]:
        """stream[start : start + length + 1], shorter at the end of the text."""
        stop = min(start + self._length, self._shards.num_tokens)
        tokens = self._shards.tokens(max(start - 1, 0), stop).astype(np.int32)
        return tokens if start > 0 else np.concatenate([np.array([self._shards.eot_id], dtype=np.int32), tokens])


def _isolated(
    tokens: npt.NDArray[np.int32], weights: npt.NDArray[np.float32], *, eot_id: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Segments and positions: both start anew at each end-of-text, which stands before a document, and at the padding."""
    padding_start = np.diff(weights, axis=1, prepend=weights[:, :1]) < 0
    starts = (tokens == eot_id) | padding_start
    starts[:, 0] = True
    columns = np.arange(tokens.shape[1], dtype=np.int32)
    last_start = np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
    segments = np.cumsum(starts, axis=1, dtype=np.int32) - 1
    return segments.astype(np.int32), (columns - last_start).astype(np.int32)


def _check_length(length: int) -> None:
    if length < 1:
        raise ShardError(f"train.sequence_length is {length}; expected at least 1 token.")
