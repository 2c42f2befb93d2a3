"""Configuration dataclasses checked by pydantic, with one sentence for whatever does not fit.

The packages own plain frozen dataclasses and know nothing of pydantic. Here a strict pydantic model is generated from
each of them (types, defaults, and the docstring under each field as its description). The model checks the types, the
dataclass's own ``__post_init__`` checks the values. TOML has no null, so ``"none"`` stands for it.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import pydantic

from anarcho_cli.layers import ConfigError, suggestion

NONE = "none"
"""How a TOML file and ``--set`` write the absence of a value."""

Config = TypeVar("Config")


def check_key(sections: Mapping[str, type], section: str, key: str, origin: str) -> None:
    """Raise ConfigError for a key that the section lacks, with the nearest one and all valid ones."""
    keys = {name: [field.name for field in dataclasses.fields(sections[name])] for name in sections}
    if key in keys[section]:
        return
    # A key of that very name in another section is a likelier wish than a similar one in this section.
    elsewhere = [f"{name}.{key}" for name in sections if key in keys[name]]
    here = [f"{section}.{name}" for name in keys[section]]
    raise ConfigError(
        f"{origin}: unknown key '{section}.{key}'{suggestion(f'{section}.{key}', elsewhere or here)}; "
        f"the keys of [{section}] are {', '.join(keys[section])}"
    )


def build(section: str, config_class: type[Config], values: Mapping[str, Any], origins: Mapping[str, str]) -> Config:
    """An instance of ``config_class`` from TOML values of known keys; raises ConfigError naming key, found, expected.

    ``origins`` maps each key to the file or option that set it. Values that have the right type but make no sense are
    refused by the dataclass itself, with its own ValueError.
    """
    hints = field_types(config_class)
    plain = {key: _with_absent(value, hints[key]) for key, value in values.items()}
    try:
        # JSON mode, because strict Python mode would refuse a list for a tuple and a string for a path.
        checked = model_of(config_class).model_validate_json(json.dumps(plain, default=str), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"]]
        raise ConfigError(f"{origins[path[0]]}: {_sentence(section, config_class, path, first)}") from error
    return _instance(config_class, checked)


def _instance(config_class: type[Config], checked: pydantic.BaseModel) -> Config:
    """The dataclass with the keys that were given; the others keep the dataclass's own defaults."""
    values = {key: getattr(checked, key) for key in checked.model_fields_set}
    for key, value in values.items():
        hint = field_types(config_class)[key]
        if (nested := _nested(hint)) is not None and value is not None:
            values[key] = _instance(nested, value)
        elif (item := _item(hint)) is not None and value is not None:
            values[key] = tuple(_instance(item, element) for element in value)
    return config_class(**values)


def _with_absent(value: Any, hint: Any) -> Any:
    """The value of a TOML file with None where it says "none", tables inside it included."""
    if value == NONE and _optional(hint):
        return None
    if isinstance(value, list) and (item := _item(hint)) is not None:
        return [_with_absent(element, item) for element in value]
    owner = hint if dataclasses.is_dataclass(hint) else _nested(hint)
    if isinstance(value, dict) and isinstance(owner, type):
        hints = field_types(owner)
        return {key: _with_absent(inner, hints.get(key)) for key, inner in value.items()}
    return value


def _sentence(section: str, config_class: type, path: Sequence[str], error: Mapping[str, Any]) -> str:
    """What pydantic found wrong at ``path``, in our words: key, what was found, what was expected."""
    hint: Any = config_class
    shown = section
    for key in path:
        if (item := _item(hint)) is not None and key.isdecimal():
            hint, shown = item, f"{shown}[{int(key) + 1}]"
            continue
        owner = hint if dataclasses.is_dataclass(hint) else _nested(hint)
        if owner is None:
            break
        shown = f"{shown}.{key}"
        valid = [field.name for field in dataclasses.fields(owner)]
        if key not in valid:
            return f"unknown key '{shown}'{suggestion(key, valid)}; the keys there are {', '.join(valid)}"
        hint = field_types(owner)[key]
    if error["type"] == "missing":
        return f"{shown} is missing; expected {describe(hint)}"
    return f"{shown} is {_toml_repr(error['input'])}; expected {describe(hint)}"


