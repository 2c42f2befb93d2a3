"""Whether a process works on a run, seen from another process."""

from __future__ import annotations

from pathlib import Path


def somebody_works_on(run: Path) -> bool:
    """Whether the lock of a run directory is held; it is tried, and let go at once.

    The lock is the operating system's, so one that a killed process held is free.
    """
    from anarcho_train import CheckpointError, lock_run

    if not (run / ".lock").exists():
        return False
    try:
        lock_run(run).release()
    except CheckpointError:
        return True
    except OSError:  # A directory that nobody may write to is no one's place of work.
        return False
    return False
