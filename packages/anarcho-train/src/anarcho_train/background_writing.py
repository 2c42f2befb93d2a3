"""One write at a time, in a thread of its own.

Notable: it is one thread for all writes of a run, because streams of MLX belong to threads. It is no daemon: an interpreter that ends
on an exception finishes a checkpoint that was begun. A process that is killed leaves what a kill leaves of any write.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any


class BackgroundWriter:
    """Does one piece of work at a time beside the thread that asks for it."""

    def __init__(self) -> None:
        self.finished_at = 0.0
        """When the newest work was finished, by the monotonic clock."""
        self._thread: ThreadPoolExecutor | None = None
        self._work: Future[Any] | None = None

    @property
    def busy(self) -> bool:
        """Whether there is work that is not finished."""
        return self._work is not None and not self._work.done()

    @property
    def error(self) -> BaseException | None:
        """What the newest work has failed with; waits for it."""
        return None if self._work is None else self._work.exception()

    def begin(self, work: Callable[[], Any]) -> None:
        """Lets it be done; nothing else may be under way."""
        assert not self.busy, "there is one copy at a time"
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._work = self._thread.submit(self._timed, work)

    def wait(self) -> None:
        """Returns when nothing is under way; signals are handled meanwhile."""
        if self._work is not None:
            wait([self._work])

    def result(self) -> Any:
        """What the newest work has returned, or raises what it has raised."""
        assert self._work is not None
        return self._work.result()

    def close(self) -> None:
        """Finishes what is under way, and ends the thread."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _timed(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        finally:
            self.finished_at = time.monotonic()
