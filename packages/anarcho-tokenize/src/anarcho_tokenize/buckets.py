"""Batches of whole conversations or preferences, each of rows of about equal length, with few shapes and little padding.

A unit is a document, or of preferences the two rows chosen and rejected, which always stand side by side. It belongs to the shortest
length of a ladder that holds it, and a batch has units of one length alone: as many as `batch_tokens` holds. The units of a length are
spread evenly over its batches, and rows that remain are padding of weight 0; none is left out or put twice into an epoch.

A row's inputs are the document without its last token, its targets the document without its first, its weights the targets' loss mask.
Longer documents keep their beginning, of `length` targets; a unit with a document of which no target counts is dropped. Both are counted.

Batch n, counted from 0 without end, is number `Permutation(seed, epoch)(cursor)` of all batches, with epoch, cursor =
divmod(n, num_batches), and another permutation of each epoch says which units of its length it has. Nothing of this depends on the number
of ranks: each has its rows of the same global batch, and all have the same shape.

Shapes: B rows, T = a length of the ladder.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from anarcho_tokenize.errors import ShardError
from anarcho_tokenize.ladder import check_ladder, fit_ladder, units_per_batch
from anarcho_tokenize.packing import Batch
from anarcho_tokenize.permutation import Permutation
from anarcho_tokenize.shards import TokenShards

_SEEDS = 2**20


class BucketBatches:
    """Endless shuffled batches for training."""

    def __init__(
        self,
        shards: TokenShards,
        *,
        batch_tokens: int,
        length: int,
        seed: int,
        ladder: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`batch_tokens` are slots of a global batch, padding included; `length` is the longest row, in tokens.

        Without a `ladder`, at most eight lengths (and `length`) are chosen that pad little. Raises ShardError for other kinds of shards.
        """
        self._buckets = _Buckets(
            shards, batch_tokens=batch_tokens, length=length, ladder=ladder, rank=rank, world_size=world_size
        )
        self.seed = seed
        self.ladder = self._buckets.ladder
        self.num_batches = self._buckets.num_batches
        """Batches in an epoch."""
        self.num_units = self._buckets.num_units
        """Documents, or pairs of them, in an epoch."""
        self.num_truncated = self._buckets.num_truncated
        """Units of which a document is cut."""
        self.num_dropped = self._buckets.num_dropped
        """Units that are left out, since no target counts in one of their documents."""
        self.fill = self._buckets.fill
        """Share of the slots of an epoch that are not padding."""

    def batch(self, first_sample: int, count: int = 1) -> Batch:
        """This rank's rows of the global batch `first_sample`, counted from 0 over all epochs; `count` is 1, as batches differ in shape."""
        if first_sample < 0 or count != 1:
            raise ShardError(f"{count} batches from {first_sample} on were asked for; expected one, from 0 on.")
        epoch, cursor = divmod(first_sample, self.num_batches)
        number = int(Permutation(self.num_batches, seed=self._seed(0), epoch=epoch)(cursor))
        bucket, places = self._buckets.places(number)
        size = self._buckets.size(bucket)
        shuffled = Permutation(size, seed=self._seed(1 + bucket), epoch=epoch)(places)
        return self._buckets.batch(bucket, shuffled)

    def position(self, sample: int) -> dict[str, int]:
        """Where in which epoch a batch is."""
        epoch, cursor = divmod(sample, self.num_batches)
        return {"epoch": epoch, "cursor": cursor}

    def state(self, first_sample: int, count: int) -> Literal["ready"]:
        """All batches are there, since only complete shards are taken."""
        return "ready"

    def _seed(self, order: int) -> int:
        """The batches and the units of each length are shuffled independently."""
        return self.seed * _SEEDS + order


