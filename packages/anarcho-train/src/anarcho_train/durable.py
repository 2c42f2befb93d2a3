"""Writing what survives a power failure."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Returns when the content of a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_json(file: Path, value: dict[str, Any]) -> None:
    """Writes an object; the file is the old or the new one at every instant."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(value) + "\n", encoding="utf-8")
    sync(partial)
    partial.replace(file)
    sync(file.parent)
