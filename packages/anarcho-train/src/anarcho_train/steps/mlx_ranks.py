"""What several processes of one training tell each other in MLX: the sum of their gradients, and each one's few numbers.

Notable: arrays travel concatenated, in few calls. Every rank receives the same bits, so all decide alike and their weights stay equal.

A process that waits for another one in MLX cannot be interrupted, and one that was stopped, put to sleep or cut off is never missed by
it. So exchanges are made by a thread of their own, on a stream of its own (MLX's streams belong to the thread that made them), and the
thread that trains waits for that one no longer than a timeout. After it, the thread is given up, and the model can still be evaluated and
written: its arrays are on the other stream. While an exchange is waited for, MLX's ring keeps a processor core busy.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from anarcho_train.ranks import RankLost
from anarcho_train.steps.mlx_state import leaves

BUCKET_BYTES = 64 * 2**20
"""Arrays are sent together until so many bytes are full: many small messages wait for the network, a whole copy would double memory."""

TIMEOUT_SECONDS = 600.0
"""How long the others are waited for if nothing else is said."""

_TRANSPORTS = ("[ring]", "[jaccl]", "[mpi]", "[nccl]")


class MlxRanks:
    """`anarcho_train.ranks.Ranks` over a group of MLX processes, and the sum of their gradients; without a group, one process alone.

    An exchange that takes longer than ``timeout_seconds`` ends in `RankLost`, as does one whose peer has closed the connection; every
    later one does at once. ``device`` is where the transport computes: the CPU, except for NCCL's.
    """

    def __init__(
        self,
        group: mx.distributed.Group | None = None,
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        device: mx.DeviceType = mx.cpu,
    ) -> None:
        self._group = group
        self.rank = group.rank() if group else 0
        self.size = group.size() if group else 1
        self.waited_seconds = 0.0
        """How long this rank has waited for others."""
        self._timeout = timeout_seconds
        self._lost: str | None = None
        self._work: queue.SimpleQueue[tuple[Callable[[], mx.array], queue.SimpleQueue[Any]]] = queue.SimpleQueue()
        if self.size > 1:
            threading.Thread(target=self._exchange, args=(device,), daemon=True).start()

    def gathered(self, values: Sequence[float]) -> np.ndarray:
        """Each rank's values, float64 (ranks, values), exact to the last bit; raises `RankLost`."""
        numbers = np.array(values, dtype=np.float64)
        if self.size == 1:
            return numbers[None]
        words = numbers.view(np.uint32)[None]  # MLX has no float64 on a GPU.
        found = self._result(lambda: mx.distributed.all_gather(mx.array(words), group=self._group))
        return np.array(found).view(np.float64)

    def sum(self, tree: Any) -> None:
        """Replaces each float32 array of a tree by its sum over the ranks, in buckets of `BUCKET_BYTES`; raises `RankLost`.

        Each bucket is finished before the next is begun, and arrays are replaced where they are: no more than one bucket is in memory
        twice.
        """
        if self.size == 1:
            return
        places = {name: (container, key) for name, container, key in leaves(tree)}
        for names in _buckets({name: container[key].nbytes for name, (container, key) in places.items()}):
            arrays = [places[name][0][places[name][1]] for name in names]
            flat = mx.concatenate([array.reshape(-1) for array in arrays])
            mx.eval(flat)  # The other thread can wait for nothing that this one's stream has yet to compute.
            total = self._result(lambda flat=flat: mx.distributed.all_sum(flat, group=self._group))
            ends = np.cumsum([array.size for array in arrays])[:-1].tolist()
            parts = [part.reshape(array.shape) for part, array in zip(mx.split(total, ends), arrays, strict=True)]
            for name, part in zip(names, parts, strict=True):
                container, key = places[name]
                container[key] = part
            del arrays, flat, total
            mx.eval(parts)

    def _result(self, work: Callable[[], mx.array]) -> mx.array:
        """What the exchange gives, computed; signals are handled meanwhile."""
        if self._lost is not None:
            raise RankLost(self._lost)
        reply: queue.SimpleQueue[Any] = queue.SimpleQueue()
        begin = time.monotonic()
        self._work.put((work, reply))
        try:
            outcome = reply.get(timeout=self._timeout)
        except queue.Empty:
            raise self._loss(f"it did not answer for {self._timeout:g} seconds") from None
        finally:
            self.waited_seconds += time.monotonic() - begin
        if isinstance(outcome, RuntimeError) and str(outcome).startswith(_TRANSPORTS):
            raise self._loss(str(outcome)) from outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _exchange(self, device: mx.DeviceType) -> None:
        """The thread that waits for the others."""
        with mx.stream(mx.new_stream(device)):
            while True:
                work, reply = self._work.get()
                try:
                    result = work()
                    mx.eval(result)
                    reply.put(result)
                except BaseException as error:
                    reply.put(error)

    def _loss(self, reason: str) -> RankLost:
        self._lost = f"another process of this run was lost ({reason}); start all of them again, and they go on from the last checkpoint"
        return RankLost(self._lost)


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
