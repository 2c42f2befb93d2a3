"""Writing that survives a kill or a power cut: data is flushed to disk before the name under which it is found."""

import os
from pathlib import Path


def replace_file(file: Path, data: bytes) -> None:
    """Put `data` under a name in one step: a reader, or a process after a crash, sees the old content or the new."""
    staging = file.with_name(f"{file.name}.partial")
    with staging.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    staging.replace(file)
    sync_directory(file.parent)


def sync_directory(directory: Path) -> None:
    """Flush a directory's names to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
