"""What inputs and outputs of a stage are, in SHA-256: never their dates.

Notable: a file is read again only when its size or its date is another than when its hash was taken. A run is its newest
checkpoint, whose manifest holds the hashes of all files; any other directory is the names and hashes of its files, hidden
ones left out, as commands leave them out.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anarcho_cli.models import CHECKPOINTS
from anarcho_cli.pipeline.definition import REFERENCE, Stage, is_path, texts

TABLE = "table"
VERSION = "anarcho-cli"
_WORDS = ("preset", "device", "backend", "kind", "to")
"""Options whose value is a word, whatever files there are of that name."""


class FileHashes:
    """SHA-256 of files, remembered by path, size and date."""

    def __init__(self, known: Mapping[str, Any] | None = None) -> None:
        self._known: dict[str, Any] = dict(known or {})

    def of_file(self, path: Path) -> str:
        """The hash of a file's content."""
        key, status = str(path.absolute()), path.stat()
        entry = self._known.get(key)
        if entry is None or (entry["size"], entry["mtime_ns"]) != (status.st_size, status.st_mtime_ns):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            entry = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": digest}
            self._known[key] = entry
        return entry["sha256"]

    def of_path(self, path: Path) -> str | None:
        """The hash of a file, or of the names and hashes of a directory's files; None where there is no file."""
        if path.is_file():
            return self.of_file(path)
        files = sorted(file for file in path.rglob("*") if file.is_file() and _visible(file, path))
        return self.of_files(path, files) if files else None

    def of_files(self, root: Path, files: list[Path]) -> str:
        """One hash for files with their names under ``root``."""
        return _digest([[file.relative_to(root).as_posix(), self.of_file(file)] for file in files])

    def to_dict(self) -> dict[str, Any]:
        """What is remembered of files that are still there."""
        return {key: entry for key, entry in self._known.items() if Path(key).is_file()}


def output_fingerprint(path: Path, hashes: FileHashes) -> str | None:
    """What the output of a stage is; None where there is none."""
    return _newest_checkpoint(path) if (path / CHECKPOINTS).is_dir() else hashes.of_path(path)


def known_inputs(stage: Stage, hashes: FileHashes) -> dict[str, str]:
    """What a stage reads besides outputs of earlier stages: label -> hash, its own table and the program's version first."""
    inputs = {TABLE: _digest(stage.identity()), VERSION: version("anarcho-cli")}
    for text in dict.fromkeys(_named_files(stage)):
        if not text.startswith(REFERENCE) and (found := _source_fingerprint(text, hashes)) is not None:
            inputs[text] = found
    return inputs


def short(value: str | None) -> str:
    """A hash in twelve characters; a question mark where it is not known yet."""
    return "?" if value is None else value[:12]


def _named_files(stage: Stage) -> Iterator[str]:
    """Texts that may name files: of the stage's table, and of a configuration that it names."""
    from anarcho_cli.layers import file_layer

    yield from filter(is_path, stage.bases)
    yield from texts({name: value for name, value in stage.options.items() if name not in _WORDS})
    yield from texts(stage.settings)
    if isinstance(file := stage.options.get("config"), str):
        yield from texts(file_layer(Path(file)).sections.get("data", {}))


def _source_fingerprint(text: str, hashes: FileHashes) -> str | None:
    """The content of the files that a text names, as a path or a glob; None where it names none."""
    try:
        path = Path(text)
        if path.exists():
            return output_fingerprint(path, hashes)
        matches = glob.glob(text, recursive=True) if glob.has_magic(text) else []  # noqa: PTH207 - refuses absolute patterns
    except (OSError, ValueError):  # A text that can be no path, such as a long prompt.
        return None
    files = sorted(Path(match) for match in matches if Path(match).is_file())
    return _digest([[str(file), hashes.of_file(file)] for file in files]) if files else None


def _newest_checkpoint(run: Path) -> str | None:
    from anarcho_train.checkpoint import MANIFEST_FILE, CheckpointStore

    valid = [info for info in CheckpointStore(run / CHECKPOINTS).list(check_hashes=False) if info.valid]
    return hashlib.sha256((valid[-1].path / MANIFEST_FILE).read_bytes()).hexdigest() if valid else None


def _visible(file: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in file.relative_to(root).parts)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
