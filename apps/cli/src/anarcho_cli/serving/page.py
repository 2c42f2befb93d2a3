"""The chat page at `/`: one file, with a policy that allows nothing but its own style, its own script and this server."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib.resources import files

from fastapi.responses import Response


@functools.cache
def _page() -> bytes:
    return files("anarcho_cli.serving").joinpath("page.html").read_bytes()


@functools.cache
def content_policy() -> str:
    """The Content-Security-Policy: hashes of the page's one script and one style, and no other source but the server.

    Trusted Types make assignments of text to markup an error in browsers that know them.
    """
    sources = {}
    for tag in (b"script", b"style"):
        (content,) = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), _page(), flags=re.DOTALL)
        sources[tag] = "'sha256-" + base64.b64encode(hashlib.sha256(content).digest()).decode() + "'"
    rules = [
        "default-src 'none'",
        f"script-src {sources[b'script']}",
        f"style-src {sources[b'style']}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    return "; ".join(rules)


def page() -> Response:
    """The page."""
    headers = {
        "content-security-policy": content_policy(),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "permissions-policy": "camera=(), microphone=(), geolocation=()",
        "cache-control": "no-cache",
    }
    return Response(_page(), media_type="text/html; charset=utf-8", headers=headers)
