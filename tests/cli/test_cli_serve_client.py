"""The server as the `openai` package sees it: every call that it makes, and every error as its own exception."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="the openai package is not installed")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import openai
from anarcho_cli.serving.access import Access
from anarcho_cli.serving.limits import Limits
from served import Served, tiny_model

SAID: list[Any] = [{"role": "user", "content": "the whale"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model: Path = tiny_model(tmp_path_factory.mktemp("model"))
    with Served(model, limits=Limits(max_body_bytes=5000), access=Access(api_key="secret")) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    return openai.OpenAI(base_url=f"{served.address}/v1", api_key="secret", max_retries=0, timeout=20)


def chat(client: Any, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": SAID, "max_tokens": 12, "seed": 3, **options})


def test_the_models_are_the_served_one(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"


def test_a_chat_streamed_is_the_chat_whole(client: Any) -> None:
    whole = chat(client, n=2)
    texts, ends, usage = ["", ""], [None, None], None
    for chunk in chat(client, n=2, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_the_helper_for_streams_collects_the_same_answer(client: Any) -> None:
    stop = chat(client).choices[0].message.content[-2:]
    with client.chat.completions.stream(model="tiny", messages=SAID, max_tokens=12, seed=3, stop=stop) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == chat(client, stop=stop).choices[0].message.content


def test_a_seed_repeats_a_text_and_another_one_changes_it(client: Any) -> None:
    texts = [chat(client, seed=seed).choices[0].message.content for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_logprobs_of_a_chat_have_the_likeliest_tokens_first(client: Any) -> None:
    content = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert content
    for item in content:
        assert item.logprob <= item.top_logprobs[0].logprob >= item.top_logprobs[2].logprob
        assert bytes(item.bytes).decode(errors="replace") == item.token


def test_completions_have_texts_logprobs_and_streams_in_the_order_of_their_prompts(client: Any) -> None:
    asked = {"model": "tiny", "prompt": ["the", "the sea"], "max_tokens": 8, "temperature": 0, "logprobs": 2}
    whole = client.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1]
    texts = ["", ""]
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    logprobs = whole.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 8
    assert whole.choices[0].finish_reason == "length"


def test_an_answer_ends_before_a_stop_text(client: Any) -> None:
    text = chat(client, max_tokens=30).choices[0].message.content
    choice = chat(client, max_tokens=30, stop=[text[4:7]]).choices[0]
    assert (choice.message.content, choice.finish_reason) == (text[: text.index(text[4:7])], "stop")


@pytest.mark.parametrize(
    ("options", "error", "code"),
    [
        ({"messages": [{"role": "user", "content": "x" * 100}]}, "BadRequestError", "context_length_exceeded"),
        ({"temperature": 5}, "BadRequestError", None),
        ({"tools": [{"type": "function"}]}, "BadRequestError", None),
        ({"model": "another"}, "NotFoundError", "model_not_found"),
        ({"messages": [{"role": "user", "content": "x" * 6000}]}, "APIStatusError", None),
    ],
)
def test_a_refusal_is_the_exception_that_clients_catch(options, error: str, code, client: Any) -> None:
    with pytest.raises(getattr(openai, error)) as caught:
        chat(client, **options)
    assert caught.value.code == code
    assert caught.value.body["message"] in str(caught.value)


def test_a_wrong_key_is_an_authentication_error(client: Any) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        chat(client.with_options(api_key="wrong"))
    assert caught.value.code == "invalid_api_key"


def test_a_server_that_has_too_much_to_do_is_a_rate_limit_error_which_says_when_to_come_again(tmp_path: Path) -> None:
    with Served(tiny_model(tmp_path), slots=1, limits=Limits(max_waiting=1)) as served:
        client = openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0, timeout=20)
        with pytest.raises(openai.RateLimitError) as caught:
            chat(client, n=3)
        assert int(caught.value.response.headers["retry-after"]) > 0


def test_a_failure_is_an_internal_server_error_streamed_or_not(tmp_path: Path) -> None:
    for stream in (False, True):
        with Served(tiny_model(tmp_path / str(stream))) as served:

            def fail() -> bool:
                raise RuntimeError("out of memory")

            served.worker.engine.step = fail  # pyright: ignore[reportAttributeAccessIssue]
            client = openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0, timeout=20)
            with pytest.raises(openai.APIError, match="out of memory"):
                list(chat(client, stream=stream))


def test_the_asynchronous_client_that_closes_its_stream_frees_the_slot(served: Served) -> None:
    import asyncio

    async def leave() -> None:
        client = openai.AsyncOpenAI(base_url=f"{served.address}/v1", api_key="secret")
        async with client, await client.chat.completions.create(model="tiny", messages=SAID, stream=True) as stream:
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    break

    asyncio.run(leave())
    assert served.idle_within(5)
