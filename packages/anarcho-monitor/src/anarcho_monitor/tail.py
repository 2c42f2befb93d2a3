"""metrics.jsonl of a run that is under way, read by another process as it grows.

Notable: a line counts when its end is there, so one that is being written, or that a killed process left torn, is no record and does no
harm. A file that was put in the place of the one before, or has become shorter, is read from its beginning.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from anarcho_monitor.metrics import parse_record

CHUNK_BYTES = 1 << 22


class MetricsTail:
    """Hands out the records of a metrics file, each once, as they come; the file need not be there yet."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.generation = 0
        """How often the file was found to be another one, whose records come from the first on."""
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._rest = b""

    def poll(self) -> list[dict[str, Any]]:
        """The records whose lines were completed since the last call; raises `MonitorError` for those of a newer format."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                self._follow((status.st_dev, status.st_ino), status.st_size)
                file.seek(self._offset)
                records = []
                while chunk := file.read(CHUNK_BYTES):
                    self._offset += len(chunk)
                    *lines, self._rest = (self._rest + chunk).split(b"\n")
                    records += [record for line in lines if (record := parse_record(line, where=self.path)) is not None]
                return records
        except FileNotFoundError:
            return []

    def _follow(self, identity: tuple[int, int], size: int) -> None:
        if self._identity is not None and (identity != self._identity or size < self._offset):
            self.generation += 1
            self._offset, self._rest = 0, b""
        self._identity = identity
