"""What no client may do to the server: send too much, send or read too slowly, or come with too many others.

Too large a body is answered with 413, with a content-length or without; too slow a one, or too slow a header, with 408; what
`Access` refuses with 401 or 403. More connections than the cap are answered with 503 and Retry-After, and more than twice
the cap are closed unread.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from anarcho_cli.serving.access import Access, Refusal

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

HEADER_SECONDS = 10.0
"""A request's headers must be there by then."""
RETRY_SECONDS = 5
"""When a client that was refused because of many others may come again."""
TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one request."""

    max_body_bytes: int = 2**20
    body_seconds: float = 10.0
    """A request's body must be there by then."""
    write_seconds: float = 30.0
    """A client that takes no data for so long is dropped."""
    max_waiting: int = 256
    """Texts that may wait for a slot; a request that would make it more is answered with 429."""


class TooSlowError(Exception):
    """The client has not read in time."""


class Guard:
    """The application behind its limits and its doors."""

    def __init__(self, app: App, *, limits: Limits, access: Access) -> None:
        self.app, self.limits, self.access = app, limits, access

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        send = _adding(self.access.cors(headers), send)
        asks_first = self.access.asks_first(headers, method=scope["method"])
        # A browser's question comes without the key, as to an open path.
        refusal = self.access.refusal(headers, path="/" if asks_first else scope["path"])
        body = None
        if refusal is None and not asks_first:
            body, refusal = await self._body(int(headers.get(b"content-length", b"0")), receive)
        if refusal is not None:
            await refuse(send, refusal)
        elif asks_first:
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body"})
        else:
            await self._serve(scope, body or b"", receive, send)

    async def _body(self, announced: int, receive: Receive) -> tuple[bytes | None, Refusal | None]:
        """The whole body, or why it is refused."""
        largest, body = self.limits.max_body_bytes, bytearray()
        too_large = Refusal(413, f"the body is larger than {largest} bytes")
        if announced > largest:
            return None, too_large
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > largest:
                        return None, too_large
                    if not message.get("more_body", False):
                        return bytes(body), None
        except TimeoutError:
            return None, Refusal(408, f"the body was not there after {self.limits.body_seconds:g} s")

    async def _serve(self, scope: Message, body: bytes, receive: Receive, send: Send) -> None:
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        async def patient_send(message: Message) -> None:
            try:
                async with asyncio.timeout(self.limits.write_seconds):
                    await send(message)
            except TimeoutError as error:
                raise TooSlowError from error

        try:
            await self.app(scope, replay, patient_send)
        except TooSlowError:
            return  # uvicorn closes the connection, as the response is not complete


def _adding(headers: list[tuple[bytes, bytes]], send: Send) -> Send:
    """The same, with these headers added to the response."""

    async def add(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *headers]}
        await send(message)

    return add if headers else send


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP connection, closed where the headers of a request do not come in time, or there are too many others."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._deadline: asyncio.TimerHandle | None = None
        cap, self.limit_concurrency = self.limit_concurrency, None
        if cap is not None and len(self.connections) > 2 * cap:
            transport.abort()
            return
        if cap is not None and len(self.connections) > cap:
            self.app = _too_many
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_headers()
        seen = self.cycle
        super().data_received(data)
        if self.cycle is not seen:
            self._forget_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_deadline()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        self._deadline = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(TIMED_OUT)
            self.transport.close()


async def _too_many(scope: Message, receive: Receive, send: Send) -> None:
    """Stands for the application where there are too many connections."""
    await refuse(send, Refusal(503, "too many clients at once; come again later"))


def error_body(message: str, *, status: int, code: str | None = None) -> dict[str, Any]:
    """An error in the form that clients expect."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def error_headers(status: int) -> dict[str, str]:
    """What goes with an error besides its body."""
    return {"retry-after": str(RETRY_SECONDS)} if status in (429, 503) else {}


async def refuse(send: Send, refusal: Refusal) -> None:
    """Answer without reading on, and so close the connection."""
    status, message, code = refusal
    body = json.dumps(error_body(message, status=status, code=code)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
        *((name.encode(), value.encode()) for name, value in error_headers(status).items()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def make_server(app: App, *, connections: int) -> uvicorn.Server:
    """The server of an application for so many connections at a time; more are answered with 503."""
    config = uvicorn.Config(
        app,  # pyright: ignore[reportArgumentType]
        http=ImpatientProtocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=connections,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
    )
    return uvicorn.Server(config)
