"""The live bar of `Progress`, drawn by rich."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text


class LiveDisplay:
    """A bar with the step count, the share done and a line of figures; other records scroll by above it."""

    def __init__(self, stream: TextIO, total_steps: int) -> None:
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(file=stream),
            refresh_per_second=2,  # two cores may be all there is
        )
        self._task = self._progress.add_task("", total=total_steps)
        self._progress.start()

    def update(self, step: int, status: str) -> None:
        self._progress.update(self._task, completed=step, description=status)

    def line(self, text: str) -> None:
        self._progress.console.print(Text(text))

    def close(self) -> None:
        """Draws the last state and leaves it on the screen."""
        self._progress.stop()
