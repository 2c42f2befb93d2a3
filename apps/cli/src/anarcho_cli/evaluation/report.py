"""What an evaluation found, as tables for people and as JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anarcho_cli.evaluation.statistics import Estimate

_ACCURACIES = ("accuracy", "accuracy_per_byte")


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """One model on one text or task."""

    name: str
    """The source or file."""
    kind: str
    """`text`, `multiple-choice`, `last-word` or `preference`."""
    num_items: int
    """Documents or rows that were scored."""
    sha256: str
    """Of what was scored; equal for equal items, so that figures of different days can be compared."""
    estimates: Mapping[str, Estimate]
    """By the name of the measure."""
    counts: Mapping[str, int]
    """What was read."""

    def to_dict(self) -> dict[str, Any]:
        """All but the items' influences, for JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "items": self.num_items,
            "sha256": self.sha256,
            **self.counts,
            "measures": {name: _numbers(estimate) for name, estimate in self.estimates.items()},
        }


Evaluations = Mapping[str, Sequence[Evaluation]]
"""Model -> what was found, the same texts and tasks in the same order for each."""


def to_json(found: Evaluations, *, compare: bool, settings: Mapping[str, Any]) -> dict[str, Any]:
    """One object; with `compare`, also the differences to the first model."""
    models = [{"model": model, "evaluations": [one.to_dict() for one in several]} for model, several in found.items()]
    document: dict[str, Any] = {"settings": dict(settings), "models": models}
    if compare:
        first = next(iter(found))
        document["differences"] = [
            {"model": model, "to": first, "name": one.name, "measure": name, **_numbers(estimate)}
            for model, several in list(found.items())[1:]
            for base, one in zip(found[first], several, strict=True)
            for name, estimate in _differences(base, one)
        ]
    return document


def print_report(found: Evaluations, *, compare: bool) -> None:
    """A line for each measure, with the standard error behind the number; with `compare`, a column for each model."""
    from anarcho_cli.output import print_table

    if compare:
        # Paths are too long for the heads of columns.
        letters = [chr(ord("A") + number) if number < 26 else str(number + 1) for number in range(len(found))]
        print_table(["", "model"], zip(letters, found, strict=True))
        columns = ["on", "measure", "#items", *(f"#{letter}" for letter in letters)]
        print_table([*columns, *(f"#{letter} - A" for letter in letters[1:])], _side_by_side(found))
    else:
        for model, several in found.items():
            rows = [
                (one.name, name, one.num_items, shown(estimate, name=name))
                for one in several
                for name, estimate in one.estimates.items()
            ]
            print_table(["on", "measure", "#items", "#value"], rows, title=model)
    for line in _remarks(found):
        print(line)


def shown(estimate: Estimate, *, name: str, signed: bool = False) -> str:
    """Value and standard error: `0.7312 ± 0.0091`; accuracies in per cent."""
    scale, unit = (100, " %") if name in _ACCURACIES else (1, "")
    sign = "+" if signed else ""
    value, error = scale * estimate.value, estimate.standard_error
    digits = 2 if unit else max(0, 4 - max(0, len(f"{abs(value):.0f}") - 1)) if math.isfinite(value) else 0
    spread = "" if error is None else f" ± {scale * error:.{digits}f}"
    return f"{value:{sign}.{digits}f}{spread}{unit}"


def _side_by_side(found: Evaluations) -> Iterator[Sequence[object]]:
    first, *others = found.values()
    for number, base in enumerate(first):
        several = [evaluations[number] for evaluations in found.values()]
        differences = [dict(_differences(base, evaluations[number])) for evaluations in others]
        for name in base.estimates:
            values = [shown(one.estimates[name], name=name) for one in several]
            signed = [shown(difference[name], name=name, signed=True) for difference in differences]
            yield base.name, name, base.num_items, *values, *signed


def _differences(base: Evaluation, other: Evaluation) -> Iterator[tuple[str, Estimate]]:
    for name, estimate in other.estimates.items():
        yield name, estimate.minus(base.estimates[name])


def _remarks(found: Evaluations) -> Iterator[str]:
    """How much was read, and what the context was too short for."""
    for model, several in found.items():
        for one in several:
            counts = one.counts
            if one.kind == "text":
                line = f"{counts['bytes']} bytes, {counts['tokens']} tokens"
                if counts["documents_in_windows"]:
                    line += (
                        f"; {counts['documents_in_windows']} of {one.num_items} documents are longer than the context, "
                        "read in windows of full strides"
                    )
                yield f"{model} on {one.name}: {line}"
            elif counts["cut"]:
                yield f"{model} on {one.name}: {counts['cut']} texts are longer than the context, which begins later for them"


def _numbers(estimate: Estimate) -> dict[str, float | None]:
    error = estimate.standard_error
    return {
        "value": estimate.value if math.isfinite(estimate.value) else None,
        "standard_error": error if error is not None and math.isfinite(error) else None,
    }
