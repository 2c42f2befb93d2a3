"""Where settings come from: presets, TOML files and ``--set section.key=value``, merged in that order.

Every value keeps the name of the layer that set it, so that an error names the file, the preset or the option at fault.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

PRESETS = resources.files("anarcho_cli") / "presets"
DEFAULT_PRESET = "quickstart"
CONTINUED_PRESET = "continued"
"""The preset of runs that pre-train a model further, unless another is given."""

ROOT_KEYS = {"backend": ("torch", "mlx")}
"""Keys that stand outside any section -> their values: what may change between the attempts at a run, which its files do not keep."""


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one sentence for the user."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Settings of one origin."""

    origin: str
    """What an error calls this layer: a file, `preset NAME` or `--set`."""
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Section name -> key -> value, as TOML gives them."""
    root: Mapping[str, str] = field(default_factory=dict)
    """The same for keys of `ROOT_KEYS`."""


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that looks most like ``name``, or None where none is close."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return matches[0] if matches else None


def suggestion(name: str, valid: Iterable[str]) -> str:
    """`` (did you mean 'x'?)``, or nothing where no valid name is close."""
    match = nearest(name, valid)
    return f" (did you mean '{match}'?)" if match else ""


def preset_names() -> list[str]:
    """Names of the presets that come with the program, `quickstart` first."""
    names = sorted(entry.name.removesuffix(".toml") for entry in PRESETS.iterdir() if entry.name.endswith(".toml"))
    return sorted(names, key=lambda name: name != "quickstart")


def preset_text(name: str) -> str:
    """The TOML text of a preset; raises ConfigError with the nearest name where there is no such preset."""
    names = preset_names()
    if name not in names:
        raise ConfigError(f"unknown preset '{name}'{suggestion(name, names)}; the presets are {', '.join(names)}")
    return (PRESETS / f"{name}.toml").read_text(encoding="utf-8")


def preset_layer(name: str) -> Layer:
    """The settings of a preset."""
    return parse_layer(preset_text(name), origin=f"preset {name}")


def file_layer(path: Path) -> Layer:
    """The settings of a TOML file; raises ConfigError or the OSError that names the file."""
    if path.is_dir():
        raise ConfigError(f"{path} is a directory; expected a TOML file")
    if not path.exists():
        raise FileNotFoundError(f"the configuration file {path} is not there; check the path")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    return parse_layer(text, origin=str(path))


def parse_layer(text: str, *, origin: str) -> Layer:
    """The settings of a TOML text; raises ConfigError with the line of a syntax error."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_syntax_sentence(str(error), text, origin)) from error
    root = {key: _root(key, document.pop(key), origin) for key in ROOT_KEYS if key in document}
    for key, value in document.items():
        if not isinstance(value, dict):
            raise ConfigError(f"{origin}: '{key}' stands outside any section; put it under one, such as [train]")
    return Layer(origin=origin, sections=document, root=root)


def _root(key: str, value: Any, origin: str) -> str:
    if value not in ROOT_KEYS[key]:
        raise ConfigError(
            f"{origin}: {key} is {value!r}{suggestion(str(value), ROOT_KEYS[key])}; "
            f"expected one of {', '.join(ROOT_KEYS[key])}"
        )
    return value


def root_value(key: str, *, file: Path | None, overrides: Sequence[str]) -> str | None:
    """What ``--set`` texts say of a key of `ROOT_KEYS`, else what the TOML file says; None where neither does."""
    layers = [set_layer(overrides), *([] if file is None else [file_layer(file)])]
    return next((layer.root[key] for layer in layers if key in layer.root), None)


def _syntax_sentence(message: str, text: str, origin: str) -> str:
    """tomllib's complaint with the line number in front, as compilers and editors write it."""
    place = re.search(r" \(at line (\d+), column (\d+)\)$", message)
    line = int(place[1]) if place else text.count("\n") + 1
    reason = message[: place.start()] if place else message.removesuffix(" (at end of document)")
    return f"{origin}:{line}: not valid TOML ({reason}); correct that line"


def set_layer(assignments: Sequence[str]) -> Layer:
    """The settings of ``--set section.key=value`` options; a later one wins.

    Values are TOML (`10`, `0.5`, `true`, `"text"`, `[1, 2]`); a bare word is taken as a string.
    """
    sections: dict[str, dict[str, Any]] = {}
    root: dict[str, str] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = [key.strip() for key in path.split(".")]
        if equals and keys[0] in ROOT_KEYS and len(keys) == 1:
            root[keys[0]] = _root(keys[0], _set_value(text.strip(), assignment), "--set")
            continue
        if not equals or len(keys) < 2 or not all(keys):
            raise ConfigError(f"--set {assignment!r} is not an assignment; write it as section.key=value")
        table: dict[str, Any] = sections
        for key in keys[:-1]:
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {assignment!r} looks inside {key}, which another --set makes a plain value")
        table[keys[-1]] = _set_value(text.strip(), assignment)
    return Layer(origin="--set", sections=sections, root=root)


def _set_value(text: str, assignment: str) -> Any:
    """The TOML value of ``text``, or the text itself where it is a bare word."""
    try:
        document = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if text[:1] in ('"', "'", "[", "{"):
            raise ConfigError(f"--set {assignment!r} has a value that is not valid TOML ({error})") from error
        return text
    value = document["value"]
    plain = len(document) == 1 and isinstance(value, bool | int | float | str | list | dict)
    return value if plain else text


def merge(layers: Sequence[Layer]) -> tuple[dict[str, dict[str, Any]], dict[tuple[str, str], str]]:
    """The layers' settings, a later layer over an earlier one, and (section, key) -> origin of each."""
    sections: dict[str, dict[str, Any]] = {}
    origins: dict[tuple[str, str], str] = {}
    for layer in layers:
        for section, values in layer.sections.items():
            for key, value in values.items():
                table = sections.setdefault(section, {})
                previous = table.get(key)
                both_tables = isinstance(previous, dict) and isinstance(value, dict)
                table[key] = {**(previous or {}), **value} if both_tables else value
                origins[section, key] = layer.origin
    return sections, origins
