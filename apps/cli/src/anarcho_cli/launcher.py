"""Starting several processes of one training on this machine: torchrun, with a word on several machines.

Notable: rendezvous, restarts and the end of all where one fails are torchrun's. It is called as a function, because as a command it ends
with status 1 whatever its processes ended with.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from anarcho_cli.launching import LaunchError
from anarcho_cli.output import note

MODULE = "anarcho_cli"
PORT = 29400
"""Of the first of several machines; torchrun's own default."""

_TRAINS = ("pretrain", "sft", "preference")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be started."""

    processes: int
    """On this machine."""
    max_restarts: int
    """How often all are started again where one has failed."""
    command: Sequence[str]
    """Of `anarcho`, for each of them."""

    def __post_init__(self) -> None:
        if not any(word in _TRAINS for word in self.command):
            raise LaunchError(
                f"launch was given {shlex.join(self.command) or 'no command'!r}; expected a command that trains after `--`: "
                f"{', '.join(_TRAINS)}"
            )
        if self.max_restarts and not any(word.partition("=")[0] in ("--name", "--resume") for word in self.command):
            raise LaunchError(
                "--max-restarts needs a run that processes find again; give the command --name NAME, or --resume RUN"
            )

    def here(self) -> list[str]:
        """torchrun's arguments for this machine alone."""
        return ["--standalone", *self._processes(), "-m", MODULE, *self.command]

    def elsewhere(self) -> str:
        """The line for each of several machines."""
        place = ["--nnodes", "MACHINES", "--rdzv-backend", "c10d", "--rdzv-id", "anarcho"]
        place += ["--rdzv-endpoint", f"FIRST_MACHINE:{PORT}"]
        return shlex.join(["torchrun", *place, *self._processes(), "-m", MODULE, *self.command])

    def _processes(self) -> list[str]:
        return ["--nproc-per-node", str(self.processes), "--max-restarts", str(self.max_restarts)]


def run(order: Order) -> int:
    """Starts the processes and waits for their end; the exit status of the one that failed first, 0 where none did."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    note(f"on several machines that share the run's directory, start on each: {order.elsewhere()}")
    # torchrun would give each process a single thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // order.processes)))
    try:
        main(order.here())
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
