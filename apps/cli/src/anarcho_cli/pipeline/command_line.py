"""The command line of a stage: its options and settings, with the places of the outputs that it uses."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anarcho_cli.pipeline.definition import REFERENCE, Pipeline, Stage, is_path, reference_name
from anarcho_cli.pipeline.stage_commands import MODELS, Output, tokenizer_of


def arguments(pipeline: Pipeline, stage: Stage, directory: Path, *, resume: bool = False) -> list[str]:
    """What follows `anarcho` on the command line of a stage whose output lies under ``directory``.

    A run that is resumed keeps its configuration; only framework and device may be others.
    """
    command, output = stage.command, directory / stage.name
    if resume and command.output is Output.run:
        return [
            *command.words,
            f"--resume={output}",
            *_options({k: v for k, v in stage.options.items() if k in ("backend", "device")}),
        ]
    line = [*command.words, *_base(pipeline, stage, directory), *_place(stage, directory)]
    line += _options(_placed(stage.options, directory))
    for key, value in _placed(stage.settings, directory).items():
        line += ["--set", f"{key}={toml_text(value)}"]
    return line


def _base(pipeline: Pipeline, stage: Stage, directory: Path) -> list[str]:
    line: list[str] = []
    for base in stage.bases:
        place = Path(base) if is_path(base) else directory / base
        goes_on = stage.command.model_option is not None and is_model(pipeline, base)
        option = stage.command.model_option if goes_on else stage.command.base_option
        if option == "tokenizer" and not is_path(base):
            place = tokenizer_of(pipeline.command_of(base), place)
        line.append(str(place) if option is None else f"--{option}={place}")
    return line


def is_model(pipeline: Pipeline, base: str) -> bool:
    """Whether what a stage is `from` has a model: a stage that makes one, or the path of a run or of a model."""
    if is_path(base):
        return any((Path(base) / name).is_file() for name in ("config.toml", "config.json"))
    return pipeline.command_of(base) in MODELS


def _place(stage: Stage, directory: Path) -> list[str]:
    if stage.command.output is Output.run:
        return [f"--runs-dir={directory}", f"--name={stage.name}"]
    return [f"--out={directory / stage.name}"] if stage.command.output is Output.directory else ["--json"]


def _options(options: Mapping[str, Any]) -> list[str]:
    """`--name=value` of each; true is the option alone, false the option left out, a list the option several times."""
    line: list[str] = []
    for name, value in options.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, bool):
                line += [f"--{name}"] if item else []
            else:
                line.append(f"--{name}={item}")
    return line


def _placed(value: Any, directory: Path) -> Any:
    """The value with paths where it names stages."""
    if isinstance(value, str) and value.startswith(REFERENCE):
        _, slash, rest = value.removeprefix(REFERENCE).partition("/")
        return str(directory / reference_name(value)) + slash + rest
    if isinstance(value, Mapping):
        return {key: _placed(item, directory) for key, item in value.items()}
    return [_placed(item, directory) for item in value] if isinstance(value, list) else value


def toml_text(value: Any) -> str:
    """A value as TOML on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{toml_text(key)} = {toml_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_text, value)) + "]"
    if isinstance(value, str):
        # JSON escapes all that TOML wants escaped, but for the delete character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    return repr(value)
