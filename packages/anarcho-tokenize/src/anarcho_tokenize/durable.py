"""Writing that survives a kill or a power cut: data is flushed to disk before the name under which it is found."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any


def replace_file(file: Path, data: bytes) -> None:
    """Put `data` under a name in one step: a reader, or a process after a crash, sees the old content or the new."""
    staging = file.with_name(f"{file.name}.partial")
    with staging.open("wb") as stream:
        stream.write(data)
        stream.flush()
        sync(stream.fileno())
    staging.replace(file)
    sync_directory(file.parent)


def json_document(values: dict[str, Any]) -> bytes:
    """JSON with a line for each key and for each item of a list, which people can read and which thousands of items do not make slow."""
    lines = ",\n".join(f" {json.dumps(key)}: {_json(value)}" for key, value in values.items())
    return f"{{\n{lines}\n}}\n".encode()


def sync_directory(directory: Path) -> None:
    """Flush a directory's names to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Flush an open file to disk; on macOS through the cache of the drive, too, where fsync alone stops."""
    if (flush_drive := getattr(fcntl, "F_FULLFSYNC", None)) is not None:
        try:
            fcntl.fcntl(descriptor, flush_drive)
        except OSError:
            pass  # a file system without it, such as one on the network
        else:
            return
    os.fsync(descriptor)


def _json(value: object) -> str:
    if isinstance(value, list) and value:
        return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
    return json.dumps(value)
