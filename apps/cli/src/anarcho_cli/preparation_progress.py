"""How far the preparation of data is: a bar on a terminal, a line now and then elsewhere, and a summary at its end."""

from __future__ import annotations

import sys
import time
from typing import Any

from anarcho_tokenize import PreparationReport

from anarcho_cli.output import count_text, duration_text, note

_LINE_SECONDS = 10.0
_FIRST_SECONDS = 2.0


class PreparationProgress:
    """Shows reports as they come; a context manager."""

    def __init__(self) -> None:
        self.shown = False
        """Whether there was anything to do."""
        self._began: tuple[float, PreparationReport] | None = None
        self._next_line = time.monotonic() + _FIRST_SECONDS
        self._bar: Any = None

    def __enter__(self) -> PreparationProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, report: PreparationReport) -> None:
        """The latest report; `prepare_shards` calls it after each chunk."""
        now = time.monotonic()
        self.shown = True
        if self._began is None:
            self._began = (now, report)
        if now < self._next_line:
            return
        status = self._status(report, now)
        if sys.stderr.isatty():
            self._show_bar(report, status)
        else:
            note(f"preparing data: {status}")
            self._next_line = now + _LINE_SECONDS

    def summary(self, report: PreparationReport) -> list[str]:
        """How it ended, in lines for people."""
        text = f"{count_text(report.bytes)}B of text, {report.bytes_per_token:.2f} bytes a token"
        lines = [
            f"{report.documents} documents, {report.tokens} tokens ({report.validation_tokens} for validation), {text}, "
            f"in {duration_text(report.seconds)}"
        ]
        left_out = {"in quarantine": report.quarantined, "duplicates": report.duplicates, **report.filtered}
        if found := [f"{count} {name}" for name, count in left_out.items() if count]:
            lines.append(f"left out of {report.rows} rows: {', '.join(found)}")
        return lines

    def _status(self, report: PreparationReport, now: float) -> str:
        assert self._began is not None
        began, first = self._began
        seconds = max(now - began, 1e-9)
        parts = [
            f"{count_text(report.bytes)}B of text",
            f"{(report.bytes - first.bytes) / 1e6 / seconds:.1f} MB/s",
            f"{count_text((report.tokens - first.tokens) / seconds)} tokens/s",
        ]
        total, read = report.source_total_bytes, report.source_bytes - first.source_bytes
        if total:
            parts.insert(0, f"{min(1.0, report.source_bytes / total):.0%}")
            if read > 0:
                parts.append(f"{duration_text(max(0, total - report.source_bytes) * seconds / read)} left")
        return ", ".join(parts)

    def _show_bar(self, report: PreparationReport, status: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn("preparing data"),
                BarColumn(bar_width=24),
                TextColumn("{task.description}", markup=False),
                console=Console(stderr=True),
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("", total=report.source_total_bytes)
            self._bar.start()
        self._bar.update(self._task, completed=report.source_bytes, total=report.source_total_bytes, description=status)
