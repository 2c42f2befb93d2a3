"""The file that describes a pipeline: its stages in order, each with a name, a command, and what it uses.

Notable: a stage uses earlier ones alone, so there are no cycles. What a stage is `from` becomes the argument or option that
its command has for it; any other text of `options` or `set` may be `stage:NAME` or `stage:NAME/path`, which is the place of
that stage's output. Relative paths start at the current directory, as on the command line.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from anarcho_cli.layers import ROOT_KEYS, set_layer, suggestion
from anarcho_cli.pipeline.errors import PipelineError
from anarcho_cli.pipeline.stage_commands import COMMANDS, RUNS, StageCommand

REFERENCE = "stage:"
_STAGE_KEYS = ("name", "command", "from", "data", "options", "set")
_FILE_KEYS = ("name", "stage")
_OWN_OPTIONS = ("name", "runs-dir", "out", "resume", "json", "dry-run", "set")
"""Options that the pipeline gives itself."""
_SHARED_SECTIONS = ("tokenizer", "data")
"""Sections of the configuration that stages read which train nothing."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")

Options = Callable[[tuple[str, ...]], frozenset[str] | None]
"""The names of the options that a command has, without dashes; None where the program has no such command."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of a pipeline."""

    name: str
    """Name of the stage, and of the folder of its output."""
    command_name: str
    """The command, by its name in the file."""
    bases: tuple[str, ...] = ()
    """What it is `from`: names of earlier stages, or paths."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Option without dashes -> value."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Key of the configuration, such as train.steps -> value."""

    @property
    def command(self) -> StageCommand:
        """What is known of its command."""
        return COMMANDS[self.command_name]

    @property
    def uses(self) -> tuple[str, ...]:
        """The earlier stages whose output it reads, each once."""
        bases = [base for base in self.bases if not is_path(base)]
        named = [reference_name(text) for text in texts([self.options, self.settings]) if text.startswith(REFERENCE)]
        return tuple(dict.fromkeys([*bases, *named]))

    def identity(self) -> dict[str, Any]:
        """What the stage's own table says, in the one form that all ways of writing it have."""
        return {
            "command": self.command_name,
            "from": list(self.bases),
            "options": dict(self.options),
            "set": dict(self.settings),
        }


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A file of stages."""

    name: str
    """Name of the pipeline."""
    path: Path
    """Its file."""
    stages: tuple[Stage, ...]
    """The stages, in the order in which they run."""
    overrides: tuple[str, ...] = ()
    """The ``--set`` texts that were applied to them."""

    def command_of(self, stage: str) -> str:
        """The command of the stage with this name."""
        return next(item.command_name for item in self.stages if item.name == stage)


def is_path(text: str) -> bool:
    """Whether a `from` names a path rather than a stage; names of stages hold no slash."""
    return "/" in text


def reference_name(text: str) -> str:
    """The stage in `stage:NAME/path`."""
    return text.removeprefix(REFERENCE).partition("/")[0]


def texts(value: Any) -> Iterator[str]:
    """All strings in a value of TOML."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)


def load_pipeline(path: Path, *, options: Options = lambda words: None, overrides: Sequence[str] = ()) -> Pipeline:
    """Reads and checks a pipeline's file; raises PipelineError, or the OSError that names the file.

    ``options`` tells the options of a command, so that a misspelt one is found now and not after hours. ``overrides`` are
    ``--set`` texts for all stages that they can concern: ``backend=mlx`` for those that have a back-end, keys of [tokenizer]
    and [data] for those that read the configuration, other keys for those that train.
    """
    if path.is_dir():
        raise PipelineError(f"{path} is a directory; expected a TOML file with a [[stage]] table for each stage")
    if not path.exists():
        raise FileNotFoundError(f"the pipeline {path} is not there; check the path")
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path} is not valid TOML ({error}); correct it there") from error
    _check_keys(document, _FILE_KEYS, str(path))
    tables = document.get("stage")
    if not (isinstance(tables, list) and tables and all(isinstance(table, dict) for table in tables)):
        raise PipelineError(f"{path} has no stages; expected a [[stage]] table for each, with a name and a command")
    stages: list[Stage] = []
    for number, table in enumerate(tables, start=1):
        stages.append(_Reader(path, table, number, stages, options).stage())
    name = document.get("name", path.stem)
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise PipelineError(f"{path}: name is {name!r}; expected letters, digits, '_' and '-'")
    changed = _overridden(stages, overrides, options)
    return Pipeline(name=name, path=path, stages=changed, overrides=tuple(overrides))