class SequentialBucketBatches:
    """All units once, for evaluation, in the order of their lengths and of the shards."""

    def __init__(
        self,
        shards: TokenShards,
        *,
        batch_tokens: int,
        length: int,
        ladder: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """As BucketBatches; give it the `ladder` of the training batches, and no shape is compiled for evaluation alone."""
        self._buckets = _Buckets(
            shards, batch_tokens=batch_tokens, length=length, ladder=ladder, rank=rank, world_size=world_size
        )
        self.ladder = self._buckets.ladder
        self.num_windows = self._buckets.num_batches
        """Batches."""
        self.num_units = self._buckets.num_units
        self.num_truncated = self._buckets.num_truncated
        self.num_dropped = self._buckets.num_dropped
        self.fill = self._buckets.fill
        self.num_tokens = self._buckets.count_targets()
        """Targets that count, which is the sum of all weights."""
        self.num_bytes = round(shards.num_bytes * self.num_tokens / max(1, shards.num_tokens))
        """UTF-8 bytes of the targets that count, taken as their share of all tokens: bits per byte are an estimate."""

    def batches(self, batch_size: int = 1, *, max_windows: int | None = None) -> Iterator[Batch]:
        """Yield this rank's rows of each batch; `max_windows` limits the batches, which are then spread evenly over all lengths.

        `batch_size` is 1, as batches differ in shape.
        """
        if batch_size != 1 or (max_windows is not None and max_windows < 1):
            raise ShardError(f"batch_size is {batch_size}, max_windows {max_windows}; expected 1, and at least 1.")
        total = self.num_windows
        taken = total if max_windows is None else min(max_windows, total)
        for number in range(taken):
            yield self._buckets.batch(*self._buckets.places(number * total // taken))


class _Buckets:
    """Which units there are, by the length that they are padded to, and what a batch of them looks like."""

    def __init__(
        self,
        shards: TokenShards,
        *,
        batch_tokens: int,
        length: int,
        ladder: Sequence[int] | None,
        rank: int,
        world_size: int,
    ) -> None:
        _check(shards, batch_tokens=batch_tokens, length=length, rank=rank, world_size=world_size)
        self._shards, self._length = shards, length
        self._rank, self._world_size = rank, world_size
        self._rows_per_unit = 2 if shards.kind == "preference" else 1
        self._starts = shards.document_starts()
        targets = np.maximum(np.diff(self._starts) - 1, 0).reshape(-1, self._rows_per_unit)
        needed = np.minimum(targets, length).max(axis=1)
        kept, self.num_truncated = self._kept(targets)
        self.num_units = int(kept.sum())
        self.num_dropped = len(kept) - self.num_units
        if self.num_units == 0:
            raise ShardError(f"{shards.directory} holds no answer within {length} tokens; expected some to learn from.")
        sizes = {"batch_tokens": batch_tokens, "rows_per_unit": self._rows_per_unit}
        self.ladder = (
            fit_ladder(needed[kept], length=length, **sizes) if ladder is None else check_ladder(ladder, length=length)
        )
        buckets = np.where(kept, np.searchsorted(self.ladder, needed), len(self.ladder))
        self._units = np.argsort(buckets, kind="stable")
        self._units_per_batch = np.array([units_per_batch(rung, **sizes) for rung in self.ladder])
        bucket_sizes = np.bincount(buckets, minlength=len(self.ladder))[: len(self.ladder)]
        self._first_units = np.concatenate([[0], np.cumsum(bucket_sizes)])
        self._first_batches = np.concatenate([[0], np.cumsum(-(bucket_sizes // -self._units_per_batch))])
        self.num_batches = int(self._first_batches[-1])
        slots = np.diff(self._first_batches) * [self._rows(bucket) for bucket in range(len(self.ladder))] * self.ladder
        self.fill = float(np.minimum(targets[kept], length).sum() / slots.sum())

    def size(self, bucket: int) -> int:
        """Units of this length."""
        return int(self._first_units[bucket + 1] - self._first_units[bucket])

    def places(self, number: int) -> tuple[int, npt.NDArray[np.int64]]:
        """A batch's bucket, and the places of its units among those of the bucket."""
        bucket = int(np.searchsorted(self._first_batches, number, side="right")) - 1
        first, count, size = self._first_batches[bucket], np.diff(self._first_batches)[bucket], self.size(bucket)
        return bucket, np.arange((number - first) * size // count, (number - first + 1) * size // count)

    def batch(self, bucket: int, places: npt.NDArray[np.int64]) -> Batch:
        """This rank's rows of a batch of the units at these places."""
        rows = self._rows(bucket) // self._world_size
        shape = (rows, self.ladder[bucket])
        tokens = np.full(shape, self._shards.pad_id, dtype=np.int32)
        targets = np.full(shape, self._shards.pad_id, dtype=np.int32)
        weights = np.zeros(shape, dtype=np.float32)
        units = self._units[self._first_units[bucket] + places]
        documents = (units[:, None] * self._rows_per_unit + np.arange(self._rows_per_unit)).ravel()
        for row, document in enumerate(documents[self._rank * rows : (self._rank + 1) * rows].tolist()):
            start, stop = self._range(document)
            stream = self._shards.tokens(start, stop)
            filled = stop - start - 1
            tokens[row, :filled] = stream[:-1]
            targets[row, :filled] = stream[1:]
            weights[row, :filled] = self._shards.loss_mask(start + 1, stop)
        return Batch(tokens=tokens, targets=targets, weights=weights)

    def count_targets(self) -> int:
        """Targets that count in all units."""
        units = self._units[: self.num_units]
        documents = (units[:, None] * self._rows_per_unit + np.arange(self._rows_per_unit)).ravel()
        return sum(self._counted(document) for document in documents.tolist())

    def _rows(self, bucket: int) -> int:
        """Rows of a global batch, which all ranks share evenly."""
        units = int(self._units_per_batch[bucket])
        return -(units // -self._world_size) * self._world_size * self._rows_per_unit

    def _range(self, document: int) -> tuple[int, int]:
        """Where a document starts and ends in the shards, if need be cut."""
        start = int(self._starts[document])
        return start, min(int(self._starts[document + 1]), start + self._length + 1)

    def _counted(self, document: int) -> int:
        start, stop = self._range(document)
        return int(self._shards.loss_mask(start + 1, stop).sum(dtype=np.int64))

    def _kept(self, targets: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.bool_], int]:
        """Which units have a target that counts in every document, and how many of these are cut."""
        kept: npt.NDArray[np.bool_] = np.min(targets, axis=1) > 0
        cut: npt.NDArray[np.bool_] = np.max(targets, axis=1) > self._length
        for unit in np.flatnonzero(kept & cut).tolist():
            first = unit * self._rows_per_unit
            kept[unit] = all(self._counted(first + row) for row in range(self._rows_per_unit))
        return kept, int((kept & cut).sum())


def _check(shards: TokenShards, *, batch_tokens: int, length: int, rank: int, world_size: int) -> None:
    where = shards.directory
    if shards.kind == "text":
        raise ShardError(
            f"{where} holds texts; expected conversations or preferences, so set data.kind and prepare anew."
        )
    if not shards.complete:
        raise ShardError(
            f"{where} is not complete; expected all of its documents, so let its preparation finish first."
        )
    if shards.kind == "preference" and shards.num_documents % 2:
        raise ShardError(
            f"{where} holds {shards.num_documents} documents; expected pairs of a chosen and a rejected one."
        )
    if length < 1 or batch_tokens < 1:
        raise ShardError(
            f"train.sequence_length is {length}, a batch {batch_tokens} tokens; expected at least 1 of both."
        )
    if not 0 <= rank < world_size:
        raise ShardError(f"The rank is {rank} of {world_size}; expected 0 to {world_size - 1}.")
