"""The routes: the page at /, /v1/models, /v1/completions, /v1/chat/completions and /health."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from anarcho_cli.serving.access import Access
from anarcho_cli.serving.answers import GenerationError, Piece, Task, generate
from anarcho_cli.serving.forms import CHAT, TEXT, Form
from anarcho_cli.serving.limits import App, Guard, Limits, error_body, error_headers
from anarcho_cli.serving.page import page
from anarcho_cli.serving.schemas import ChatRequest, CompletionRequest, Sampled
from anarcho_cli.serving.service import RequestError, Service, chat_task, completion_task, read_request
from anarcho_cli.serving.worker import Worker

if TYPE_CHECKING:
    from anarcho_model.generate.sampling import SamplingConfig

    from anarcho_cli.writing import Writer


def make_app(
    writer: Writer,
    worker: Worker,
    *,
    name: str,
    limits: Limits | None = None,
    access: Access | None = None,
    defaults: SamplingConfig | None = None,
) -> App:
    """The application; the worker runs as long as it does.

    `defaults` hold where a request says nothing about sampling, and their `max_new_tokens` bounds every answer; without
    them the temperature is 1 and the context is the bound.
    """
    from anarcho_model.generate.sampling import SamplingConfig

    limits = Limits() if limits is None else limits
    service = Service(
        writer=writer,
        worker=worker,
        name=name,
        created=int(time.time()),
        max_waiting=limits.max_waiting,
        defaults=SamplingConfig(max_new_tokens=worker.engine.context) if defaults is None else defaults,
        encoding=asyncio.Lock(),
    )

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
    app.add_exception_handler(Exception, _apologise)
    _add_routes(app, service)
    return Guard(app, limits=limits, access=Access() if access is None else access)  # pyright: ignore[reportArgumentType]


def _add_routes(app: FastAPI, service: Service) -> None:
    async def chat(request: Request) -> Response:
        asked = await read_request(request, ChatRequest)
        return await _answer(request, service, asked, await chat_task(service, asked), CHAT)

    async def complete(request: Request) -> Response:
        asked = await read_request(request, CompletionRequest)
        return await _answer(request, service, asked, await completion_task(service, asked), TEXT)

    async def one_model(request: Request) -> Response:
        asked = request.path_params["name"]
        if asked != service.name:
            raise RequestError(404, f"the model {asked[:200]!r} is not served", code="model_not_found")
        return JSONResponse(_model(service))

    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    async def health() -> Response:
        trouble = service.worker.trouble()
        status = 503 if trouble else 200
        return JSONResponse({"status": trouble or "ok"}, status_code=status, headers=error_headers(status))

    async def index() -> Response:
        return page()

    app.add_api_route("/", index, methods=["GET"], response_model=None)
    app.add_api_route("/health", health, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models", models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{name:path}", one_model, methods=["GET"], response_model=None)
    app.add_api_route("/v1/chat/completions", chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", complete, methods=["POST"], response_model=None)


async def _explain(_: Request, error: Any) -> Response:
    status, code = error.status_code, getattr(error, "code", None)
    headers = {**(error.headers or {}), **error_headers(status)}
    return JSONResponse(error_body(str(error.detail), status=status, code=code), status_code=status, headers=headers)


async def _apologise(_: Request, error: Exception) -> Response:
    message = f"the server has a defect ({type(error).__name__}); its output says more"
    return JSONResponse(error_body(message, status=500), status_code=500)


def _model(service: Service) -> dict[str, Any]:
    """The model as clients know it, with what the page wants to know besides."""
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "local",
        "context_length": service.worker.engine.context,
        "chat": service.can_chat,
    }


async def _answer(request: Request, service: Service, asked: Sampled, task: Task, form: Form) -> Response:
    """The whole answer, or its stream."""
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
