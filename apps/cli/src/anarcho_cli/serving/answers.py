"""From a request's tokens to the texts of its choices: decoding, texts that stop, and why an answer ended."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from anarcho_cli.serving.worker import Worker

if TYPE_CHECKING:
    from anarcho_model.generate.batching import NewToken
    from anarcho_model.generate.sampling import SamplingConfig
    from anarcho_tokenize.loading import AnyTokenizer


class GenerationError(RuntimeError):
    """A text cannot be generated to its end: its request failed, or the generating thread, and then nothing more can be."""


class Piece(NamedTuple):
    """A part of a choice's text."""

    choice: int
    text: str
    new: NewToken | None
    finish: str | None
    """`stop` or `length` with the last part."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What an HTTP request wants to be generated: each prompt `copies` times, choice i with the seed of `config` + i."""

    prompts: Sequence[Sequence[int]]
    config: SamplingConfig
    copies: int = 1
    top_logprobs: int = 0
    stops: tuple[str, ...] = ()
    continues: bool = False
    """Whether the text goes on from the prompt's, and so keeps a space at its beginning."""


class Choice:
    """One text as its tokens come; what may be the beginning of a stop text is held back."""

    def __init__(self, tokenizer: AnyTokenizer, *, stops: tuple[str, ...], continues: bool) -> None:
        from anarcho_tokenize import StreamDecoder

        self.tokenizer, self.stops = tokenizer, stops
        self.decoder = StreamDecoder(tokenizer, continues=continues)
        self.held = ""
        self.finish: str | None = None
        self.num_tokens = 0

    def push(self, token: int) -> str:
        """The text that is certain after this token."""
        self.num_tokens += 1
        # A vocabulary padded to a rounder size has ids without a piece.
        return self._certain(self.decoder.push(token)) if token < self.tokenizer.vocab_size else ""

    def end(self, reason: str) -> str:
        """The rest of the text."""
        text = self._certain(self.decoder.flush())
        if self.finish is None:
            text, self.finish = text + self.held, "stop" if reason == "stop" else "length"
        return text

    def _certain(self, piece: str) -> str:
        text = self.held + piece
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            self.finish = "stop"
            return text[: min(found)]
        lengths = [n for stop in self.stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])]
        keep = len(text) - max(lengths, default=0)
        self.held = text[keep:]
        return text[:keep]


async def generate(worker: Worker, tokenizer: AnyTokenizer, task: Task) -> AsyncGenerator[Piece, None]:
    """The parts of all choices as they come; closing the generator cancels what is left.

    Raises GenerationError where a request, or the worker, fails.
    """
    from anarcho_model.errors import NotFiniteError

    loop, queue = asyncio.get_running_loop(), asyncio.Queue()
    choices, requests = [], []

    def hear(index: int, new: NewToken | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(queue.put_nowait, (index, new))

    try:
        for index in range(len(task.prompts) * task.copies):
            seed = None if task.config.seed is None else (task.config.seed + index) % 2**63
            choices.append(Choice(tokenizer, stops=task.stops, continues=task.continues))
            requests.append(
                worker.submit(
                    task.prompts[index // task.copies],
                    config=dataclasses.replace(task.config, seed=seed),
                    top_logprobs=task.top_logprobs,
                    on_token=lambda new, index=index: hear(index, new),
                )
            )
        while any(choice.finish is None for choice in choices):
            index, new = await queue.get()
            choice, request = choices[index], requests[index]
            if choice.finish is not None:
                continue
            if new is None and request.ended_by is None:
                raise GenerationError(worker.trouble() or "the server is stopping")
            if request.ended_by == "failed" and new is None:
                raise GenerationError(str(NotFiniteError()))
            text = choice.end(request.ended_by) if new is None else choice.push(new.token)
            if choice.finish is not None:
                request.cancel()
            yield Piece(index, text, new, choice.finish)
    finally:
        for request in requests:
            request.cancel()
