"""What a part takes of a training step, where the same call has measured both on the same place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from anarcho_cli.benching.cases import Kind

Row = Mapping[str, Any]


def with_shares(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows, those of the optimizer with `share_of_step`, those of data with `shares_of_step` by framework and device.

    The share of data is what reading a step's batches would add to the step: nothing is read while the device works. It is None, or
    has no entry, where the training step of that place was not measured.
    """
    return [{**row, **_shares(row, rows)} for row in rows]


def place(row: Row) -> str:
    """The framework and the device of a row."""
    return f"{row['backend']} {row['device']}"


def _shares(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    if "error" in row or row["kind"] not in (Kind.optimizer, Kind.data):
        return {}
    steps = {
        place(other): other["step_seconds"]
        for other in rows
        if other["kind"] == Kind.training and other["preset"] == row["preset"] and "error" not in other
    }
    if row["kind"] == Kind.data:
        return {"shares_of_step": {where: row["read_seconds"] / seconds for where, seconds in steps.items()}}
    return {"share_of_step": row["update_seconds"] / steps[place(row)] if place(row) in steps else None}
