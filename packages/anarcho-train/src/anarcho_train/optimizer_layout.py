"""Where the optimizer's state lies in a checkpoint: in one file, or in parts that as many processes have written.

Notable: a part is ``optimizer-00002-of-00004.safetensors``. It holds rows (along the first dimension) of tensors, under their own names;
the text ``rows`` of its metadata is JSON, {name: [first row, rows of the whole]}: one text, because safetensors writes several in any
order. A tensor without such a note is whole. All of that is judged from headers alone, before a library opens a file: the parts of a
tensor must be of one shape and follow one another from its first row to its last, without a gap or an overlap.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anarcho_train.tensor_header import HeaderError, read_header

OPTIMIZER_FILE = "optimizer.safetensors"
"""The whole state: ``<parameter>.<state>``, such as ``model.norm.weight.exp_avg``."""

_PART = re.compile(r"optimizer-(\d{5})-of-(\d{5})\.safetensors")
_ROWS = "rows"
_ADVICE = "put the checkpoint's own files back, or remove it to go on from the one before"


class LayoutError(ValueError):
    """Files that together are no optimizer's state; the message is one sentence that names the file."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows of a tensor in one file."""

    path: Path
    first: int
    """Which row of the whole tensor it begins with."""
    count: int
    """How many rows it has; of a scalar none."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One tensor of the state."""

    shape: tuple[int, ...]
    """Of the whole."""
    pieces: tuple[Piece, ...]
    """In the order of their rows, which are all that it has."""


def part_name(number: int, count: int) -> str:
    """The file of the part ``number`` of ``count``, from 0."""
    return f"optimizer-{number + 1:05d}-of-{count:05d}.safetensors"


def rows_note(rows: Mapping[str, tuple[int, int]]) -> dict[str, str] | None:
    """The metadata of a part, of {tensor: (its first row, rows of the whole)}."""
    return {_ROWS: json.dumps(rows, sort_keys=True)} if rows else None


def layout_problem(directory: Path) -> str | None:
    """What is wrong with the files of the optimizer's state, as a sentence; None where they are sound, or there are none."""
    try:
        if state_files(directory):
            read_layout(directory)
    except LayoutError as error:
        return str(error)
    return None


def state_files(directory: Path) -> Sequence[Path]:
    """The files of the state: the whole one, or all parts in their order; raises `LayoutError` where they are not a set."""
    whole = directory / OPTIMIZER_FILE
    parts = sorted(directory.glob("optimizer-*.safetensors"))
    if not parts:
        return [whole] if whole.exists() else []
    if whole.exists():
        raise LayoutError(
            f"{whole} is there beside {parts[0].name}; expected the whole state or parts of it: {_ADVICE}"
        )
    matches = [_PART.fullmatch(path.name) for path in parts]
    count = int(matches[0][2]) if matches[0] else 0
    names = {part_name(number, count) for number in range(min(count, len(parts) + 1))}
    for path in parts:
        if path.name not in names:
            raise LayoutError(f"{path} is no part of the state that the other files are parts of: {_ADVICE}")
    if missing := sorted(names - {path.name for path in parts}):
        raise LayoutError(
            f"{directory / missing[0]} is missing, one of {count} parts of the optimizer's state: {_ADVICE}"
        )
    return parts


def read_layout(directory: Path) -> dict[str, Layout]:
    """The tensors of the state by name; raises `LayoutError` where the files are none, or not of one state."""
    files = state_files(directory)
    if not files:
        raise LayoutError(f"{directory / OPTIMIZER_FILE} is missing, and there are no parts of it: {_ADVICE}")
    found: dict[str, list[tuple[Piece, tuple[int, ...]]]] = {}
    for path in files:
        for name, piece in _pieces(path).items():
            found.setdefault(name, []).append(piece)
    return {name: _joined(name, pieces) for name, pieces in found.items()}


def _pieces(path: Path) -> dict[str, tuple[Piece, tuple[int, ...]]]:
    """What one file holds of each tensor, with the shape of the whole."""
    try:
        header = read_header(path)
    except HeaderError as error:
        raise LayoutError(f"{path} {error}; {_ADVICE}") from None
    notes = _notes(path, header.metadata) if _PART.fullmatch(path.name) else {}
    return {name: _piece(path, name, shape, notes) for name, shape in header.shapes.items()}


def _notes(path: Path, metadata: Mapping[str, str]) -> Mapping[str, Any]:
    try:
        notes = json.loads(metadata.get(_ROWS, "{}"))
    except (ValueError, RecursionError):
        notes = None
    if not isinstance(notes, dict):
        raise LayoutError(f"{path} does not say which rows it holds; expected a JSON object in its metadata: {_ADVICE}")
    return notes


def _piece(path: Path, name: str, shape: tuple[int, ...], notes: Mapping[str, Any]) -> tuple[Piece, tuple[int, ...]]:
    count = shape[0] if shape else 0
    if name not in notes:
        return Piece(path=path, first=0, count=count), shape
    note = notes[name]
    numbers = isinstance(note, list) and all(type(number) is int and 0 <= number < 2**63 for number in note)
    if not (numbers and len(note) == 2 and shape):
        raise LayoutError(f"{path} says {str(note)[:40]} of {name}; expected [first row, rows of the whole]: {_ADVICE}")
    first, rows = note
    if first + count > rows:
        raise LayoutError(f"{path} holds rows {first} to {first + count} of {name}, which has {rows}: {_ADVICE}")
    return Piece(path=path, first=first, count=count), (rows, *shape[1:])


def _joined(name: str, found: Sequence[tuple[Piece, tuple[int, ...]]]) -> Layout:
    (earliest, shape), *_ = found
    for piece, other in found:
        if other != shape:
            raise LayoutError(
                f"{piece.path} holds {name} as rows of shape {other}; expected {shape}, as in {earliest.path.name}: {_ADVICE}"
            )
    if not shape:
        if len(found) > 1:
            raise LayoutError(
                f"{found[1][0].path} holds {name}, as does {earliest.path.name}; expected it once: {_ADVICE}"
            )
        return Layout(shape=shape, pieces=(earliest,))
    pieces = sorted((piece for piece, _ in found), key=lambda piece: (piece.first, piece.count))
    end = 0
    for piece in pieces:
        if piece.first != end:
            raise LayoutError(
                f"{piece.path} holds {name} from row {piece.first}; expected {end}, after the rows before: {_ADVICE}"
            )
        end += piece.count
    if end != shape[0]:
        raise LayoutError(f"{pieces[-1].path} ends {name} with row {end}; expected {shape[0]}: {_ADVICE}")
    return Layout(shape=shape, pieces=tuple(pieces))
