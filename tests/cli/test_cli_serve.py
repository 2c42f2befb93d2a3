"""The server on a real socket: OpenAI's forms, the same text as `generate`, and every limit."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from anarcho_cli.commands.serve import serve
from anarcho_cli.errors import CommandGroup
from anarcho_cli.serving import limits as limits_module
from anarcho_cli.serving.answers import Choice
from anarcho_cli.serving.app import make_app
from anarcho_cli.serving.access import Access
from anarcho_cli.serving.limits import Limits, make_server
from anarcho_cli.serving.worker import Worker
from anarcho_cli.writing import Writer
from anarcho_model import ModelConfig
from anarcho_model.generate.engine.torch import Engine
from anarcho_model.generate.sampling import SamplingConfig
from anarcho_model.generate.torch import generate
from anarcho_model.torch import GPT
from anarcho_model.weights import save_pretrained
from anarcho_tokenize import TokenizerConfig, encode_chat, train_tokenizer
from typer import Typer
from typer.testing import CliRunner

CHAT = {"messages": [{"role": "user", "content": "the whale"}], "seed": 3, "max_tokens": 12}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["the whale and the sea, the ship. " * 100], config=TokenizerConfig(vocab_size=285))
    tokenizer.save(directory)
    network = GPT(ModelConfig(vocab_size=285, context_length=64, num_layers=1, dim=16, num_heads=2))
    network.init_weights(seed=0)
    save_pretrained(network, directory, eos_token_id=tokenizer.eot_id, pad_token_id=tokenizer.pad_id)
    return directory


class Served:
    """A running server."""

    def __init__(self, model: Path, *, connections: int = 64, api_key: str | None = None, **limits: Any) -> None:
        self.writer = Writer.load(model, device="cpu")
        self.worker = Worker(Engine(self.writer.model, slots=3))
        app = make_app(self.writer, self.worker, name="tiny", limits=Limits(**limits), access=Access(api_key=api_key))
        self.server = make_server(app, connections=connections)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)

    def __enter__(self) -> Served:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=20)
        assert not self.thread.is_alive()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.listener.getsockname(), timeout=10)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(*self.listener.getsockname(), timeout=20)
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        named = {"Content-Type": "application/json", **{key.replace("_", "-"): value for key, value in headers.items()}}
        connection.request(method, path, body=content, headers=named)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        streamed = (response.getheader("content-type") or "").startswith("text/event-stream")
        return response.status, text if streamed else json.loads(text)

    def chunks(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        status, text = self.ask("POST", path, {**body, "stream": True})
        assert status == 200
        events = [event.removeprefix("data: ") for event in text.removesuffix("\n\n").split("\n\n")]
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    with Served(model, max_body_bytes=5000, body_seconds=0.5) as server:
        yield server


def expected_text(served: Served, seed: int, longest: int = 12) -> str:
    tokenizer = served.writer.tokenizer
    prompt = encode_chat(tokenizer, CHAT["messages"], add_generation_prompt=True)
    special = tuple(i for name, i in tokenizer.special_tokens.items() if name not in ("<unk>", "<|pad|>"))
    config = SamplingConfig(max_new_tokens=longest, seed=seed, stop_token_ids=special)
    return tokenizer.decode(generate(served.writer.model, prompt, config=config))


def test_an_answer_is_the_text_that_the_model_generates_for_that_seed(served: Served) -> None:
    status, answer = served.ask("POST", "/v1/chat/completions", {**CHAT, "n": 3, "user": "somebody"})
    assert (status, answer["object"], answer["model"]) == (200, "chat.completion", "tiny")
    assert [choice["message"]["content"] for choice in answer["choices"]] == [
        expected_text(served, s) for s in (3, 4, 5)
    ]
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_is_the_whole_answer_in_parts(path: str, served: Served) -> None:
    body = {**CHAT, "prompt": ["the", "the sea"], "n": 2, "logprobs": True, "stream_options": {"include_usage": True}}
    if path == "/v1/completions":
        body["logprobs"] = 2
    status, whole = served.ask("POST", path, body)
    assert status == 200, whole
    chunks = served.chunks(path, body)
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[-1]["choices"] == []
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        pieces = [part["delta"].get("content", "") if "delta" in part else part["text"] for part in parts]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        assert "".join(pieces) == text
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        key = "content" if "message" in choice else "token_logprobs"
        found = [item for part in parts if part["logprobs"] for item in part["logprobs"][key]]
        assert len(found) == len(choice["logprobs"][key]) > 0


def test_top_logprobs_begin_with_the_likeliest_and_the_greedy_choice_is_it(served: Served) -> None:
    body = {**CHAT, "temperature": 0, "logprobs": True, "top_logprobs": 5}
    _, answer = served.ask("POST", "/v1/chat/completions", body)
    for item in answer["choices"][0]["logprobs"]["content"]:
        values = [top["logprob"] for top in item["top_logprobs"]]
        assert values == sorted(values, reverse=True)
        assert len(values) == 5
        assert item["logprob"] == values[0] <= 0


def test_an_answer_ends_before_a_stop_text_streamed_or_not(served: Served) -> None:
    text = expected_text(served, 3, 30)
    stop = text[5:8]
    body = {**CHAT, "max_tokens": 30, "stop": [stop, "never there"]}
    _, answer = served.ask("POST", "/v1/chat/completions", body)
    choice = answer["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")
    parts = [part["choices"][0]["delta"].get("content", "") for part in served.chunks("/v1/chat/completions", body)]
    assert "".join(parts) == text[: text.index(stop)]


def test_a_stop_text_in_pieces_is_found_and_its_beginning_alone_is_text(served: Served) -> None:
    def said(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
        choice = Choice(served.writer.tokenizer, stops=stops, continues=True)
        pieces = [choice.push(token) for token in served.writer.tokenizer.encode(text) if choice.finish is None]
        return "".join([*pieces, "" if choice.finish else choice.end("length")]), choice.finish

    assert said("aab aac", ("aac",)) == ("aab ", "stop")
    assert said("aaab", ("aab",)) == ("a", "stop")
    assert said("the aa", ("aab",)) == ("the aa", "length")


def test_max_tokens_is_clamped_to_the_context(served: Served) -> None:
    status, answer = served.ask("POST", "/v1/completions", {"prompt": "the", "max_tokens": 10**9, "temperature": 0})
    assert status == 200
    assert answer["usage"]["total_tokens"] <= 64


def test_prompts_may_be_ids(served: Served) -> None:
    ids = served.writer.prompt_ids("the")
    bodies = [{"prompt": prompt, "temperature": 0} for prompt in ("the", ids, [ids], ["the"])]
    texts = [served.ask("POST", "/v1/completions", body)[1]["choices"][0]["text"] for body in bodies]
    assert len(set(texts)) == 1


@pytest.mark.parametrize(
    ("path", "change", "part"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 100}]}, "context is 64"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ("chat/completions", {"tools": [{}]}, "tools is not served"),
        ("chat/completions", {"temperature": -1}, "temperature"),
        ("chat/completions", {"n": 1000}, "n:"),
        ("chat/completions", {"seed": -1}, "seed"),
        ("chat/completions", {"stop": [""]}, "stop"),
        ("completions", {"prompt": []}, "prompts times n is 0"),
        ("completions", {"prompt": [[]]}, "prompt is empty"),
        ("completions", {"prompt": [999]}, "the id 999"),
        ("completions", {"prompt": ["x"] * 9, "n": 2}, "prompts times n is 18"),
    ],
)
def test_a_request_that_cannot_be_served_is_400_with_its_reason(path, change, part, served: Served) -> None:
    status, answer = served.ask("POST", f"/v1/{path}", {**CHAT, **change})
    assert status == 400, answer
    assert part in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [b"{", b"[" * 4000, b'"text"', b"\xff"])
def test_a_body_that_is_no_request_is_400(body: bytes, served: Served) -> None:
    assert served.ask("POST", "/v1/completions", body)[0] == 400


def test_only_json_by_name_is_read(served: Served) -> None:
    assert served.ask("POST", "/v1/completions", {"prompt": "a"}, Content_Type="text/plain")[0] == 415
    assert served.ask("GET", "/nowhere")[0] == 404


def test_too_large_a_body_is_413_announced_or_in_chunks(served: Served) -> None:
    assert served.ask("POST", "/v1/completions", b" " * 5001)[0] == 413
    with served.connect() as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        client.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n1000\r\n" + b" " * 4096 + b"\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 413")
    with served.connect() as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 413")


def test_a_slow_body_or_header_is_408(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with served.connect() as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{")
        assert client.recv(100).startswith(b"HTTP/1.1 408")
    monkeypatch.setattr(limits_module, "HEADER_SECONDS", 0.3)
    with served.connect() as client:
        for _ in range(2):
            client.sendall(b"G")
            time.sleep(0.1)
        assert client.recv(100).startswith(b"HTTP/1.1 408")


def test_connections_above_the_cap_are_503(model: Path) -> None:
    with Served(model, connections=3) as served:
        waiting = [served.connect() for _ in range(3)]
        time.sleep(0.1)
        with served.connect() as client:
            client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 503")
        for client in waiting:
            client.close()


def test_the_key_is_asked_for_everywhere_but_for_health(model: Path) -> None:
    with Served(model, api_key="secret") as served:
        assert served.ask("GET", "/health") == (200, {"status": "ok"})
        assert served.ask("GET", "/v1/models")[0] == 401
        assert served.ask("GET", "/v1/models", Authorization="Bearer wrong")[0] == 401
        status, answer = served.ask("GET", "/v1/models", Authorization="Bearer secret")
        assert (status, answer["data"][0]["id"]) == (200, "tiny")


def test_a_client_that_leaves_frees_its_slot(served: Served) -> None:
    for stream in (True, False):
        body = json.dumps({**CHAT, "max_tokens": 60, "stream": stream}).encode()
        step = served.worker.engine.step

        def slow(step=step) -> bool:
            time.sleep(0.1)
            return step()

        served.worker.engine.step = slow  # pyright: ignore[reportAttributeAccessIssue]
        try:
            with served.connect() as client:
                head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                deadline = time.monotonic() + 5
                while not served.worker.engine.busy and time.monotonic() < deadline:
                    time.sleep(0.01)
                assert served.worker.engine.busy
            while served.worker.engine.busy and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not served.worker.engine.busy
        finally:
            served.worker.engine.step = step  # pyright: ignore[reportAttributeAccessIssue]


def test_a_failure_of_the_generating_thread_reaches_clients_and_health(model: Path) -> None:
    with Served(model) as served:

        def fail() -> bool:
            raise RuntimeError("out of memory")

        served.worker.engine.step = fail  # pyright: ignore[reportAttributeAccessIssue]
        status, answer = served.ask("POST", "/v1/chat/completions", CHAT)
        assert status == 500
        assert "out of memory" in answer["error"]["message"]
        assert served.ask("GET", "/health")[0] == 503
        assert served.ask("POST", "/v1/chat/completions", CHAT)[0] == 503


@pytest.mark.parametrize(
    ("options", "part"),
    [(["--host", "0.0.0.0"], "--api-key"), (["--api-key", "naïve"], "ASCII"), (["--context", "65"], "context is 64")],
)
def test_a_server_that_would_be_open_or_cannot_work_does_not_start(options, part, model: Path) -> None:
    app = Typer(cls=CommandGroup)
    app.command("serve")(serve)
    app.callback()(lambda: None)
    result = CliRunner().invoke(app, ["serve", str(model), "--device", "cpu", "--port", "0", *options])
    assert result.exit_code == 2, result.output
    assert part in result.stderr
