"""The server on a real socket: OpenAI's forms, the same text as `generate`, and every limit."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from anarcho_cli.commands.serve import serve
from anarcho_cli.errors import CommandGroup
from anarcho_cli.serving import app as app_module
from anarcho_cli.serving import limits as limits_module
from anarcho_cli.serving.access import Access
from anarcho_cli.serving.answers import Choice
from anarcho_cli.serving.limits import Limits
from anarcho_model.generate.sampling import SamplingConfig
from anarcho_model.generate.torch import generate
from anarcho_tokenize import encode_chat
from served import Served, tiny_model
from typer import Typer
from typer.testing import CliRunner

CHAT = {"messages": [{"role": "user", "content": "the whale"}], "seed": 3, "max_tokens": 12}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    with Served(model, limits=Limits(max_body_bytes=5000, body_seconds=0.5)) as server:
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
    with Served(model, access=Access(api_key="secret")) as served:
        assert served.ask("GET", "/health") == (200, {"status": "ok"})
        assert served.ask("GET", "/v1/models")[0] == 401
        assert served.ask("GET", "/v1/models", Authorization="Bearer wrong")[0] == 401
        status, answer = served.ask("GET", "/v1/models", Authorization="Bearer secret")
        assert (status, answer["data"][0]["id"]) == (200, "tiny")


def test_a_client_that_leaves_frees_its_slot(served: Served) -> None:
    for stream in (True, False):
        body = json.dumps({**CHAT, "max_tokens": 60, "stream": stream}).encode()
        served.slow_down(0.1)
        try:
            with served.connect() as client:
                head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                assert served.busy_within(5)
            assert served.idle_within(5)
        finally:
            served.slow_down(0)


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


def command() -> Typer:
    app = Typer(cls=CommandGroup)
    app.command("serve")(serve)
    app.callback()(lambda: None)
    return app


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--api-key", "naïve"], "ASCII"),
        (["--context", "65"], "context is 64"),
        (["--allow-origin", "https://a.b/c"], "https://a.b/c"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_a_server_that_would_be_open_or_cannot_work_does_not_start(options, part, model: Path) -> None:
    result = CliRunner().invoke(command(), ["serve", str(model), "--device", "cpu", "--port", "0", *options])
    assert result.exit_code == 2, result.output
    assert part in result.stderr


@pytest.mark.parametrize(("options", "hosts"), [([], True), (["--host", "0.0.0.0", "--api-key", "k"], False)])
def test_a_server_on_this_machine_alone_goes_by_its_names_alone(options, hosts, model: Path, monkeypatch) -> None:
    seen: dict[str, Any] = {}

    def record(*_: Any, **given: Any) -> None:
        seen.update(given)
        raise KeyboardInterrupt

    monkeypatch.setattr(app_module, "make_app", record)
    arguments = [
        "--temperature",
        "0.5",
        "--max-new-tokens",
        "9",
        "--allow-host",
        "Me",
        "--allow-origin",
        "https://a.b:1",
    ]
    result = CliRunner().invoke(command(), ["serve", str(model), "--device", "cpu", *arguments, *options])
    assert result.exit_code == 130, result.output
    assert seen["access"].hosts == ({"localhost", "127.0.0.1", "::1", "me"} if hosts else None)
    assert seen["access"].origins == {"https://a.b:1"}
    assert (seen["defaults"].temperature, seen["defaults"].max_new_tokens) == (0.5, 9)


def test_the_servers_settings_hold_where_a_request_says_nothing_and_bound_its_length(model: Path) -> None:
    with Served(model, defaults=SamplingConfig(temperature=0, max_new_tokens=5)) as served:
        body = {"prompt": "the"}
        texts = {served.ask("POST", "/v1/completions", body)[1]["choices"][0]["text"] for _ in range(3)}
        _, answer = served.ask("POST", "/v1/completions", {**body, "max_tokens": 50})
        drawn = {
            served.ask("POST", "/v1/completions", {**body, "temperature": 2})[1]["choices"][0]["text"] for _ in range(3)
        }
    assert len(texts) == 1
    assert answer["usage"]["completion_tokens"] <= 5
    assert len(drawn) > 1


@pytest.mark.parametrize("setting", [{"temperature": 1e-300}, {"temperature": 1, "top_p": 1e-50}], ids=str)
def test_settings_that_float32_cannot_hold_give_the_likeliest_text(setting: dict[str, float], served: Served) -> None:
    body = {"prompt": "the", "max_tokens": 4}
    status, answer = served.ask("POST", "/v1/completions", {**body, **setting})
    assert (status, served.ask("GET", "/health")[0]) == (200, 200)
    expected = served.ask("POST", "/v1/completions", {**body, "temperature": 0})[1]
    assert answer["choices"] == expected["choices"]


def test_a_request_whose_numbers_are_not_finite_fails_alone(model: Path) -> None:
    body = {"prompt": "the", "max_tokens": 4, "logprobs": 2}
    with Served(model) as served:
        weight = served.writer.model.model.norm.weight
        with torch.no_grad():
            weight.mul_(torch.nan)
        for _ in range(2):
            status, answer = served.ask("POST", "/v1/completions", body)
            assert status == 500
            assert "logits are NaN or infinite" in answer["error"]["message"]
        status, events = served.ask("POST", "/v1/chat/completions", {**CHAT, "stream": True})
        assert status == 200
        assert "logits are NaN or infinite" in events
        assert served.ask("GET", "/health")[0] == 200
        with torch.no_grad():
            weight.fill_(1)
        status, answer = served.ask("POST", "/v1/completions", body)
        assert status == 200
        assert len(answer["choices"][0]["logprobs"]["tokens"]) > 0
