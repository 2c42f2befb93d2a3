"""What hostile clients send: nothing of it may end in status 500, hold up others or keep a slot; and who may not ask at all."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from anarcho_cli.serving import app as app_module
from anarcho_cli.serving import limits as limits_module
from anarcho_cli.serving import worker as worker_module
from anarcho_cli.serving.access import LOOPBACK, Access
from anarcho_cli.serving.limits import Guard, Limits
from served import Served, tiny_model

CHAT = {"messages": [{"role": "user", "content": "the whale"}], "max_tokens": 4}
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
ASKED = b'{"prompt": "the", "max_tokens": 2}'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    with Served(model, limits=Limits(body_seconds=0.5)) as server:
        yield server


def answer_to(served: Served, request: bytes) -> bytes:
    """All that the server says to these bytes until it closes the connection or is silent."""
    with served.connect() as client:
        client.settimeout(3)
        client.sendall(request)
        return read_all(client)


def read_all(client: socket.socket) -> bytes:
    found = bytearray()
    try:
        while part := client.recv(65536):
            found += part
    except (TimeoutError, ConnectionResetError):
        pass
    return bytes(found)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"{",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "top_p": -Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "temperature": "0.5"}',
        b'{"prompt": "a", "n": true}',
        b'{"prompt": "a", "n": 1.5}',
        b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "seed": 9223372036854775808}',
        b'{"prompt": "a", "top_k": 0}',
        b'{"prompt": "a", "max_tokens": -1}',
        b'{"prompt": "a", "stream": "yes"}',
        b'{"prompt": "a", "stop": ' + json.dumps(["x"] * 100_000).encode() + b"}",
        b'{"prompt": "a", "stop": ["' + b"x" * 600 + b'"]}',
        b'{"prompt": "a", "frequency_penalty": NaN}',
        b'{"prompt": [true]}',
        b'{"prompt": [-1]}',
        b'{"prompt": [1, "a"]}',
        b'{"prompt": [99999999999999999999999]}',
        b'{"prompt": {"a": 1}}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "user": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
    ],
)
def test_a_body_that_is_not_what_it_should_be_is_400_with_a_reason(body: bytes, served: Served) -> None:
    status, answer = served.ask("POST", "/v1/completions", body)
    assert status == 400, answer
    assert answer["error"]["message"]


@pytest.mark.parametrize(
    ("path", "head"),
    [
        ("/v1/completions", b'{"prompt": ['),
        ("/v1/chat/completions", b'{"messages": ['),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": ['),
    ],
)
def test_a_large_list_of_bad_items_is_refused_at_once(path: str, head: bytes, served: Served) -> None:
    tail = b"]" + b"}]" * (head.count(b"{") - 1) + b"}"
    start = time.monotonic()
    status, _ = served.ask("POST", path, head + b",".join([b"null"] * 200_000) + tail)
    assert (status, time.monotonic() - start < 2) == (400, True)


@pytest.mark.parametrize("text", ["a" * 1_000_000, "ab" * 500_000, "the " * 250_000, "\n" * 500_000, "é" * 400_000])
def test_a_prompt_far_beyond_the_context_is_400_soon(text: str, served: Served) -> None:
    start = time.monotonic()
    body = json.dumps({"prompt": text}, ensure_ascii=False).encode()
    status, answer = served.ask("POST", "/v1/completions", body)
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("text", ["\x00", "<|endoftext|><|assistant|>", "﷽" * 5, "\u202e", "😀"])
def test_odd_texts_are_answered(text: str, served: Served) -> None:
    for path in ("completions", "chat/completions"):
        body = {"prompt": text, "messages": [{"role": "user", "content": text}], "max_tokens": 2}
        assert served.ask("POST", f"/v1/{path}", body)[0] == 200


def test_another_model_is_404(served: Served) -> None:
    for method, path, body in (
        ("POST", "/v1/completions", {"prompt": "a", "model": "b"}),
        ("GET", "/v1/models/b", None),
    ):
        status, answer = served.ask(method, path, body)
        assert (status, answer["error"]["code"]) == (404, "model_not_found")


def test_other_routes_and_methods_are_refused_in_json(served: Served) -> None:
    for method, path, expected in (("GET", "/v1/completions", 405), ("DELETE", "/", 405), ("GET", "/docs", 404)):
        status, answer = served.ask(method, path)
        assert (status, answer["error"]["type"]) == (expected, "invalid_request_error")
    assert served.ask("GET", "/../../etc/passwd")[0] == 404


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: -1\r\n",
        b"content-length: 1\r\ncontent-length: 2\r\n",
        b"content-length: 0x10\r\n",
        b"content-length: " + b"9" * 100 + b"\r\n",
        b"transfer-encoding: gzip\r\n",
        b"x: " + b"y" * 1_000_000 + b"\r\n",
        b"x y: z\r\n",
        b"host: another\r\n",
    ],
)
def test_headers_that_could_be_read_in_two_ways_end_the_connection(head: bytes, served: Served) -> None:
    length = b"" if b"length" in head or b"encoding" in head else b"content-length: %d\r\n" % len(ASKED)
    answer = answer_to(served, POST + head + length + b"\r\n" + ASKED)
    assert answer[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 413", b"HTTP/1.1 431", b"HTTP/1.1 501"), answer


def test_a_chunked_body_is_served_and_pipelined_requests_are_answered_in_turn(served: Served) -> None:
    chunks = b"".join(b"1\r\n" + bytes([byte]) + b"\r\n" for byte in ASKED) + b"0\r\n\r\n"
    whole = POST + b"content-length: %d\r\n\r\n" % len(ASKED) + ASKED
    health = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    answer = answer_to(served, POST + b"transfer-encoding: chunked\r\n\r\n" + chunks + whole + health)
    assert answer.count(b"HTTP/1.1 200") == 3
    assert answer.endswith(b'{"status":"ok"}')


def test_a_body_in_drops_is_408_however_steadily_they_come(served: Served) -> None:
    for head in (b"content-length: 1000\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n"):
        with served.connect() as client:
            client.sendall(POST + head)
            start = time.monotonic()
            try:
                while time.monotonic() - start < 1:
                    client.sendall(b"1\r\n \r\n" if b"chunked" in head else b" ")
                    time.sleep(0.05)
            except OSError:
                pass
            assert read_all(client).startswith(b"HTTP/1.1 408")


def test_headers_in_drops_are_408_also_in_a_connection_that_was_used_before(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits_module, "HEADER_SECONDS", 0.4)
    with served.connect() as client:
        client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        client.recv(65536)
        start = time.monotonic()
        try:
            while time.monotonic() - start < 1:
                client.sendall(b"G")
                time.sleep(0.05)
        except OSError:
            pass
        assert b"HTTP/1.1 408" in read_all(client)


def test_a_client_that_takes_no_data_is_dropped() -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(_: Any) -> None:
        await asyncio.sleep(60)

    scope = {"type": "http", "path": "/", "method": "GET", "headers": []}
    guard = Guard(app, limits=Limits(write_seconds=0.05), access=Access())
    asyncio.run(asyncio.wait_for(guard(scope, receive, send), timeout=5))


def test_too_many_clients_are_503_with_a_time_to_come_again_and_served_when_others_have_gone(model: Path) -> None:
    with Served(model, connections=2) as served:
        others = [served.connect() for _ in range(2)]
        time.sleep(0.1)
        status, headers, text = served.ask_all("GET", "/health")
        assert (status, int(headers["retry-after"]) > 0, "too many" in text) == (503, True, True)
        others += [served.connect() for _ in range(3)]
        time.sleep(0.1)
        with served.connect() as client:
            assert read_all(client) == b""  # beyond twice the cap, nothing is read
        for client in others:
            client.close()
        time.sleep(0.2)
        assert served.ask("POST", "/v1/chat/completions", CHAT)[0] == 200


def test_clients_that_reset_their_connections_leave_neither_slots_nor_queue_behind(served: Served) -> None:
    served.slow_down(0.05)
    try:
        body = json.dumps({**CHAT, "max_tokens": 60, "stream": True, "n": 4}).encode()
        clients = [served.connect() for _ in range(4)]
        for client in clients:
            client.sendall(
                POST.replace(b"/completions", b"/chat/completions") + b"content-length: %d\r\n\r\n" % len(body) + body
            )
            assert client.recv(100).startswith(b"HTTP/1.1 200")
        assert len(served.worker.engine.waiting) > 0
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        assert served.idle_within(5)
        assert not served.worker.engine.waiting
    finally:
        served.slow_down(0)
    assert served.ask("POST", "/v1/chat/completions", CHAT)[0] == 200


def test_requests_that_were_cancelled_while_waiting_leave_the_queue_though_all_slots_are_taken(served: Served) -> None:
    served.slow_down(0.05)
    try:
        options = {"config": served_config(60), "top_logprobs": 0, "on_token": lambda _: None}
        running = [served.worker.submit([1], **options) for _ in range(3)]
        assert served.busy_within(5)
        time.sleep(0.2)
        waiting = [served.worker.submit([1], **options) for _ in range(5)]
        for request in waiting[1:]:
            request.cancel()
        time.sleep(0.3)
        assert list(served.worker.engine.waiting) == waiting[:1]
        for request in [*running, *waiting]:
            request.cancel()
        assert served.idle_within(5)
    finally:
        served.slow_down(0)


def served_config(longest: int) -> Any:
    from anarcho_model.generate.sampling import SamplingConfig

    return SamplingConfig(max_new_tokens=longest)


def test_health_tells_of_a_generating_thread_that_hangs(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "STALLED_SECONDS", 0.3)
    monkeypatch.setattr(worker_module, "IDLE_SECONDS", 0.05)
    with Served(model) as served:
        assert served.ask("GET", "/health")[0] == 200
        served.slow_down(1.2)
        with served.connect() as client:
            client.sendall(POST + b"content-length: %d\r\n\r\n" % len(ASKED) + ASKED)
            assert served.busy_within(5)
            time.sleep(0.5)
            status, answer = served.ask("GET", "/health")
            assert (status, "silent" in answer["status"]) == (503, True)
        served.slow_down(0)


def test_a_defect_is_500_in_json_without_its_details(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("private path")

    monkeypatch.setattr(app_module, "_usage", fail)
    with Served(model) as served:
        status, answer = served.ask("POST", "/v1/chat/completions", CHAT)
    assert (status, answer["error"]["type"]) == (500, "server_error")
    assert "private" not in answer["error"]["message"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", None),
        ("LocalHost:8000", None),
        ("127.0.0.1:1", None),
        ("[::1]:8000", None),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("evil.example@localhost", 403),
        ("localhost/evil", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_only_names_of_this_machine_reach_a_server_on_its_own_address(host: str, status: int | None) -> None:
    refusal = Access(hosts=LOOPBACK).refusal({b"host": host.encode()}, path="/")
    assert (refusal.status if refusal else None) == status


def test_a_page_of_another_site_may_not_ask_unless_its_origin_is_allowed(model: Path) -> None:
    access = Access(api_key="k", hosts=LOOPBACK, origins=frozenset({"https://a.example"}))
    with Served(model, access=access) as served:
        own = served.address
        for origin, expected in ((own, 200), ("https://a.example", 200), ("https://b.example", 403), ("null", 403)):
            status, headers, _ = served.ask_all("GET", "/v1/models", Origin=origin, Authorization="Bearer k")
            assert status == expected
            allowed = headers.get("access-control-allow-origin")
            assert allowed == (origin if origin == "https://a.example" else None)
        asks = {"Origin": "https://a.example", "Access_Control_Request_Method": "POST"}
        status, headers, text = served.ask_all("OPTIONS", "/v1/chat/completions", **asks)
        assert (status, text) == (204, "")
        assert "authorization" in headers["access-control-allow-headers"]
        assert served.ask_all("OPTIONS", "/v1/models", **{**asks, "Origin": "https://b.example"})[0] == 403
        status, headers, _ = served.ask_all("GET", "/v1/models", Origin="https://a.example")
        assert (status, headers["access-control-allow-origin"]) == (401, "https://a.example")


def test_the_key_is_compared_as_a_whole_and_named_as_a_bearer() -> None:
    access = Access(api_key="secret")
    for sent, status in (
        (b"Bearer secret", None),
        (b"bearer  secret", None),
        (b"Bearer secre", 401),
        (b"Basic secret", 401),
        (b"", 401),
    ):
        refusal = access.refusal({b"authorization": sent}, path="/v1/models")
        assert (refusal.status if refusal else None) == status
