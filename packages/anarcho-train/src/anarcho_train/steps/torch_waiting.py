"""What a device has done of what it was given, and how long it has waited for others, asked without waiting for more than that."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

DEVICE_SECONDS = 10.0
"""A device that has not made an update so long after another process was lost waits for that one."""


class Done:
    """How far a device has come with what it was given."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def note(self) -> None:
        """What was given until now is what is asked for."""
        if self._event is not None:
            self._event.record()

    def soon(self) -> bool:
        """Whether that is done, or will be within seconds."""
        until = time.monotonic() + DEVICE_SECONDS
        while self._event is not None and not self._event.query():
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        return True


class Waited:
    """Seconds from what a process does last by itself, in an exchange with others, until it has what they sent."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._begin: Any = None
        self._measured: tuple[Any, Any] | None = None

    def mark(self) -> None:
        """So far, this process has done everything by itself; the last call counts."""
        self._begin = self._now()

    def end(self) -> float:
        """The exchange is over. Returns its seconds, on CUDA those of the one before, which the device has surely done."""
        before, self._measured = self._measured, None if self._begin is None else (self._begin, self._now())
        self._begin = None
        if not self._cuda:
            before = self._measured
        if before is None:
            return 0.0
        begin, end = before
        if not self._cuda:
            return end - begin
        return begin.elapsed_time(end) / 1000 if begin.query() and end.query() else 0.0

    def _now(self) -> Any:
        if not self._cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Later:
    """Numbers of a CUDA device, read without waiting for what it is given to do afterwards."""

    def __init__(self, numbers: Tensor) -> None:
        self._copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        self._copy.copy_(numbers, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def read(self) -> list[float]:
        """The numbers, as soon as they are there."""
        self._copied.synchronize()
        return self._copy.tolist()
