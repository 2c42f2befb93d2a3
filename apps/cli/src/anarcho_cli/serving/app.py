"""The routes: /v1/models, /v1/completions, /v1/chat/completions and /health."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from anarcho_cli.serving.answers import GenerationError, Piece, Task, generate
from anarcho_cli.serving.forms import CHAT, TEXT, Form
from anarcho_cli.serving.limits import App, Guard, Limits, error_body
from anarcho_cli.serving.schemas import ChatRequest, CompletionRequest, Sampled
from anarcho_cli.serving.worker import Worker

if TYPE_CHECKING:
    from anarcho_cli.writing import Writer

COMPLETION_TOKENS = 16
"""Most new tokens of /v1/completions where nothing is said, as in OpenAI's interface; a chat goes on to its end."""

Asked = TypeVar("Asked", bound=Sampled)


@dataclass(frozen=True, kw_only=True)
class Service:
    """What the routes share."""

    writer: Writer
    worker: Worker
    name: str
    created: int
    encoding: asyncio.Lock
    """Texts are encoded in a thread, one at a time: long ones would hold up all clients."""


def make_app(writer: Writer, worker: Worker, *, name: str, limits: Limits, api_key: str | None) -> App:
    """The application; the worker runs as long as it does."""
    service = Service(writer=writer, worker=worker, name=name, created=int(time.time()), encoding=asyncio.Lock())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(worker.stop)

    # The pages of documentation load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.add_exception_handler(StarletteHTTPException, _explain)
    app.add_api_route("/health", lambda: _health(service), methods=["GET"])
    app.add_api_route("/v1/models", lambda: _models(service), methods=["GET"])

    async def chat(request: Request) -> Response:
        asked = await _asked(request, ChatRequest)
        return await _answer(request, service, asked, await _chat_task(service, asked), CHAT)

    async def complete(request: Request) -> Response:
        asked = await _asked(request, CompletionRequest)
        return await _answer(request, service, asked, await _text_task(service, asked), TEXT)

    app.add_api_route("/v1/chat/completions", chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", complete, methods=["POST"], response_model=None)
    return Guard(app, limits=limits, api_key=api_key)  # pyright: ignore[reportArgumentType]


async def _explain(_: Request, error: Any) -> Response:
    return JSONResponse(error_body(str(error.detail), status=error.status_code), status_code=error.status_code)


def _health(service: Service) -> Response:
    trouble = service.worker.trouble()
    return JSONResponse({"status": trouble or "ok"}, status_code=503 if trouble else 200)


def _models(service: Service) -> dict[str, Any]:
    model = {"id": service.name, "object": "model", "created": service.created, "owned_by": "local"}
    return {"object": "list", "data": [model]}


async def _asked(request: Request, form: type[Asked]) -> Asked:
    """The body, checked. Only JSON by name is read, which no page of another site can send unasked."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the content-type is not application/json")
    try:
        return form.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the body"
        raise HTTPException(400, f"{place}: {first['msg']}") from error


async def _chat_task(service: Service, asked: ChatRequest) -> Task:
    from anarcho_tokenize import encode_chat

    from anarcho_cli.chatting import role_token_ids

    tokenizer, config = service.writer.tokenizer, service.writer.model.config
    messages = [message.plain() for message in asked.messages]
    try:
        stop_ids = role_token_ids(tokenizer, vocab_size=config.vocab_size)
        async with service.encoding:
            ids = await asyncio.to_thread(encode_chat, tokenizer, messages, add_generation_prompt=True)
        longest = asked.max_completion_tokens if asked.max_tokens is None else asked.max_tokens
        top = (asked.top_logprobs or 0) if asked.logprobs else 0
        return _task(service, asked, [ids], longest=longest, top=top, stop_ids=stop_ids, continues=False)
    except ValueError as error:
        raise HTTPException(400, str(error)) from error


async def _text_task(service: Service, asked: CompletionRequest) -> Task:
    writer = service.writer

    def encode() -> list[list[int]]:
        return [writer.prompt_ids(prompt) if isinstance(prompt, str) else prompt for prompt in asked.prompts]

    longest = COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens
    stop_ids = (writer.tokenizer.eot_id,)
    try:
        async with service.encoding:
            prompts = await asyncio.to_thread(encode)
        return _task(
            service, asked, prompts, longest=longest, top=asked.logprobs or 0, stop_ids=stop_ids, continues=True
        )
    except ValueError as error:
        raise HTTPException(400, str(error)) from error


def _task(
    service: Service,
    asked: Sampled,
    prompts: list[list[int]],
    *,
    longest: int | None,
    top: int,
    stop_ids: tuple[int, ...],
    continues: bool,
) -> Task:
    """The request in the engine's terms. Raises ValueError for settings or prompts that the engine would refuse."""
    from anarcho_model.generate.sampling import SamplingConfig
    from anarcho_model.generate.torch import check_prompt

    context, vocab_size = service.worker.engine.context, service.writer.model.config.vocab_size
    for prompt in prompts:
        check_prompt(prompt, vocab_size=vocab_size, context_length=context)
    config = SamplingConfig(
        max_new_tokens=context if longest is None else min(longest, context),
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        min_p=asked.min_p,
        seed=asked.seed,
        stop_token_ids=stop_ids,
    )
    return Task(
        prompts=prompts,
        config=config,
        copies=asked.n,
        top_logprobs=min(top, vocab_size),
        stops=asked.stops,
        continues=continues,
    )


async def _answer(request: Request, service: Service, asked: Sampled, task: Task, form: Form) -> Response:
    """The whole answer, or its stream."""
    if trouble := service.worker.trouble():
        raise HTTPException(503, trouble)
    head = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
    pieces = generate(service.worker, service.writer.tokenizer, task)
    if asked.stream:
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        events = _events(service, asked, task, form, head=head, pieces=pieces, usage=usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
    collecting = asyncio.create_task(_collect(pieces))
    try:
        while not collecting.done():
            await asyncio.wait([collecting], timeout=0.5)
            if not collecting.done() and await request.is_disconnected():
                return Response(status_code=499)
        found = collecting.result()
    except GenerationError as error:
        raise HTTPException(500, str(error)) from error
    finally:
        collecting.cancel()
    choices = []
    for index in range(len(task.prompts) * task.copies):
        mine = [piece for piece in found if piece.choice == index]
        choices.append(form.choice(mine, index=index, tokenizer=service.writer.tokenizer, logprobs=_wanted(asked)))
    return JSONResponse({**head, "object": form.kind, "choices": choices, "usage": _usage(task, found)})


async def _collect(pieces: AsyncGenerator[Piece, None]) -> list[Piece]:
    async with aclosing(pieces):
        return [piece async for piece in pieces]


async def _events(
    service: Service,
    asked: Sampled,
    task: Task,
    form: Form,
    *,
    head: dict[str, Any],
    pieces: AsyncGenerator[Piece, None],
    usage: bool,
) -> AsyncGenerator[str, None]:
    """Server-sent events: one for each part of a text, the usage if asked for, and `[DONE]`."""
    head = {**head, "object": form.chunk_kind}
    seen: list[Piece] = []
    async with aclosing(pieces):
        for index in range(len(task.prompts) * task.copies):
            if form.opening is not None:
                yield _event({**head, "choices": [{"index": index, **form.opening}]})
        try:
            async for piece in pieces:
                seen.append(piece)
                if piece.text or piece.finish is not None or (_wanted(asked) and piece.new is not None):
                    part = form.part(piece, tokenizer=service.writer.tokenizer, logprobs=_wanted(asked))
                    yield _event({**head, "choices": [part]})
        except GenerationError as error:
            yield _event(error_body(str(error), status=500))
            return
    if usage:
        yield _event({**head, "choices": [], "usage": _usage(task, seen)})
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"


def _wanted(asked: Sampled) -> bool:
    """Whether log-probabilities are asked for: in a chat by true, in a completion by any number."""
    logprobs = getattr(asked, "logprobs", None)
    return logprobs is not None and logprobs is not False


def _usage(task: Task, pieces: list[Piece]) -> dict[str, int]:
    prompt, text = sum(map(len, task.prompts)), sum(piece.new is not None for piece in pieces)
    return {"prompt_tokens": prompt, "completion_tokens": text, "total_tokens": prompt + text}
