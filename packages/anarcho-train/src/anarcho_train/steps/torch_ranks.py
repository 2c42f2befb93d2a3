"""What several processes of one training tell each other in PyTorch, over torch.distributed.

Notable: there are two groups. Numbers of the host travel over gloo, so that a process that was killed, or does not answer, is missed there
in bounded time even where a GPU waits for it for ever; what is computed travels over a group of its own, NCCL's on CUDA. When a process
is lost, what the GPU still waits for is aborted, so that its memory can be read and saved.

Where the model lies in shards, most of what a rank does needs the others. Each exchange then begins with what every rank wants to do: those
with nothing of their own help whoever has something, and ask again. So rank 0 may evaluate, or ask for the whole weights, at any moment
at which the others are about to exchange anything.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from anarcho_train.out_of_memory import is_out_of_memory
from anarcho_train.ranks import RankLost

TIMEOUT_SECONDS = 600.0
"""How long the others are waited for if nothing else is said."""

DEVICE_PATIENCE = 2
"""So many times longer do exchanges between GPUs wait, whose timeout ends the process: the host is to notice a loss first."""

_NOTHING = 0
_TIMEOUTS = ("timed out", "timeout")
_LOSSES = ("gloo", "nccl", "connection", "socket", "timed out", "timeout", "peer")
"""What is in the messages of RuntimeErrors of torch.distributed where another process is gone, lower case."""


class TorchRanks:
    """`anarcho_train.ranks.Ranks` over the processes of torch.distributed; without a ``group``, one process alone.

    ``group`` is of gloo. Whatever fails for want of another process is `RankLost`; every later exchange fails with it at once.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._control = group
        self.rank = dist.get_rank(group) if group else 0
        self.size = dist.get_world_size(group) if group else 1
        self.computing: dist.ProcessGroup | None = None
        """The group of what is computed, when `join_devices` has made it."""
        self.is_torn: Callable[[], bool] = lambda: False
        """Asked where a process is lost: whether what this one holds is no state that can be saved."""
        self.waited_seconds = 0.0
        """How long this rank has waited for others; whoever waits in another way adds to it."""
        self._timeout = timeout_seconds
        self._lost: RankLost | None = None
        self._lock = threading.Lock()
        self._helpers: Mapping[int, Callable[[], None]] = {}
        self._on_devices: list[dist.ProcessGroup] = []

    def join_devices(self, device: torch.device) -> None:
        """Makes the group over which gradients and weights travel; called by all ranks."""
        if self.size > 1 and self.computing is None:
            self.computing = self._own_group([range(self.size)], device)

    def grid(self, rows: int, device: torch.device) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """Groups as `computing` is, of the ranks laid out in ``rows`` in their order: this rank's column, and its row; called by all."""
        numbers = np.arange(self.size).reshape(rows, -1)
        return self._own_group(numbers.T.tolist(), device), self._own_group(numbers.tolist(), device)

    def numbers(self, ranks: Iterable[int]) -> list[int]:
        """What torch.distributed calls these ranks."""
        all_ranks = dist.get_process_group_ranks(self._control)
        return [all_ranks[rank] for rank in ranks]

    def _own_group(self, parts: Sequence[Sequence[int]], device: torch.device) -> dist.ProcessGroup:
        """A group of each of the parts into which the ranks fall, and of them this rank's own."""
        cuda = device.type == "cuda"
        seconds = self._timeout * (DEVICE_PATIENCE if cuda else 1)
        with self.watched():
            own: Any = dist.new_subgroups_by_enumeration(
                [self.numbers(part) for part in parts],
                backend="nccl" if cuda else "gloo",
                timeout=timedelta(seconds=seconds),
            )[0]
        self._on_devices.append(own)
        return own

    def gathered(self, values: Sequence[float]) -> np.ndarray:
        """Each rank's values, float64 (ranks, values), exact to the last bit; raises `RankLost`."""
        numbers = np.array(values, dtype=np.float64)
        if self.size == 1:
            return numbers[None]
        with self._lock:
            self._help_until(_NOTHING)
            return self._exchanged(numbers)

    def sum(self, numbers: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
        """The sum of float tensors of one shape over the ranks, as float64, the same bits everywhere; where the model computes.

        A ``group`` of `grid` sums over its ranks alone.
        """
        if self.size == 1:
            return numbers
        total, begin = numbers.double(), time.monotonic()
        with self.watched():
            dist.all_reduce(total, group=self.computing if group is None else group)
        self.waited_seconds += time.monotonic() - begin
        return total

    def help_with(self, helpers: Mapping[int, Callable[[], None]]) -> None:
        """From the next exchange on, this rank takes part in what another one does `together`; actions have numbers from 1.

        Every rank says so between the same two exchanges.
        """
        self._helpers = helpers

    @contextmanager
    def together(self, action: int) -> Iterator[None]:
        """The block is an action in which all others take part, be it as their own or as its helpers."""
        if self.size == 1:
            yield
            return
        with self._lock:
            self._help_until(action)
            with self.watched():
                yield

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What fails in the block for want of another process is raised as `RankLost`."""
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or any(part in str(error).lower() for part in _LOSSES)
            if self.size == 1 or not lost or is_out_of_memory(error):
                raise
            raise self._loss(str(error)) from error

    def abandon(self, reason: str) -> RankLost:
        """What this rank raises where its memory ran out and the others cannot be told but by its end."""
        self._lost = RankLost(reason)
        self._lost.torn = self._lost.no_memory = True
        return self._lost

    def _help_until(self, own: int) -> None:
        """Returns when nobody wants a more urgent action than this rank does; until then, it helps."""
        while self._helpers and (wanted := int(self._exchanged(np.array([float(own)])).max())) > own:
            with self.watched():
                self._helpers[wanted]()

    def _exchanged(self, numbers: np.ndarray) -> np.ndarray:
        if self._lost is not None:
            raise self._lost
        own = torch.from_numpy(numbers)
        found = [torch.empty_like(own) for _ in range(self.size)]
        begin = time.monotonic()
        try:
            dist.all_gather(found, own, group=self._control)
        except RuntimeError as error:
            raise self._loss(str(error)) from error
        finally:
            self.waited_seconds += time.monotonic() - begin
        return torch.stack(found).numpy()

    def _loss(self, text: str) -> RankLost:
        if self._lost is None:
            late = any(part in text.lower() for part in _TIMEOUTS)
            reason = f"it did not answer for {self._timeout:g} seconds" if late else _first_words(text)
            self._lost = RankLost(
                f"another process of this run was lost ({reason}); start all of them again, and they go on from the last checkpoint"
            )
            self._lost.torn = self.is_torn()
            self._abort()
        return self._lost

    def _abort(self) -> None:
        """Ends what a GPU waits for; a host's exchanges end by themselves."""
        for group in self._on_devices:
            if dist.get_backend(group) == "nccl":
                group.abort()


def _first_words(text: str) -> str:
    """The transport's first sentence, without the place in its source."""
    line = (text.strip().splitlines() or ["no reason is known"])[0].split(". ")[0]
    return line.partition("] ")[2][:160] if line.startswith("[") else line[:160]
