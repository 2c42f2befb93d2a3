"""`anarcho watch`: a run that is under way, in another terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.", show_default=False)],
    once: Annotated[bool, typer.Option("--once", help="Print the present state and stop.")] = False,
    every: Annotated[float, typer.Option("--every", min=0.1, help="Seconds from one look to the next.")] = 1.0,
) -> None:
    """Show how a run is doing, from its files, until it ends; the run does not notice.

    On a terminal the state is drawn in place; elsewhere there are plain lines. The exit status is 0 where the run finished,
    and 1 where it was stopped.
    """
    import sys

    from anarcho_cli.runs import RunError
    from anarcho_cli.watching.following import follow, print_state
    from anarcho_cli.watching.state import Watched

    if not run.is_dir():
        raise RunError(f"the run {run} is not there; expected the directory of a run")
    if once:
        print_state(Watched(run), stream=sys.stdout)
    elif follow(Watched(run), every_seconds=every, stream=sys.stdout) != "finished":
        raise typer.Exit(1)
