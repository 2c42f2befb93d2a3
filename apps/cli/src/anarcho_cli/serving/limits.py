"""What no client may do to the server: send too much, send or read too slowly, or come without the key.

Too large a body is answered with 413, with a content-length or without; too slow a one, or too slow a header, with 408; a
missing key with 401. The number of connections is capped by uvicorn, which answers 503.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

HEADER_SECONDS = 10.0
"""A request's headers must be there by then."""
TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one request."""

    max_body_bytes: int = 2**20
    body_seconds: float = 10.0
    """A request's body must be there by then."""
    write_seconds: float = 30.0
    """A client that takes no data for so long is dropped."""


class TooSlowError(Exception):
    """The client has not read in time."""


class Guard:
    """The application behind its limits."""

    def __init__(self, app: App, *, limits: Limits, api_key: str | None = None) -> None:
        self.app, self.limits, self.api_key = app, limits, api_key

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if scope["path"] != "/health" and not self._knows(headers.get(b"authorization", b"")):
            await _refuse(send, 401, "the API key is missing or wrong; expected the header `Authorization: Bearer KEY`")
            return
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                body = await self._body(int(headers.get(b"content-length", b"0")), receive)
        except TimeoutError:
            await _refuse(send, 408, f"the body was not there after {self.limits.body_seconds:g} s")
            return
        if body is None:
            await _refuse(send, 413, f"the body is larger than {self.limits.max_body_bytes} bytes")
            return
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

    def _knows(self, authorization: bytes) -> bool:
        expected = f"Bearer {self.api_key}".encode()
        return self.api_key is None or hmac.compare_digest(authorization, expected)

    async def _body(self, announced: int, receive: Receive) -> bytes | None:
        """The whole body; None where it is too large."""
        body = bytearray()
        more = announced <= self.limits.max_body_bytes
        if not more:
            return None
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.limits.max_body_bytes:
                return None
        return bytes(body)


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP connection, closed where the headers of a request do not come in time."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._deadline: asyncio.TimerHandle | None = None
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


def error_body(message: str, *, status: int) -> dict[str, Any]:
    """An error in the form that clients expect."""
    kind = "server_error" if status >= 500 else "authentication_error" if status == 401 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


async def _refuse(send: Send, status: int, message: str) -> None:
    """Answer without reading on, and so close the connection."""
    body = json.dumps(error_body(message, status=status)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
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
        limit_concurrency=connections,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
    )
    return uvicorn.Server(config)
