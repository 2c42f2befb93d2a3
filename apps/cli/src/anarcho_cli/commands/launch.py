"""`anarcho launch`: a training over several processes of this machine, which torchrun starts."""

from __future__ import annotations

from typing import Annotated

import typer

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
"""What comes after the options is the command of the processes."""


def launch(
    ctx: typer.Context,
    processes: Annotated[
        int, typer.Option("-n", "--processes", min=1, help="Processes on this machine, one for each GPU.")
    ],
    max_restarts: Annotated[
        int,
        typer.Option("--max-restarts", min=0, help="Start all of them again where one has failed, so many times."),
    ] = 0,
) -> None:
    """Train over several processes: anarcho launch -n 4 -- pretrain --device cuda ...

    It is torchrun for one machine, and ends with the exit status of the process that failed first. The line for several
    machines is printed.
    """
    from anarcho_cli.launcher import Order, run

    raise typer.Exit(run(Order(processes=processes, max_restarts=max_restarts, command=tuple(ctx.args))))
