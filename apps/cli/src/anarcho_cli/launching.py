"""One process of a training over several, as `mlx.launch` or torchrun starts them: how it knows of the others, and how all of them end.

Notable: rank 0 alone speaks, writes and holds the run's lock; the others print nothing but what went wrong with them. Both launchers end
all others as soon as one has ended badly, so they end together, after rank 0 has said what there is to say. A process that has lost another
one ends with a status of its own, and without waiting for a thread that may never return.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from anarcho_cli.errors import RANK_LOST, at_end, explain

if TYPE_CHECKING:
    from anarcho_train import Ranks

    from anarcho_cli.config import RunConfig

LEAVING_SECONDS = 60.0
"""A process that has lost another one is gone after so long, even where a disk or a library does not let go of it."""

LATER_SECONDS = 1.0
"""What the first process has to end before the others do."""

TORCHRUN = "torchrun"
"""What connects the processes of torchrun, as `transport` calls it."""

_RENDEZVOUS = ("RANK", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHED = {"mlx": "mlx.launch", "torch": "torchrun"}
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class LaunchError(ValueError):
    """Several processes were started that cannot train together; the message is one sentence for the user."""


def transport(environ: Mapping[str, str]) -> str | None:
    """What connects this process with the others of its run, `torchrun` or in MLX's words; None where it is alone."""
    if environ.get("MLX_JACCL_COORDINATOR") and environ.get("MLX_IBV_DEVICES"):
        return "jaccl"
    if _number(environ.get("MLX_WORLD_SIZE")) > 1:
        return "nccl"
    if environ.get("MLX_HOSTFILE") and "MLX_RANK" in environ:
        return "ring" if _listed(environ["MLX_HOSTFILE"]) > 1 else None
    if _number(environ.get("WORLD_SIZE")) > 1 and all(environ.get(name) for name in _RENDEZVOUS):
        return TORCHRUN
    return "mpi" if any(_number(environ.get(name)) > 1 for name in _MPI_SIZES) else None


def is_restarted(environ: Mapping[str, str]) -> bool:
    """Whether torchrun has started the processes of this run again, after one had failed."""
    return transport(environ) == TORCHRUN and _number(environ.get("TORCHELASTIC_RESTART_COUNT")) > 0


@contextmanager
def connected(config: RunConfig, *, backend: str) -> Iterator[Ranks]:
    """The processes that train together: this one alone, unless it was started with others. All leave the block together."""
    from anarcho_train import Alone, RankFailed, RankLost, RanksDiffer, known_to_all

    kind = transport(os.environ)
    if kind is None:
        yield Alone()
        return
    if backend != ("torch" if kind == TORCHRUN else "mlx"):
        raise LaunchError(
            f"several processes were started over {kind}, which does not connect those of the back-end {backend}; start them with "
            f"{_LAUNCHED[backend]}, or one alone"
        )
    ranks = _connect(kind, timeout_seconds=config.train.rank_timeout_seconds)
    try:
        with _silent(unless=ranks.rank == 0):
            yield ranks
    except RankLost:
        _leave_soon()
        raise
    except Exception as error:
        if known_to_all(error) or isinstance(error, typer.Exit):
            at_end.append(lambda: _leave_together(ranks, badly=True))
        if ranks.rank and isinstance(error, RanksDiffer | RankFailed):  # The message of the first is enough.
            raise typer.Exit(explain(error)[1]) from error
        raise
    else:
        at_end.append(lambda: _leave_together(ranks))


def _connect(kind: str, *, timeout_seconds: float) -> Ranks:
    if kind == TORCHRUN:
        from anarcho_cli.back_ends import torch_processes

        return torch_processes.connect(timeout_seconds=timeout_seconds)
    from anarcho_cli.back_ends import mlx

    return mlx.connect(kind, timeout_seconds=timeout_seconds)


def _leave_together(ranks: Ranks, *, badly: bool = False) -> None:
    """Waits for the others, of which one may be gone already; those that end badly leave after the first, which launchers would end."""
    from anarcho_train import RankLost

    with suppress(RankLost):
        ranks.gathered([0.0])
    if badly and ranks.rank:
        time.sleep(LATER_SECONDS)


def _leave_soon() -> None:
    """Lets nothing keep this process: neither the thread that waits for a lost one, nor a shared disk that is gone with it."""

    def leave() -> None:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(RANK_LOST)

    atexit.register(leave)
    timer = threading.Timer(LEAVING_SECONDS, leave)
    timer.daemon = True
    timer.start()


@contextmanager
def _silent(*, unless: bool) -> Iterator[None]:
    if unless:
        yield
        return
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _listed(hostfile: str) -> int:
    """How many processes a file of addresses names; that of a single one is empty."""
    try:
        text = Path(hostfile).read_text(encoding="utf-8")
        return len(json.loads(text)) if text.strip() else 1
    except (OSError, ValueError, TypeError) as error:
        raise LaunchError(
            f"MLX_HOSTFILE is {hostfile}, which cannot be read as a list of addresses ({error}); start the processes with mlx.launch"
        ) from error


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0
