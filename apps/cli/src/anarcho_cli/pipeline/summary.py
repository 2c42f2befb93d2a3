"""What a person wants to know at the end of a stage or a pipeline: the figures of an evaluation, and how to try the model."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anarcho_cli.pipeline.definition import Pipeline, Stage, is_path
from anarcho_cli.pipeline.stage_commands import RUNS

_SHOWN = {"bits_per_byte": (1, ""), "accuracy": (100, " %")}
"""Measures that are shown, with their scale and unit; the report has all of them."""
_TUNED = ("sft", "preference")


def report_lines(report: Path) -> list[str]:
    """A line for each text and task of an evaluation's report, with all models; nothing for a report of another shape."""
    try:
        models = json.loads(report.read_text(encoding="utf-8"))["models"]
        named = [(Path(model["model"]).name, model["evaluations"]) for model in models]
        return [line for number in range(len(named[0][1])) for line in _measure_lines(named, number)]
    except (OSError, ValueError, KeyError, IndexError, TypeError):  # The figures are in the file in any case.
        return []


def _measure_lines(named: list[tuple[str, list[dict[str, Any]]]], number: int) -> Iterator[str]:
    for measure, (scale, unit) in _SHOWN.items():
        values = [(name, several[number]["measures"].get(measure)) for name, several in named]
        if all(value is not None and value["value"] is not None for _, value in values):
            shown = ", ".join(f"{name} {_shown(value or {}, scale)}{unit}" for name, value in values)
            yield f"{named[0][1][number]['name']}, {measure.replace('_', ' ')}: {shown}"


def _shown(value: dict[str, Any], scale: int) -> str:
    digits, error = 1 if scale > 1 else 4, value["standard_error"]
    spread = "" if error is None else f" ± {scale * error:.{digits}f}"
    return f"{scale * value['value']:.{digits}f}{spread}"


def trial_command(pipeline: Pipeline, directory: Path) -> str | None:
    """The command that tries the last model of a pipeline; None where it makes none that `anarcho` reads."""
    for stage in reversed(pipeline.stages):
        if stage.command_name in RUNS or (stage.command_name == "export" and stage.options.get("to", "hf") == "hf"):
            place = str(directory / stage.name)
            words = ["chat", place] if _is_tuned(pipeline, stage) else ["generate", place, "It was"]
            return shlex.join(["anarcho", *words])
    return None


def _is_tuned(pipeline: Pipeline, stage: Stage) -> bool:
    """Whether the stage, or one that it is from, taught a model to converse."""
    if stage.command_name in _TUNED:
        return True
    earlier = {item.name: item for item in pipeline.stages}
    return any(_is_tuned(pipeline, earlier[base]) for base in stage.bases if not is_path(base))
