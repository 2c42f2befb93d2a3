"""Batches from token shards, in an order that integers describe.

Rows are laid out in one of two ways. `concat` joins all documents and cuts them into windows: row k holds the tokens [k * length,
(k + 1) * length). `best-fit` puts whole documents into rows that they fill best and cuts only what is longer than a row. Either way, every
token is a target exactly once an epoch, and nothing is dropped; what rows lack is padding of weight 0. (See `batch` for what a target is.)

Sample i, counted from 0 without end, is row first + `Permutation(rows, seed, epoch, block)`(i - first) of the epoch, where the block that
holds i has so many rows from row `first` on: a run that consumed n samples resumes at sample n, on any number of ranks. Without
`shuffle_tokens` all rows are one block. With it, blocks are of about so many tokens, and the order within them is known before
the source has ended: shards that still grow give the same samples as complete ones.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from anarcho_tokenize.batch import Batch as Batch
from anarcho_tokenize.batch import BatchReader
from anarcho_tokenize.errors import ShardError
from anarcho_tokenize.layouts import Block, Packing, layout_of
from anarcho_tokenize.permutation import Permutation
from anarcho_tokenize.shards import TokenShards

State = Literal["ready", "waiting", "ended"]
_PADDING = -1


class _Place(NamedTuple):
    """Where a sample is: its row of the epoch, before the shuffle, and the block that it is shuffled in."""

    epoch: int
    cursor: int
    block: Block


class PackedBatches:
    """Endless shuffled batches for training, or those of a single epoch, also while the shards still grow."""

    def __init__(
        self,
        shards: TokenShards,
        *,
        length: int,
        seed: int,
        packing: Packing = "concat",
        isolate_documents: bool = False,
        shuffle_tokens: int | None = None,
        single_epoch: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`length` is in tokens. Raises ShardError where complete shards hold less than one sequence."""
        _check_sizes(length=length, shuffle_tokens=shuffle_tokens)
        if not 0 <= rank < world_size:
            raise ShardError(f"rank is {rank} of world_size {world_size}; expected 0 to world_size - 1.")
        self.length = length
        self.seed = seed
        self._shards = shards
        self._single_epoch = single_epoch
        self._rank = rank
        self._world_size = world_size
        self._layout = layout_of(shards, packing, length=length, shuffle_tokens=shuffle_tokens)
        self._reader = BatchReader(shards, length=length, isolate_documents=isolate_documents)
        self._check_enough()

    @property
    def num_samples(self) -> int | None:
        """Samples in an epoch; None while the shards grow."""
        return self._layout.num_rows()

    @property
    def fill(self) -> float:
        """Share of the slots that hold a token, over the rows that are there; 0 where there is none yet."""
        tokens, rows = self._layout.num_targets()
        return tokens / (rows * self.length) if rows else 0.0

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples `first_sample` to `first_sample + count - 1`, counted from 0 over all epochs; B = count.

        With several ranks, B = count / world_size: the ranks' batches, one after another, are the batch of a single rank. Past a
        single epoch, rows are padding. Raises ShardError for samples that are not there yet.
        """
        if first_sample < 0 or count < 1:
            raise ShardError(
                f"Samples from {first_sample}, {count} of them, were asked for; expected at least 0 and 1."
            )
        if count % self._world_size:
            raise ShardError(
                f"{count} samples were asked for; expected a multiple of the world_size {self._world_size}."
            )
        own = count // self._world_size
        rows = self.windows(first_sample + self._rank * own, own).tolist()
        return self._reader.batch([[] if row == _PADDING else self._layout.pieces(row) for row in rows])

    def windows(self, first_sample: int, count: int) -> npt.NDArray[np.int64]:
        """The rows of their epoch that these samples are, of all ranks, or -1 past a single epoch; shape (count,)."""
        rows = np.full(count, _PADDING, dtype=np.int64)
        done = 0
        while done < count:
            place = self._place(first_sample + done)
            if place == "ended":
                break
            if place == "waiting":
                raise ShardError(
                    f"{self._shards.directory} does not hold sample {first_sample + done} yet; wait until state() is 'ready'."
                )
            block = place.block
            start = place.cursor - block.first_row
            stop = min(start + count - done, block.num_rows)
            shuffle = Permutation(block.num_rows, seed=self.seed, epoch=place.epoch, block=block.number)
            rows[done : done + stop - start] = block.first_row + shuffle(np.arange(start, stop))
            done += stop - start
        return rows

    def state(self, first_sample: int, count: int) -> State:
        """Whether `batch` can be had now, later, or not at all; takes up what was appended to the shards.

        A batch that a single epoch holds a part of is "ready". Raises ShardError where the shards have ended with less than a sequence.
        """
        if not self._shards.complete:
            self._shards.refresh()
            self._check_enough()
        if self._place(first_sample) == "ended":
            return "ended"
        return "waiting" if self._place(first_sample + count - 1) == "waiting" else "ready"

    def position(self, sample: int) -> dict[str, int]:
        """In which epoch a sample is, where in it, and in which block if there are several."""
        num_samples = self.num_samples if self._layout.block(sample) is None else None
        epoch, cursor = divmod(sample, num_samples) if num_samples else (0, sample)
        block = self._layout.block_number(cursor)
        return {"epoch": epoch, "cursor": cursor} | ({} if block is None else {"block": block})

    def first_token(self, sample: int) -> int:
        """The tokens before this one are not needed for this sample and later ones."""
        return self._layout.first_token(sample) if self._single_epoch else 0

    def _place(self, sample: int) -> _Place | Literal["waiting", "ended"]:
        if block := self._layout.block(sample):
            return _Place(0, sample, block)
        num_samples = self.num_samples
        if num_samples is None:
            return "waiting"
        if num_samples == 0:
            raise ShardError(
                f"{self._shards.directory} holds no token that can be predicted; give longer conversations."
            )
        epoch, cursor = divmod(sample, num_samples)
        if self._single_epoch:
            return "ended"
        block = self._layout.block(cursor)
        assert block is not None
        return _Place(epoch, cursor, block)

    def _check_enough(self) -> None:
        if self._shards.complete and self._shards.num_tokens < self.length:
            raise ShardError(
                f"{self._shards.directory} holds {self._shards.num_tokens} tokens, less than one sequence of {self.length}; give more "
                "text or a shorter train.sequence_length."
            )


class SequentialBatches:
    """All rows once and in order, for evaluation; every batch has the same shape."""

    def __init__(
        self, shards: TokenShards, *, length: int, packing: Packing = "concat", isolate_documents: bool = False
    ) -> None:
        """`length` is in tokens; shards of less than one sequence are padded. Raises ShardError where no token counts as a target."""
        _check_sizes(length=length, shuffle_tokens=None)
        self._layout = layout_of(shards, packing, length=length, shuffle_tokens=None)
        self._reader = BatchReader(shards, length=length, isolate_documents=isolate_documents)
        num_windows = self._layout.num_rows()
        if num_windows is None:
            raise ShardError(f"{shards.directory} still grows; expected complete shards to evaluate on.")
        self.length = length
        self.num_windows = num_windows
        """Rows in all."""
        self.num_tokens = self._reader.total_weight()
        """Tokens that count as targets: the sum of the weights."""
        there = shards.num_tokens - shards.damaged_tokens if shards.kind == "text" else self.num_tokens
        self.num_bytes = round(shards.num_bytes * there / max(1, shards.num_tokens))
        """UTF-8 bytes of the documents that are there, or of what counts in conversations, taken as its share of all tokens:
        bits per byte = loss per token * num_tokens / num_bytes / ln 2."""
        if self.num_tokens == 0:
            raise ShardError(f"{shards.directory} holds no token; expected some to evaluate on.")

    def batches(self, batch_size: int, *, max_windows: int | None = None) -> Iterator[Batch]:
        """Yield batches of B = batch_size rows; missing rows of the last one are padding of weight 0.

        `max_windows` limits the rows; they are then spread evenly over all, so that a limited evaluation is a fair sample.
        """
        if batch_size < 1 or (max_windows is not None and max_windows < 1):
            raise ShardError(f"batch_size is {batch_size}, max_windows {max_windows}; expected at least 1.")
        total = self.num_windows
        taken = total if max_windows is None else min(max_windows, total)
        chosen = (np.arange(taken, dtype=np.int64) * total // taken).tolist()
        for start in range(0, taken, batch_size):
            rows = [self._layout.pieces(row) for row in chosen[start : start + batch_size]]
            yield self._reader.batch([*rows, *[[]] * (batch_size - len(rows))])


def _check_sizes(*, length: int, shuffle_tokens: int | None) -> None:
    if length < 1:
        raise ShardError(f"train.sequence_length is {length}; expected at least 1 token.")
    if shuffle_tokens is not None and shuffle_tokens < 1:
        raise ShardError(f"data.shuffle_tokens is {shuffle_tokens}; expected at least 1 token.")
