"""Whether a file is what safetensors allow, judged from its header alone and before any library maps it.

Notable: the checks are those of the format's description (https://huggingface.co/docs/safetensors): a length of 8 bytes, a JSON object
of that length, and tensors whose bytes follow one another without hole or overlap to the file's end. Besides, what only a hostile file
has is refused: a header of more than 100 MB, names that occur twice, and sizes that no memory has. Nothing is allocated that the header
asks for.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
MAX_RANK = 16
"""Dimensions of a tensor; no framework writes as many."""

BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Size of an element by the format's name of its type."""


class HeaderError(ValueError):
    """A header that is not sound; the message goes on after the file's name."""


class _Twice(ValueError):
    """A name that an object holds twice."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a safetensors file says of itself."""

    shapes: dict[str, tuple[int, ...]]
    """By the tensors' names."""
    metadata: dict[str, str]
    """Texts beside them."""


def header_problem(path: Path) -> str | None:
    """What is wrong with the safetensors file at ``path``, as words that go on after its name; None where its header is sound."""
    try:
        read_header(path)
    except HeaderError as error:
        return str(error)
    return None


def read_header(path: Path) -> Header:
    """The header of a safetensors file; raises `HeaderError` where it is not sound."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise HeaderError(
                f"is no safetensors file: its header would have {length} bytes, of {max(0, size - 8)} that there are"
            )
        if length > MAX_HEADER_BYTES:
            raise HeaderError(f"has a header of {length} bytes; expected at most {MAX_HEADER_BYTES}")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise HeaderError(
            f"is no safetensors file: its header cannot be read ({' '.join(str(error).split())[:120]})"
        ) from None
    if not isinstance(header, dict):
        raise HeaderError(f"is no safetensors file: its header is a {type(header).__name__}")
    metadata = header.pop("__metadata__", None) or {}  # MLX writes null.
    if problem := _layout_problem(header, metadata, size - 8 - length):
        raise HeaderError(problem)
    return Header(shapes={name: tuple(entry["shape"]) for name, entry in header.items()}, metadata=metadata)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Twice("a name occurs twice")
    return found


def _layout_problem(header: dict[str, Any], metadata: Any, num_bytes: int) -> str | None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        return "has metadata that are no texts"
    places = []
    for name, entry in header.items():
        problem = _entry_problem(entry)
        if problem:
            return f"holds {name[:80]!r}, {problem}"
        places.append((*entry["data_offsets"], name))
    end = 0
    for begin, stop, name in sorted(places):
        if begin != end:
            return f"holds {name[:80]!r} at byte {begin} of its tensors; expected it at {end}, after the one before"
        end = stop
    return None if end == num_bytes else f"has tensors of {end} bytes, but {num_bytes} after its header"


def _entry_problem(entry: Any) -> str | None:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "which is no description of a tensor"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        return f"of type {str(dtype)[:40]!r}, which is unknown"
    if not _counts(shape) or len(shape) > MAX_RANK:
        return f"of shape {str(shape)[:60]}; expected whole numbers from 0"
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"at {str(offsets)[:60]}; expected where it begins and ends"
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        return f"of shape {str(shape)[:60]} and type {dtype}, which does not have the {offsets[1] - offsets[0]} bytes that are its"
    return None


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)
