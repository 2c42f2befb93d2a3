"""Who may ask: the key, the name by which the server is reached, and the pages that browsers show.

Three doors, because a server on one's own machine can be reached by every page that its browser shows:

* the key, compared in constant time, is asked for everywhere but at `/` (the page, which asks a person for it) and `/health`;
* a request whose Host is not one of the server's names is refused, or a page of another site could give its own name this
  machine's address and then read the answers (DNS rebinding);
* a request that a page of another origin makes is refused unless that origin is allowed; an allowed one gets the headers of
  CORS, with the origin itself and never `*`.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names of this machine for itself."""
OPEN_PATHS = ("/", "/health")
"""What is served without the key; neither says anything about the model."""


class Refusal(NamedTuple):
    """Why a request is not served."""

    status: int
    message: str
    code: str | None = None


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may ask."""

    api_key: str | None = None
    """What clients send as a bearer token; None asks for nothing."""
    hosts: frozenset[str] | None = None
    """Names by which the server may be reached, in lower case and without a port; None allows every name."""
    origins: frozenset[str] = frozenset()
    """Origins, besides the server's own, whose pages may ask, such as `https://example.org`."""

    def refusal(self, headers: dict[bytes, bytes], *, path: str) -> Refusal | None:
        """Why a request with these headers (in lower case) is not served, or None."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self.hosts is not None and _name(host) not in self.hosts:
            return Refusal(403, f"the host {host!r} is not a name of this server; --allow-host allows another")
        origin = self._foreign(headers)
        if origin is not None and origin not in self.origins:
            return Refusal(403, f"pages of {origin!r} may not use this server; --allow-origin allows an origin")
        if self.api_key is None or path in OPEN_PATHS or self._knows(headers.get(b"authorization", b"")):
            return None
        expected = "expected the header `Authorization: Bearer KEY`"
        return Refusal(401, f"the API key is missing or wrong; {expected}", "invalid_api_key")

    def cors(self, headers: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        """The headers with which a browser lets a page of an allowed origin read the answer."""
        origin = self._foreign(headers)
        if origin is None or origin not in self.origins:
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-allow-headers", b"authorization, content-type"),
            (b"access-control-expose-headers", b"retry-after"),
            (b"access-control-max-age", b"600"),
            (b"vary", b"origin"),
        ]

    def asks_first(self, headers: dict[bytes, bytes], *, method: str) -> bool:
        """Whether a browser asks on behalf of a page of an allowed origin if it may ask; such a question has no key."""
        return method == "OPTIONS" and b"access-control-request-method" in headers and bool(self.cors(headers))

    def _foreign(self, headers: dict[bytes, bytes]) -> str | None:
        """The origin of the page that asks, where it is not the server's own."""
        origin = headers.get(b"origin", b"").decode("latin-1")
        host = headers.get(b"host", b"").decode("latin-1").lower()
        own = origin.lower() in (f"http://{host}", f"https://{host}")
        return None if not origin or own else origin

    def _knows(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        same = hmac.compare_digest(key.strip(), (self.api_key or "").encode())
        return same and scheme.lower() == b"bearer"


def _name(host: str) -> str | None:
    """The name in a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname if host and "@" not in host and "/" not in host else None
    except ValueError:
        return None
