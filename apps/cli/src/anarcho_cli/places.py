"""Where commands may write: an output that exists already is never touched."""

from __future__ import annotations

from pathlib import Path


class PlaceError(FileExistsError):
    """An output path that is taken; the message is one sentence for the user."""


def refuse_existing(path: Path, *, option: str) -> None:
    """Raise PlaceError where ``path`` is taken, or its parent is no directory."""
    if path.exists() or path.is_symlink():
        raise PlaceError(f"{option} {path} exists already; choose another place, or remove it first")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise PlaceError(f"{option} {path} lies under {parent}, which is a file; choose another place")
