"""HTML and SVG from elements: every text is escaped, because what is not `Markup` is text.

Notable: a report shows what models wrote and what configurations hold, which nobody may trust. Names of elements and attributes come from
this program alone; everything else goes through `element`, so there is no other way into the page.
"""

from __future__ import annotations

import html
import json
from typing import Any

_VOID = frozenset({"meta", "br", "link"})


class Markup(str):
    """A piece of HTML that is whole and safe as it stands."""

    __slots__ = ()


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element; children are `Markup` or text, None is left out.

    Attributes that are None or False are left out, True ones have no value; ``class_`` is ``class``, and an underscore is a hyphen.
    """
    head = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Markup(f"<{name}{head}>")
    return Markup(f"<{name}{head}>{join(*children)}</{name}>")


def join(*children: object) -> Markup:
    """Pieces one after another; what is not `Markup` is escaped, None is left out, lists are gone through."""
    parts = []
    for child in children:
        if isinstance(child, list | tuple):
            parts.append(join(*child))
        elif isinstance(child, Markup):
            parts.append(child)
        elif child is not None:
            parts.append(html.escape(_clean(str(child))))
    return Markup("".join(parts))


def json_script(value: Any, *, name: str) -> Markup:
    """Data for the page's script, in an element with the id ``name``; nothing in it can end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(f'<script type="application/json" id="{html.escape(name)}">{text}</script>')


def _attribute(key: str, value: object) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(_clean(str(value)))}"'


def _clean(text: str) -> str:
    """Without what HTML cannot hold: control characters and halves of surrogate pairs are shown as U+FFFD."""
    return "".join(
        char
        if char in "\n\t" or (ord(char) >= 32 and not 0x7F <= ord(char) <= 0x9F and not 0xD800 <= ord(char) <= 0xDFFF)
        else "\ufffd"
        for char in text
    )
