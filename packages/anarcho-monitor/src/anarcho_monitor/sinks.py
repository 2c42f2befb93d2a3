"""Where metrics go: the protocol that the training loop writes to, and the fan-out to several sinks.

The loop calls `write(kind, step=..., tokens=..., **values)` and knows nothing else, so that anybody's logger takes part by
having these two methods. Kinds in use: "start", "train", "validation", "checkpoint", "sample", "event" and "end".
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

_logger = logging.getLogger(__name__)


@runtime_checkable
class MetricSink(Protocol):
    """Takes records of a run."""

    def write(self, kind: str, *, step: int, tokens: int, **values: Any) -> None:
        """Takes one record; `step` and `tokens` count from the start of the run, over all attempts."""
        ...

    def close(self) -> None:
        """Flushes and lets go of files; calling it again does nothing."""
        ...


class Sinks:
    """Passes every record to several sinks, in their order.

    A sink that cannot write (a full disk, a closed terminal) must not cost the run: its OSError is reported once, through
    `report`, and the record is lost for that sink alone. It is offered the next record all the same, since disks get space back.
    """

    def __init__(self, sinks: Iterable[MetricSink], *, report: Callable[[str], None] = _logger.warning) -> None:
        self._sinks = tuple(sinks)
        self._report = report
        self._failed: set[int] = set()

    def write(self, kind: str, *, step: int, tokens: int, **values: Any) -> None:
        for index, sink in enumerate(self._sinks):
            self._attempt(index, lambda sink=sink: sink.write(kind, step=step, tokens=tokens, **values))

    def close(self) -> None:
        for index, sink in enumerate(self._sinks):
            self._attempt(index, sink.close)

    def _attempt(self, index: int, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            if index not in self._failed:
                self._failed.add(index)
                name = type(self._sinks[index]).__name__
                self._report(
                    f"{name} cannot write ({error}): the run goes on without its records; free or mend its place."
                )
