"""What the ranks of a model in shards exchange while it computes, in its order: so that one that finds no memory does its part to the end.

Notable: which weights are gathered and which gradients are shared out depends on the model, not on what it computes. It is noted once, in
passes of one token. A rank whose memory runs out hands over zeros for all that is left of a step; the others compute nonsense with them,
meet it after that where all agree that the step is dropped, and lose no time but that of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Exchange:
    """One exchange of all ranks, or of those of one replica."""

    gathers: bool
    """Whether weights are gathered, or else gradients shared out."""
    sent: int
    received: int
    """Numbers that this rank hands over and gets."""
    dtype: torch.dtype


@dataclass(frozen=True)
class _Pass:
    """The exchanges of a forward pass, and of a backward pass with and without its gradients' exchange."""

    forward: Sequence[Exchange]
    local: Sequence[Exchange]
    last: Sequence[Exchange]


class Exchanges:
    """Notes what `FSDPModule`s of one tree exchange; ``across`` is the group of those that have the same shard, if there are replicas."""

    def __init__(self, root: Any, modules: Sequence[Any], *, across: dist.ProcessGroup | None) -> None:
        self._root, self._across = root, across
        self._device = next(root.parameters()).device
        self._done: list[Exchange] = []
        self._due: list[Exchange] = []
        self._before_last = 0
        self._pass: _Pass | None = None
        self._comms: dict[bool, _Comm] = {}
        # Earlier releases cannot forget a pass that was broken off.
        self.usable = hasattr(root, "reset_iter_state")
        if self.usable:
            gather, share_out = _Gather(self._done), _ShareOut(self._done)
            self._comms = {True: gather, False: share_out}
            for module in modules:
                module.set_custom_all_gather(gather)
                module.set_custom_reduce_scatter(share_out)

    @property
    def learned(self) -> bool:
        """Whether there is nothing more to be known."""
        return self._pass is not None or not self.usable

    def learn(self, forward: Callable[[], Tensor], *, local: Callable[[], AbstractContextManager[None]]) -> None:
        """Notes what is exchanged, once: in ``forward`` and the backward pass of its loss, which is ``local`` or a step's last one."""
        if self.learned:
            return
        with local():
            first, loss = self._noted(forward)
            kept, _ = self._noted(loss.backward)
        again, loss = self._noted(forward)
        last, _ = self._noted(loss.backward)
        self.usable = first == again
        self._pass = _Pass(first, kept, last) if self.usable else None

    def begin_step(self, *, micro_batches: int) -> None:
        """A step of so many micro-batches begins, after the last of which gradients are exchanged."""
        self.begin_forward()
        if self._pass is not None:
            self._due = [*self._pass.forward, *self._pass.local] * (micro_batches - 1) + self._due
            self._before_last = len(self._due)
            self._due += self._pass.last

    def begin_forward(self) -> None:
        """A forward pass begins that has no backward pass."""
        self._done.clear()
        self._due = [*self._pass.forward] if self._pass else []
        self._before_last = len(self._due)

    @torch.no_grad()
    def finish(self, *, last: bool) -> bool:
        """Does this rank's part of what is left before a step's last backward pass, or with that one; False where it is not known."""
        done = len(self._done)
        if self._pass is None or self._done != self._due[:done]:
            return False
        for index in range(done, len(self._due) if last else self._before_last):
            self._take_part(self._due[index], summed=index >= self._before_last)
        return True

    def forget(self) -> None:
        """What was begun of a step is as if it had not been."""
        if self.usable and self._pass is not None:
            self._root.reset_iter_state()

    def _noted(self, work: Callable[[], Any]) -> tuple[list[Exchange], Any]:
        self._done.clear()
        result = work()
        return list(self._done), result

    def _take_part(self, exchange: Exchange, *, summed: bool) -> None:
        sent = torch.zeros(exchange.sent, dtype=exchange.dtype, device=self._device)
        received = torch.empty(exchange.received, dtype=exchange.dtype, device=self._device)
        self._comms[exchange.gathers].again(received, sent)
        if summed and not exchange.gathers and self._across is not None:
            dist.all_reduce(received, group=self._across)


class _Comm:
    """An exchange as torch makes it, which is noted."""

    def __init__(self, done: list[Exchange]) -> None:
        self._done = done
        self._settings: dict[str, Any] = {}

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what is sent or received."""
        return torch.empty(*size, dtype=dtype, device=device)

    def again(self, received: Tensor, sent: Tensor) -> None:
        """The exchange, between the ranks of the last one."""
        self._exchange(received, sent, **self._settings)

    def _exchange(self, received: Tensor, sent: Tensor, **settings: Any) -> Any:
        raise NotImplementedError


class _Gather(_Comm):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        self._settings = {"group": group}
        self._done.append(Exchange(True, input_tensor.numel(), output_tensor.numel(), input_tensor.dtype))
        return self._exchange(output_tensor, input_tensor, group=group, async_op=async_op)

    def _exchange(self, received: Tensor, sent: Tensor, **settings: Any) -> Any:
        return dist.all_gather_into_tensor(received, sent, **settings)


class _ShareOut(_Comm):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        self._settings = {"group": group, "op": op}
        self._done.append(Exchange(False, input_tensor.numel(), output_tensor.numel(), input_tensor.dtype))
        return self._exchange(output_tensor, input_tensor, group=group, op=op, async_op=async_op)

    def _exchange(self, received: Tensor, sent: Tensor, **settings: Any) -> Any:
        return dist.reduce_scatter_tensor(received, sent, **settings)