@cache
def model_of(config_class: type) -> type[pydantic.BaseModel]:
    """The strict pydantic model with the fields, defaults and descriptions of a dataclass."""
    hints, descriptions = field_types(config_class), field_docs(config_class)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        default: dict[str, Any] = {} if field.default is dataclasses.MISSING else {"default": field.default}
        if field.default_factory is not dataclasses.MISSING:
            default = {"default_factory": field.default_factory}
        hint = hints[field.name]
        if (nested := _nested(hint)) is not None:
            hint = model_of(nested) | None
        elif (item := _item(hint)) is not None:
            hint = tuple[model_of(item), ...]  # type: ignore[misc]
        fields[field.name] = (hint, pydantic.Field(description=descriptions.get(field.name), **default))
    settings = pydantic.ConfigDict(extra="forbid", protected_namespaces=())
    return pydantic.create_model(config_class.__name__, __config__=settings, __doc__=config_class.__doc__, **fields)


def json_schema(sections: Mapping[str, type], *, title: str) -> dict[str, Any]:
    """JSON Schema of a TOML file with these sections, for editors that check and complete TOML."""
    document: dict[str, Any] = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title}
    document |= {"type": "object", "additionalProperties": False, "properties": {}}
    definitions: dict[str, Any] = {}
    for name, config_class in sections.items():
        schema = _without_null(model_of(config_class).model_json_schema())
        definitions |= schema.pop("$defs", {})
        document["properties"][name] = schema
    return document | ({"$defs": definitions} if definitions else {})


def _without_null(schema: Any) -> Any:
    """The schema with TOML's stand-in where JSON would have null."""
    if isinstance(schema, list):
        return [_without_null(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema == {"type": "null"}:
        return {"const": NONE}
    return {key: NONE if key == "default" and item is None else _without_null(item) for key, item in schema.items()}


@cache
def field_types(config_class: type) -> dict[str, Any]:
    """Field name -> resolved type."""
    return typing.get_type_hints(config_class)


@cache
def field_docs(config_class: type) -> dict[str, str]:
    """Field name -> the docstring under the field, inherited fields included."""
    docs: dict[str, str] = {}
    for owner in reversed(config_class.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        definition = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(definition, ast.ClassDef)
        for statement, following in zip(definition.body, definition.body[1:], strict=False):
            if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                docs[statement.target.id] = inspect.cleandoc(str(following.value.value))
    return docs


def describe(hint: Any) -> str:
    """What a field of this type accepts, in words."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", Path: "a path"}
    if hint in names:
        return names[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        some = " or ".join(describe(argument) for argument in arguments if argument is not types.NoneType)
        return f'{some}, or "{NONE}"' if types.NoneType in arguments else some
    if origin is Literal:
        return "one of " + ", ".join(f'"{argument}"' for argument in arguments)
    if _item(hint) is not None:
        return "a list of tables"
    if origin in (tuple, list):
        item = {int: "whole numbers", float: "numbers", str: "strings"}.get(arguments[0] if arguments else None)
        return f"a list of {item}" if item else "a list"
    return "a table"


def _nested(hint: Any) -> type | None:
    """The dataclass in a type such as ``RopeScaling | None``: a table inside the section."""
    if get_origin(hint) not in (Union, types.UnionType):
        return None
    found = (item for item in get_args(hint) if isinstance(item, type) and dataclasses.is_dataclass(item))
    return next(found, None)


def _item(hint: Any) -> type | None:
    """The dataclass in a type such as ``tuple[SourceConfig, ...]``: one of several tables inside the section."""
    if get_origin(hint) is not tuple or not get_args(hint):
        return None
    item = get_args(hint)[0]
    return item if isinstance(item, type) and dataclasses.is_dataclass(item) else None


def _optional(hint: Any) -> bool:
    return types.NoneType in get_args(hint)


def _toml_repr(value: Any) -> str:
    """A value as the user would write it, cut where it is long."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
