"""The files of a checkpoint, one by one: reading and writing its JSON, and what is wrong with a file that its manifest names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

from anarcho_train.tensor_header import header_problem

FORMAT = 1
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
MAX_JSON_BYTES = 64 * 2**20
"""State and manifest are far smaller; what is larger was not written here."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, what is wrong with it and what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises `CheckpointError` naming the file if it is missing or no such object."""
    try:
        if path.is_symlink() or path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} is a link, or larger than {MAX_JSON_BYTES} bytes; expected a regular file: this checkpoint is damaged"
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; this checkpoint is not whole") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); this checkpoint is damaged") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds a {type(value).__name__}; expected a JSON object: this checkpoint is damaged"
        )
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object for people to read as well."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def check_file(directory: Path, name: str, entry: Any, check_hashes: bool) -> str | None:
    """What is wrong with a file that the manifest names, as a sentence."""
    path = directory / name
    inside = PurePosixPath(name)
    if inside.is_absolute() or not inside.parts or ".." in inside.parts or inside.as_posix() != name:
        return f"{directory}/{MANIFEST_FILE} names {name!r}; expected names of files in the checkpoint"
    linked = path.is_symlink() or any((directory / parent).is_symlink() for parent in inside.parents[:-1])
    if not isinstance(entry, dict) or linked or not path.is_file():
        return f"{path} is missing or no regular file"
    if path.stat().st_size != entry.get("size"):
        return f"{path} has {path.stat().st_size} bytes; expected {entry.get('size')}: it is truncated or was changed"
    if check_hashes and _sha256(path) != entry.get("sha256"):
        return f"{path} has another SHA-256 than its manifest says: it is damaged or was changed"
    if path.suffix == ".safetensors" and (problem := header_problem(path)):
        return f"{path} {problem}; it was made by hand or is damaged"
    return None


def state_problem(state: dict[str, Any], *, step: Any) -> str | None:
    """What a run could not go on from, as words after the file's name; what a key means is known where it is read."""
    if state.get("step", step) != step:
        return f"is of step {state['step']!r}; expected {step!r}, as the manifest says"
    counts = {name: state[name] for name in ("tokens", "samples") if name in state}
    for name, value in counts.items():
        if type(value) is not int or not 0 <= value < 2**63:
            return f"has {name} = {str(value)[:40]!r}; expected a whole number from 0"
    for name, kind in (("early_stopping", dict), ("recovery", dict), ("micro_batch", dict), ("settings", dict)):
        if not isinstance(state.get(name, {}), kind):
            return f"has {name} = {str(state[name])[:40]!r}; expected an object"
    for name in ("validation_loss", "compared_loss", "bits_per_byte"):
        if not isinstance(state.get(name), int | float | None) or isinstance(state.get(name), bool):
            return f"has {name} = {str(state[name])[:40]!r}; expected a number or null"
    return None


def describe(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
