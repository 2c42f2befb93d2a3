"""What the routes share, and how a request becomes a task of the engine."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from fastapi import HTTPException, Request
from pydantic import ValidationError

from anarcho_cli.serving.answers import Task
from anarcho_cli.serving.schemas import ChatRequest, CompletionRequest, Sampled
from anarcho_cli.serving.worker import Worker

if TYPE_CHECKING:
    from anarcho_model.generate.sampling import SamplingConfig

    from anarcho_cli.writing import Writer

COMPLETION_TOKENS = 16
"""Most new tokens of /v1/completions where nothing is said, as in OpenAI's interface; a chat goes on to its end."""

Asked = TypeVar("Asked", bound=Sampled)


class RequestError(HTTPException):
    """A request that is not served, with the code by which clients tell why."""

    def __init__(self, status: int, message: str, *, code: str | None = None) -> None:
        super().__init__(status, message)
        self.code = code


@dataclass(frozen=True, kw_only=True)
class Service:
    """What the routes share."""

    writer: Writer
    worker: Worker
    name: str
    """The model's name for clients."""
    created: int
    max_waiting: int
    defaults: SamplingConfig
    """What holds where a request says nothing; `max_new_tokens` bounds what it may ask for."""
    encoding: asyncio.Lock
    """Texts are encoded in a thread, one at a time: long ones would hold up all clients."""

    @property
    def can_chat(self) -> bool:
        """Whether conversations can be written for the model."""
        from anarcho_cli.chatting import role_token_ids

        try:
            return bool(role_token_ids(self.writer.tokenizer, vocab_size=self.writer.model.config.vocab_size))
        except ValueError:
            return False

    def check(self, asked: Sampled, *, texts: int) -> None:
        """Raise RequestError where the model is another, cannot work, or has too much to do already."""
        if asked.model not in ("", self.name):
            message = f"the model {asked.model[:200]!r} is not served; expected {self.name!r}"
            raise RequestError(404, message, code="model_not_found")
        if trouble := self.worker.trouble():
            raise RequestError(503, trouble)
        if len(self.worker.engine.waiting) + texts > self.max_waiting + len(self.worker.engine.slots):
            raise RequestError(429, f"{self.max_waiting} texts wait already; come again later")


async def read_request(request: Request, form: type[Asked]) -> Asked:
    """The body, checked. Only JSON by name is read, which no page of another site can send unasked."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError(415, "the content-type is not application/json")
    try:
        return form.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part)[:80] for part in first["loc"]) or "the body"
        raise RequestError(400, f"{place}: {first['msg']}") from error


async def chat_task(service: Service, asked: ChatRequest) -> Task:
    """The answer to a conversation. Raises RequestError where it cannot be given."""
    from anarcho_tokenize import encode_chat

    from anarcho_cli.chatting import role_token_ids

    service.check(asked, texts=asked.n)
    tokenizer, config = service.writer.tokenizer, service.writer.model.config
    messages = [message.plain() for message in asked.messages]
    try:
        stop_ids = role_token_ids(tokenizer, vocab_size=config.vocab_size)
        async with service.encoding:
            ids = await asyncio.to_thread(encode_chat, tokenizer, messages, add_generation_prompt=True)
    except ValueError as error:
        raise RequestError(400, str(error)) from error
    longest = asked.max_completion_tokens if asked.max_tokens is None else asked.max_tokens
    top = (asked.top_logprobs or 0) if asked.logprobs else 0
    return _task(service, asked, [ids], longest=longest, top=top, stop_ids=stop_ids, continues=False)


async def completion_task(service: Service, asked: CompletionRequest) -> Task:
    """The continuations of texts. Raises RequestError where they cannot be given."""
    service.check(asked, texts=len(asked.prompts) * asked.n)
    writer = service.writer

    def encode() -> list[list[int]]:
        return [writer.prompt_ids(prompt) if isinstance(prompt, str) else prompt for prompt in asked.prompts]

    try:
        async with service.encoding:
            prompts = await asyncio.to_thread(encode)
    except ValueError as error:
        raise RequestError(400, str(error)) from error
    longest = COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens
    top, stop_ids = asked.logprobs or 0, (writer.tokenizer.eot_id,)
    return _task(service, asked, prompts, longest=longest, top=top, stop_ids=stop_ids, continues=True)


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
    """The request in the engine's terms. Raises RequestError for settings or prompts that the engine would refuse."""
    import dataclasses

    from anarcho_model.errors import ContextError
    from anarcho_model.generate.prompts import check_prompt

    context, vocab_size = service.worker.engine.context, service.writer.model.config.vocab_size
    most = min(service.defaults.max_new_tokens, context)
    said = {name: getattr(asked, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")}
    try:
        for prompt in prompts:
            check_prompt(prompt, vocab_size=vocab_size, context_length=context)
        config = dataclasses.replace(
            service.defaults,
            max_new_tokens=most if longest is None else min(longest, most),
            stop_token_ids=stop_ids,
            **{name: value for name, value in said.items() if value is not None},
        )
    except ContextError as error:
        raise RequestError(400, str(error), code="context_length_exceeded") from error
    except ValueError as error:
        raise RequestError(400, str(error)) from error
    return Task(
        prompts=prompts,
        config=config,
        copies=asked.n,
        top_logprobs=min(top, vocab_size),
        stops=asked.stops,
        continues=continues,
    )
