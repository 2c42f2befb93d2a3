"""Where a report goes: a file that appears whole, and replaces nothing but an earlier report."""

from __future__ import annotations

import os
from pathlib import Path

from anarcho_cli.reporting.errors import ReportError

_MARK = b'content="anarcho report"'


def write_page(path: Path, page: str) -> None:
    """Writes ``page``; raises `ReportError` where something else than a report is at ``path``."""
    if path.is_dir():
        raise ReportError(f"{path} is a directory; expected the name of a file for --out")
    if path.exists() and not _is_report(path):
        raise ReportError(f"{path} is there and is no report of anarcho; choose another file with --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        staging.write_text(page, encoding="utf-8")
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return _MARK in file.read(4096)
