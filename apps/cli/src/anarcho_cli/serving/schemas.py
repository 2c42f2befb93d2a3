"""The requests of OpenAI's interface, as far as they are served; what would change the answer and is not known is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_CHOICES = 16
"""Most texts that one request may ask for."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "echo": (None, False),
    "best_of": (None, 1),
}
"""Settings that are not served -> the values with which they ask for nothing."""

# A list is judged by its first bad item: reports on all items of a hostile one would take seconds and gigabytes.
Stops = Annotated[list[Annotated[str, Field(min_length=1, max_length=500)]], Field(max_length=16, fail_fast=True)]
Ids = Annotated[list[int], Field(fail_fast=True)]


class Strict(BaseModel):
    """A part of a request: numbers are numbers and texts are texts, nothing is converted."""

    model_config = ConfigDict(strict=True)


class StreamOptions(Strict):
    """What a stream holds besides the text."""

    include_usage: bool = False


class Sampled(Strict):
    """What both kinds of requests say about sampling; other keys, such as `user`, are passed over."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stop: str | Stops | None = None
    seed: int | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return ((self.stop,) if self.stop else ()) if isinstance(self.stop, str) else tuple(self.stop or ())

    @model_validator(mode="after")
    def _serve_all_that_is_asked(self) -> Sampled:
        for name, value in (self.model_extra or {}).items():
            if name in NEUTRAL and value not in NEUTRAL[name]:
                raise ValueError(f"{name} is not served; leave it out")
        return self


class TextPart(Strict):
    """A part of a message; others than texts are not served."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]

    def plain(self) -> dict[str, str]:
        """Role and text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Sampled):
    """A body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class CompletionRequest(Sampled):
    """A body of /v1/completions."""

    prompt: str | Ids | Annotated[list[str], Field(fail_fast=True)] | Annotated[list[Ids], Field(fail_fast=True)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, as texts or as ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]  # a list of ids, as its first one tells
        return self.prompt  # pyright: ignore[reportReturnType]

    @model_validator(mode="after")
    def _ask_for_little_enough(self) -> CompletionRequest:
        if not 1 <= len(self.prompts) * self.n <= MAX_CHOICES:
            raise ValueError(f"prompts times n is {len(self.prompts) * self.n}, expected 1 to {MAX_CHOICES}")
        return self