def _overridden(stages: Sequence[Stage], overrides: Sequence[str], options: Options) -> tuple[Stage, ...]:
    layer = set_layer(overrides)
    settings = dict(_flat(layer.sections))
    _check_settings(settings, "--set")
    changed = []
    for stage in stages:
        trains = stage.command_name in RUNS
        mine = {
            key: value
            for key, value in settings.items()
            if trains or (stage.command.configured and key.split(".")[0] in _SHARED_SECTIONS)
        }
        known = options(stage.command.words) or frozenset()
        own_options = {key: value for key, value in layer.root.items() if key in known}
        changed.append(replace(stage, settings={**stage.settings, **mine}, options={**stage.options, **own_options}))
    return tuple(changed)


def _check_keys(table: Mapping[str, Any], valid: tuple[str, ...], place: str) -> None:
    for key in table:
        if key not in valid:
            raise PipelineError(
                f"{place}: unknown key '{key}'{suggestion(key, valid)}; the keys there are {', '.join(valid)}"
            )


class _Reader:
    """One [[stage]] table on its way to a Stage."""

    def __init__(self, path: Path, table: Mapping[str, Any], number: int, earlier: list[Stage], options: Options):
        self.table, self.options = table, options
        self.earlier = {stage.name: stage for stage in earlier}
        self.place = f"{path}: stage {number}"

    def stage(self) -> Stage:
        _check_keys(self.table, _STAGE_KEYS, self.place)
        name = self._name()
        self.place = self.place.rpartition(" ")[0] + f" '{name}'"
        stage = Stage(
            name=name,
            command_name=self._command(),
            bases=self._bases(),
            options=self._options(),
            settings=self._settings(),
        )
        self._check_bases(stage)
        for used in stage.uses:
            self._require_earlier(used, name)
        self._check_options(stage)
        return stage

    def _name(self) -> str:
        name = self.table.get("name")
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            found = "has no name" if name is None else f"has the name {name!r}"
            raise PipelineError(f"{self.place} {found}; expected letters, digits, '_' and '-'")
        # Some file systems take "Base" and "base" for one folder.
        if name.casefold() in map(str.casefold, self.earlier):
            raise PipelineError(f"{self.place} has the name '{name}', which an earlier stage has; give it another one")
        return name

    def _command(self) -> str:
        command = self.table.get("command")
        if command in COMMANDS:
            return command
        known = f"the commands are {', '.join(COMMANDS)}"
        if not isinstance(command, str):
            raise PipelineError(f"{self.place} has no command; {known}")
        raise PipelineError(f"{self.place}: unknown command '{command}'{suggestion(command, COMMANDS)}; {known}")

    def _text(self, key: str) -> str | None:
        value = self.table.get(key)
        if value is not None and not (isinstance(value, str) and value):
            raise PipelineError(f"{self.place}: {key} is {value!r}; expected a string")
        return value

    def _bases(self) -> tuple[str, ...]:
        value = self.table.get("from", [])
        bases = value if isinstance(value, list) else [value]
        if not all(isinstance(base, str) and base for base in bases):
            raise PipelineError(f"{self.place}: from is {value!r}; expected the name of an earlier stage")
        return tuple(bases)

    def _table(self, key: str) -> Mapping[str, Any]:
        value = self.table.get(key, {})
        if not isinstance(value, dict):
            raise PipelineError(f"{self.place}: {key} is {value!r}; expected a table, such as {{ ... }}")
        return value

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        for key, value in self._table("options").items():
            name = key.removeprefix("--").replace("_", "-")
            if name in _OWN_OPTIONS:
                raise PipelineError(f"{self.place}: the pipeline gives --{name} itself; leave options.{key} out")
            items = value if isinstance(value, list) else [value]
            if not all(isinstance(item, str | int | float) for item in items):
                raise PipelineError(f"{self.place}: options.{key} is {value!r}; expected a string, a number or a list")
            options[name] = value
        return options

    def _settings(self) -> dict[str, Any]:
        settings = dict(_flat(self._table("set")))
        for key in settings:
            if key not in ROOT_KEYS and (len(key.split(".")) < 2 or not all(key.split("."))):
                raise PipelineError(f"{self.place}: set has the key '{key}'; write it as 'section.key', with its value")
        if (data := self._text("data")) is not None:
            if "data.source" in settings:
                raise PipelineError(f"{self.place} gives both data and set's 'data.source'; leave one out")
            settings["data.source"] = data
        return settings

    def _check_bases(self, stage: Stage) -> None:
        command = stage.command
        given = [option for option in (command.model_option, command.base_option) if option in stage.options]
        if not stage.bases:
            if command.needs_base and not given:
                raise PipelineError(
                    f"{self.place} needs `from`; expected the name of an earlier stage whose command is "
                    f"{' or '.join(command.accepts)}"
                )
            return
        if not command.accepts:
            raise PipelineError(f"{self.place}: {stage.command_name} starts from nothing; leave `from` out")
        if given:
            raise PipelineError(f"{self.place} gives both `from` and options.{given[0]}; leave one out")
        if len(stage.bases) > 1 and not command.many:
            raise PipelineError(
                f"{self.place} is from {len(stage.bases)} stages; expected one for {stage.command_name}"
            )
        for base in stage.bases:
            self._check_base(base, stage)

    def _check_base(self, base: str, stage: Stage) -> None:
        if is_path(base):
            if not Path(base).exists():
                raise PipelineError(f"{self.place}: from is {base!r}, which is not there; check the path")
            return
        self._require_earlier(base, stage.name)
        kind, accepted = self.earlier[base].command_name, stage.command.accepts
        if kind not in accepted:
            raise PipelineError(
                f"{self.place} is from '{base}', whose command is {kind}; expected {' or '.join(accepted)}"
            )

    def _require_earlier(self, used: str, name: str) -> None:
        if used in self.earlier:
            return
        found = "itself" if used == name else f"'{used}', which is no earlier stage{suggestion(used, self.earlier)}"
        known = f"the earlier stages are {', '.join(self.earlier)}" if self.earlier else "there is no earlier stage"
        raise PipelineError(f"{self.place} uses {found}; {known}")

    def _check_options(self, stage: Stage) -> None:
        known = self.options(stage.command.words)
        shown = " ".join(stage.command.words)
        for option in stage.options if known is not None else ():
            if option not in (known or ()):
                usual = sorted((known or frozenset()) - {*_OWN_OPTIONS, "help"})
                raise PipelineError(
                    f"{self.place}: {shown} has no option '{option}'{suggestion(option, usual)}; "
                    f"its options are {', '.join(usual)}"
                )
        if known is not None and stage.settings and "set" not in known:
            raise PipelineError(f"{self.place}: {shown} has no settings; leave set and data out")
        if stage.command.configured and stage.settings:
            _check_settings(stage.settings, f"{self.place}: set")


def _check_settings(settings: Mapping[str, Any], place: str) -> None:
    from anarcho_cli import schema
    from anarcho_cli.config import SECTIONS

    for path in settings:
        if path in ROOT_KEYS:
            continue
        section, key = path.split(".")[:2]
        if section not in SECTIONS:
            raise PipelineError(
                f"{place} has the unknown section '{section}'{suggestion(section, SECTIONS)}; "
                f"the sections are {', '.join(SECTIONS)}"
            )
        schema.check_key(SECTIONS, section, key, place)


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key -> value of tables in tables: TOML reads `set.train.steps = 1` as such."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
