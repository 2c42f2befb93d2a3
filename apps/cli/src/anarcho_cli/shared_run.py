"""A run directory that several processes work on: the first one writes it and holds its lock, the others read what it has written.

Notable: the others see the directory through whatever the machines share it with, so all make sure before the training that it is the same
one. Whether the lock holds across machines is tried, too, not believed: only where a second process was refused it while the first had
it, may one that outlives the first take it and write the last state.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from anarcho_train import Ranks, RanksDiffer, after_first, lock_run, require_equal, share, told

from anarcho_cli import config as configuration
from anarcho_cli.config import RunConfig
from anarcho_cli.data import samples_per_step
from anarcho_cli.devices import FRAMEWORKS, Backend
from anarcho_cli.errors import RANK_LOST
from anarcho_cli.run_directory import locked

TOKEN_FILE = ".processes"
"""A word that the first process writes and the others must find."""

SHARED_SECONDS = 60.0
"""How long what one machine has written may take to be seen by another one; NFS remembers directories for up to a minute."""

_POLL_SECONDS = 0.1
_INHERIT_SECONDS = 2.0
_PACKAGES = ("anarcho-tokenize", "anarcho-model", "anarcho-optim", "anarcho-train", "anarcho-monitor", "anarcho-cli")


def require_together(config: RunConfig, ranks: Ranks, *, framework: str, device: str) -> None:
    """Refuses processes that cannot train together, before anything is written; raises `RanksDiffer`."""
    if ranks.size == 1:
        return
    facts = {
        "the configuration": configuration.dumps(config),
        "the versions of the packages": " ".join(version(name) for name in _PACKAGES),
        f"the version of {FRAMEWORKS[Backend(framework)]}": version(framework),
        "the device": device,
    }
    require_equal(ranks, facts)
    share(samples_per_step(config), ranks)


@contextmanager
def joined(run_directory: Path, ranks: Ranks) -> Iterator[Callable[[], bool]]:
    """Holds the lock of the run in its first process, when all have found its directory.

    Yields whether this process may write the last state, to be asked where another one was lost.
    """
    with ExitStack() as stack:
        if ranks.size == 1:
            stack.enter_context(locked(run_directory))
            yield lambda: True
            return
        with after_first(ranks):
            if ranks.rank == 0:
                stack.enter_context(locked(run_directory))
        _require_shared(run_directory, ranks)
        yield (lambda: True) if ranks.rank == 0 else _Heir(run_directory)


def _require_shared(run_directory: Path, ranks: Ranks) -> None:
    """Raises `RanksDiffer` where a process does not see what the first one has written."""
    token = told(ranks, secrets.token_hex(8))
    file = run_directory / TOKEN_FILE
    try:
        if ranks.rank == 0:
            file.write_text(token, encoding="utf-8")
        found = ranks.gathered([_holds(file, token)])[:, 0]
    finally:
        if ranks.rank == 0:
            file.unlink(missing_ok=True)
    if not found.all():
        blind = ", ".join(str(rank) for rank in np.flatnonzero(found == 0))
        raise RanksDiffer(
            f"{run_directory} is not shared: rank {blind} does not see what rank 0 has written there; expected a directory that all "
            "machines have, over a network where there are several of them"
        )


def _holds(file: Path, token: str) -> bool:
    until = time.monotonic() + SHARED_SECONDS
    while True:
        try:
            if file.read_text(encoding="utf-8") == token:
                return True
        except OSError:  # It is not there yet, or will never be.
            pass
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_SECONDS)


class _Heir:
    """A process that writes the last state where the first one is gone and has let go of the lock."""

    def __init__(self, run_directory: Path) -> None:
        self._directory = run_directory
        self._lock = self._attempt()
        self._proved = self._lock is None
        if self._lock is not None:  # Although the first process has it.
            self._lock.release()
            self._lock = None

    def __call__(self) -> bool:
        # A share that is gone with the first process never answers.
        guard = threading.Timer(SHARED_SECONDS, os._exit, [RANK_LOST])
        guard.daemon = True
        guard.start()
        until = time.monotonic() + _INHERIT_SECONDS
        while self._proved and time.monotonic() < until:
            self._lock = self._attempt()  # Held until the process ends.
            if self._lock is not None:
                break
            time.sleep(_POLL_SECONDS)
        guard.cancel()
        return self._lock is not None

    def _attempt(self) -> Any:
        try:
            return lock_run(self._directory)
        except (ValueError, OSError, NotImplementedError):
            return None
