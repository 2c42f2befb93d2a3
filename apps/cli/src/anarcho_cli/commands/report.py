"""`anarcho report`: a run, or several beside each other, as one page of HTML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of runs.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The file to write.",
            show_default="report.html in the run, or comparison.html beside it",
        ),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Lay the curves of several runs over each other.")] = False,
) -> None:
    """Write one page with the curves, samples, configuration and environment of a run; print where it is.

    The page is one file that loads nothing, so it can be sent to somebody. Of a run that is under way it shows what is there.
    """
    from anarcho_cli.reporting.errors import ReportError
    from anarcho_cli.reporting.page import comparison_page, run_page
    from anarcho_cli.reporting.run_view import read_run
    from anarcho_cli.reporting.writing import write_page

    if len(runs) > 1 and not compare:
        raise ReportError(f"there are {len(runs)} runs; expected one, or --compare to lay their curves over each other")
    if len(runs) == 1 and compare:
        raise ReportError("--compare has one run; expected two or more")
    views = [read_run(path) for path in runs]
    page = comparison_page(views) if compare else run_page(views[0])
    target = out or (runs[0].resolve().parent / "comparison.html" if compare else runs[0] / "report.html")
    write_page(target, page)
    print(target)
