"""The environment in which a stranger's chat template is rendered: what transformers gives to templates, in a sandbox with limits.

Jinja's sandbox keeps a template from everything but its conversation, not from computing for ever or filling the memory. Notable: both
limits are counts, not a clock, so the same template is refused on every machine alike. Each pass of a loop and each call of a macro is
counted; the size of a text is looked at wherever one is made of others.

The library is jinja2 (extra `chat-template`).
"""

import functools
import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["MAX_PASSES", "MAX_SIZE", "TemplateSandbox"]

MAX_PASSES = 100_000
"""Passes of loops and calls of macros while one conversation is written: some for each of its messages is usual."""
MAX_SIZE = 16 * 2**20
"""Characters of a text, or items of a list, that a template may make."""

_COUNT = "_count_pass"


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Jinja with the settings and functions of transformers; ``begin`` and ``end`` stand around each `{% generation %}` block."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, *, begin: str, end: str) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.marks = (begin, end)
        self.filters = {name: _bounded(function) for name, function in self.filters.items()}
        self.filters["tojson"] = _bounded(_tojson)
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def write(self, template: jinja2.Template, **values: Any) -> str:
        """The template's text for these values; raises jinja2.TemplateError where it exceeds a limit."""
        passes = 0

        def count() -> str:
            nonlocal passes
            passes += 1
            if passes > MAX_PASSES:
                raise jinja2.TemplateError(f"it loops more than {MAX_PASSES:,} times")
            return ""

        parts, size = [], 0
        for part in template.generate(**values, **{_COUNT: count}):
            size += len(part)
            parts.append(part)
            if size > MAX_SIZE:
                raise _too_large()
        return "".join(parts)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            counted = nodes.Call(nodes.Name(_COUNT, "load"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(counted).set_lineno(node.lineno))
        _replace_concatenations(tree)
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Sums, products, powers and formatting, where the result is not too large."""
        if operator == "*" and isinstance(left, int) != isinstance(right, int):
            times, repeated = (left, right) if isinstance(left, int) else (right, left)
            if hasattr(repeated, "__len__") and times * len(repeated) > MAX_SIZE:
                raise _too_large()
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * max(right, 1)
            if bits > 4096:
                raise jinja2.TemplateError("it computes with numbers of more than 4096 bits")
        return _checked(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Methods and functions that the sandbox allows, where the result is not too large."""
        return _checked(super().call(context, function, *args, **kwargs))


class _Generation(Extension):
    """The block around an answer; it puts a mark on either side."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        assert isinstance(self.environment, TemplateSandbox)
        begin, end = self.environment.marks
        return f"{begin}{caller()}{end}"


def _replace_concatenations(node: nodes.Node) -> None:
    """Turns ``a ~ b`` into ``[a, b] | join``: a filter looks at the size of what it makes, Jinja's own concatenation does not."""
    for child in node.iter_child_nodes():
        _replace_concatenations(child)
    for field, value in node.iter_fields():
        if isinstance(value, nodes.Concat):
            setattr(node, field, _joined(value))
        elif isinstance(value, list):
            value[:] = [_joined(item) if isinstance(item, nodes.Concat) else item for item in value]


def _joined(node: nodes.Concat) -> nodes.Filter:
    return nodes.Filter(
        nodes.List(list(node.nodes), lineno=node.lineno), "join", [], [], None, None, lineno=node.lineno
    )


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        return _checked(function(*args, **kwargs))

    return bounded


def _checked(value: Any) -> Any:
    if isinstance(value, str | bytes | list | tuple) and len(value) > MAX_SIZE:
        raise _too_large()
    return value


def _too_large() -> jinja2.TemplateError:
    return jinja2.TemplateError(f"it makes a text of more than {MAX_SIZE:,} characters")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own would write & and < for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
