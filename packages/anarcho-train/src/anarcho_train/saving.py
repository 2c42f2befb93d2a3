"""Checkpoints that find no room: the run goes on, the next one is tried again, and after so many the run ends with one sentence.

Notable: whatever the operating system refuses (a full disk, a quota, a directory that has become read-only) is an OSError here; the
checkpoint before is untouched by it. Free space is looked at before anything is written, since a disk that is full hurts others, too.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

LONGEST_PAUSE = 60.0
"""Seconds between two attempts at the last checkpoint of a run."""


class SaveFailed(OSError):
    """A checkpoint could not be written, and the run does not go on without it."""


class Saves:
    """Attempts at checkpoints, of which ``limit`` in a row may fail."""

    def __init__(self, *, limit: int, sleep: Callable[[float], None] | None = None) -> None:
        self.failures = 0
        """Attempts in a row that have failed."""
        self._limit = limit
        self._sleep = sleep or time.sleep

    def attempt(
        self, save: Callable[[], Path], *, report: Callable[[str, int], None], needed: bool, patient: bool
    ) -> Path | None:
        """The path that ``save`` returns, or None where it failed and a later one may do.

        Each failure goes to ``report``: what happened, and how many there were in a row.

        With ``needed`` a failure is never passed over; with ``patient`` it is tried again, after growing pauses. Raises `SaveFailed`.
        """
        while True:
            try:
                path = save()
            except ConnectionError:  # Of another process of the run, not of the disk.
                raise
            except OSError as error:
                self.failures += 1
                report(self._told(error), self.failures)
                if self.failures >= self._limit or (needed and not patient):
                    raise SaveFailed(
                        f"no checkpoint could be written{_times(self.failures)} ({reason(error)}); the checkpoints before are untouched: "
                        "free space or mend the directory, and go on with --resume"
                    ) from error
                if not patient:
                    return None
                self._sleep(min(LONGEST_PAUSE, 2.0 ** (self.failures - 1)))
            else:
                self.failures = 0
                return path

    def _told(self, error: OSError) -> str:
        left = self._limit - self.failures
        then = f"the run goes on, and {left} more may fail" if left > 0 else "no more may fail"
        return f"could not be written ({reason(error)}); those before are untouched: {then}"


def reason(error: OSError) -> str:
    """An OSError in words, without its number."""
    if error.strerror is None:
        return str(error)
    words = error.strerror[:1].lower() + error.strerror[1:]
    return f"{error.filename}: {words}" if error.filename is not None else words


def free_bytes(directory: Path) -> int:
    """What an ordinary user may still write on the disk of a directory that may not be there yet."""
    place = Path(directory).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def require_free(directory: Path, needed: int, *, purpose: str) -> None:
    """Raises OSError where the disk of ``directory`` has less than ``needed`` bytes free for ``purpose``."""
    free = free_bytes(directory)
    if free < needed:
        raise OSError(
            f"{purpose} needs {needed / 2**20:,.1f} MiB, but the disk of {directory} has {free / 2**20:,.1f} MiB free"
        )


def _times(count: int) -> str:
    return "" if count == 1 else f" {count} times in a row"
