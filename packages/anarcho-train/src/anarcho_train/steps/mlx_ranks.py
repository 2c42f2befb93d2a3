"""What several processes of one training step tell each other in MLX: the sum of their gradients, and each one's few numbers.

Notable: arrays travel concatenated, in few calls. Every rank receives the same bits, so all decide alike and their weights stay equal.
A rank that was killed ends the others at their next exchange, with `RankLost`; a machine that merely stopped answering does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from anarcho_train.ranks import RankLost
from anarcho_train.steps.mlx_state import leaves

BUCKET_BYTES = 64 * 2**20
"""Arrays are sent together until so many bytes are full: many small messages wait for the network, a whole copy would double memory."""

_TRANSPORTS = ("[ring]", "[jaccl]", "[mpi]", "[nccl]")


def gathered(values: Sequence[float], group: mx.distributed.Group | None) -> np.ndarray:
    """Each rank's values, float64 (ranks, values), exact to the last bit; a single row without a group."""
    numbers = np.array(values, dtype=np.float64)
    if group is None or group.size() == 1:
        return numbers[None]
    with _loss_of_ranks():
        words = mx.distributed.all_gather(mx.array(numbers.view(np.uint32))[None], group=group)
        return np.array(words).view(np.float64)


def sum_over_ranks(tree: Any, group: mx.distributed.Group | None) -> None:
    """Replaces each float32 array of a tree by its sum over the ranks, in buckets of `BUCKET_BYTES`; without a group, nothing happens.

    Each bucket is evaluated before the next is begun, and arrays are replaced where they are: no more than one bucket is in memory twice.
    """
    if group is None or group.size() == 1:
        return
    places = {name: (container, key) for name, container, key in leaves(tree)}
    for names in _buckets({name: container[key].nbytes for name, (container, key) in places.items()}):
        arrays = [places[name][0][places[name][1]] for name in names]
        total = mx.distributed.all_sum(mx.concatenate([array.reshape(-1) for array in arrays]), group=group)
        ends = np.cumsum([array.size for array in arrays])[:-1].tolist()
        parts = [part.reshape(array.shape) for part, array in zip(mx.split(total, ends), arrays, strict=True)]
        for name, part in zip(names, parts, strict=True):
            container, key = places[name]
            container[key] = part
        del arrays
        with _loss_of_ranks():
            mx.eval(parts)


@contextmanager
def _loss_of_ranks() -> Iterator[None]:
    """Says in one sentence what a transport's error means here."""
    try:
        yield
    except RuntimeError as error:
        if str(error).startswith(_TRANSPORTS):
            raise RankLost(
                f"another process of this run was lost ({error}); start all of them again, and they go on from the last checkpoint"
            ) from error
        raise


def _buckets(num_bytes: dict[str, int]) -> Iterator[list[str]]:
    bucket: list[str] = []
    size = 0
    for name, own in num_bytes.items():
        bucket.append(name)
        size += own
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
