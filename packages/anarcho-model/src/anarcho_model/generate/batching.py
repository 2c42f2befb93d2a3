"""Generating for many requests at once, where each may come and go between two steps; free of any framework.

Notable:

* keys and values live in one cache of fixed slots, so that memory is settled at the start; a request holds one slot
  while it is generated, and waits in order of arrival while all are taken;
* a step reads at most `prefill_tokens` of the prompts and then one token of each request that has read its prompt, so
  a long prompt delays the others by a chunk at a time (Agrawal et al. 2023, arXiv:2308.16369);
* a slot keeps what it has read after its request ends, and a prompt that begins alike reads only the rest;
* every request has its settings and its own random numbers, so what it draws does not depend on the others.

An engine belongs to one thread, which calls `step`; only `Engine.submit` and `Request.cancel` may come from others.
Sources: continuous batching (Yu et al. 2022, Orca, OSDI).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from anarcho_model.errors import NotFiniteError
from anarcho_model.generate.draws import seeded_generator
from anarcho_model.generate.prompts import check_prompt
from anarcho_model.generate.sampling import SamplingConfig, SamplingError
from anarcho_model.generate.steps import NO_TOKEN, Drawing, Model, NewToken, Stepping

__all__ = ["EndedBy", "Engine", "NewToken", "Request"]

EndedBy = Literal["stop", "length", "context", "cancelled", "failed"]
"""A stop id was drawn, `max_new_tokens` are there, prompt and text fill the context, nobody wants the rest, or the model's
numbers are NaN or infinite."""


@dataclass(eq=False)
class Request:
    """A prompt that an engine continues; iterating over it steps the engine until the request's text is complete.

    Iterating raises NotFiniteError where the model's numbers are NaN or infinite; other requests go on.
    """

    prompt: list[int]
    config: SamplingConfig
    top_logprobs: int
    on_token: Callable[[NewToken | None], None] | None
    engine: Engine
    tokens: list[NewToken] = field(default_factory=list)
    """What was generated so far, without the stop id."""
    ended_by: EndedBy | None = None
    """Why the text is complete; None while it is not."""
    reused_tokens: int = 0
    """Tokens of the prompt that its slot had already read for an earlier request."""
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.drawing = Drawing(self.config, seeded_generator(self.config.seed), self.top_logprobs)
        self.room = min(self.config.max_new_tokens, self.engine.context - len(self.prompt))

    def cancel(self) -> None:
        """Generate no more than the step under way; the slot is free at the next one. Any thread may call this."""
        self.cancelled = True

    def __iter__(self) -> Iterator[NewToken]:
        for position in itertools.count():
            while position >= len(self.tokens):
                if self.ended_by == "failed":
                    raise NotFiniteError
                if self.ended_by is not None:
                    return
                self.engine.step()
            yield self.tokens[position]

    def limit(self) -> EndedBy | None:
        """What ends the text before another token is drawn."""
        if self.cancelled:
            return "cancelled"
        if len(self.tokens) < self.room:
            return None
        return "length" if self.room == self.config.max_new_tokens else "context"


@dataclass(eq=False)
class _Slot:
    """A row of the cache: the tokens whose keys and values it holds, and the request that it works for."""

    number: int
    held: list[int] = field(default_factory=list)
    unread: list[int] = field(default_factory=list)
    request: Request | None = None
    admitted: int = 0
    """Number of the step at which the request came."""
    last_used: int = 0
    """Number of the step that last read tokens."""


class Engine:
    """Generates for up to `slots` requests at once, each with at most `context` tokens of prompt and text.

    `context` is the model's own where it is None. The cache takes slots x context x layers x 2 x key/value width.
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int = 8,
        context: int | None = None,
        prefill_tokens: int = 512,
        stepping: Stepping,
    ) -> None:
        for name, value in (("slots", slots), ("prefill_tokens", prefill_tokens)):
            if value < 1:
                raise SamplingError(f"{name} is {value}, expected at least 1.")
        self.model = model
        self.context = model.config.context_length if context is None else context
        self.prefill_tokens = prefill_tokens
        self.stepper = stepping(model, rows=slots, capacity=self.context)
        self.slots = [_Slot(number) for number in range(slots)]
        self.waiting: deque[Request] = deque()
        self.steps = 0

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or being generated."""
        return bool(self.waiting) or any(slot.request for slot in self.slots)

    def submit(
        self,
        prompt: Sequence[int],
        *,
        config: SamplingConfig,
        top_logprobs: int = 0,
        on_token: Callable[[NewToken | None], None] | None = None,
    ) -> Request:
        """Add a request, which begins at a later step; any thread may call this.

        The callback is given each token within `step`, and None once at the end, when `ended_by` is set.
        Raises SamplingError for a prompt that is empty or holds unknown ids, ContextError for one that is too long.
        """
        vocab_size = self.model.config.vocab_size
        check_prompt(prompt, vocab_size=vocab_size, context_length=self.context)
        if not 0 <= top_logprobs <= vocab_size:
            raise SamplingError(f"top_logprobs is {top_logprobs}, expected 0 to {vocab_size}.")
        request = Request(list(prompt), config, top_logprobs, on_token, self)
        self.waiting.append(request)
        return request

    def step(self) -> bool:
        """Let every request go on by a token, or by a part of its prompt; False if there was nothing to do."""
        self.steps += 1
        self._drop_cancelled()
        self._admit()
        active = [slot for slot in self.slots if slot.request is not None]
        # Both chosen before either is read, so that each request gets one token a step.
        decoding = [slot for slot in active if len(slot.unread) == 1]
        group, width = self._prompts_to_read(active)
        if group:
            self._read_prompts(group, width)
        if decoding:
            self._decode(decoding)
        return bool(active)

    def run(self) -> None:
        """Step until every request has ended."""
        while self.busy:
            self.step()

    def _drop_cancelled(self) -> None:
        for slot in self.slots:
            if slot.request is not None and slot.request.cancelled:
                self._end(slot, "cancelled")

    def _admit(self) -> None:
        """Give waiting requests the free slots, each the one that holds the most of its prompt's beginning."""
        while self.waiting:
            free = [slot for slot in self.slots if slot.request is None]
            if not free and not self.waiting[0].limit():
                return
            request = self.waiting.popleft()
            if reason := request.limit():
                _finish(request, reason)
                continue
            slot = max(free, key=lambda slot: (_common(slot.held, request.prompt), -slot.last_used, -slot.number))
            # The last token is read in any case, for the logits after it.
            kept = min(_common(slot.held, request.prompt), len(request.prompt) - 1)
            request.reused_tokens = kept
            slot.held, slot.unread = request.prompt[:kept], request.prompt[kept:]
            slot.request, slot.admitted = request, self.steps

    def _prompts_to_read(self, active: list[_Slot]) -> tuple[list[_Slot], int]:
        """Slots whose prompts are read together in this step, the longest waiting first, and the width they are padded to."""
        slots = sorted((slot for slot in active if len(slot.unread) > 1), key=lambda slot: slot.admitted)
        if not slots:
            return [], 0
        width = min(len(slots[0].unread), self.prefill_tokens)
        room = [slot for slot in slots if len(slot.held) + width <= self.context]
        return room[: self.prefill_tokens // width], width

    def _read_prompts(self, group: list[_Slot], width: int) -> None:
        """Read up to `width` unread tokens of each slot, and draw a token where that was all of them."""
        parts = [slot.unread[:width] for slot in group]
        logits = self.stepper.read(
            parts, rows=[slot.number for slot in group], lengths=[len(slot.held) for slot in group]
        )
        for slot, part in zip(group, parts, strict=True):
            self._note(slot, part)
        ready = [row for row, slot in enumerate(group) if not slot.unread]
        if ready:
            self._advance([group[row] for row in ready], logits, rows=None if len(ready) == len(group) else ready)

    def _decode(self, group: list[_Slot]) -> None:
        """Read the one unread token of each slot, and draw the next."""
        tokens: list[int | None] = [None] * len(self.slots)
        for slot in group:
            tokens[slot.number] = slot.unread[0]
        for slot in self.slots:
            if tokens[slot.number] is None and len(slot.held) == self.context:
                slot.held.pop()  # a row that rests needs a place that may be overwritten
        logits = self.stepper.step(tokens, lengths=[len(slot.held) for slot in self.slots])
        for slot in group:
            self._note(slot, slot.unread)
        self._advance(group, logits)

    def _note(self, slot: _Slot, part: list[int]) -> None:
        """Remember that the slot has read these tokens."""
        slot.held.extend(part)
        slot.unread, slot.last_used = slot.unread[len(part) :], self.steps

    def _advance(self, group: list[_Slot], logits: Any, *, rows: list[int] | None = None) -> None:
        """Draw the next token of each slot, whose logits are in these rows, and hand it on."""
        requests = [slot.request for slot in group if slot.request is not None]
        news = self.stepper.draw_with_logprobs(logits, [request.drawing for request in requests], rows=rows)
        for slot, request, new in zip(group, requests, news, strict=True):
            if new.token == NO_TOKEN:
                slot.held = []
                self.stepper.forget(slot.number)
                self._end(slot, "failed")
                continue
            if new.token in request.config.stop_token_ids:
                self._end(slot, "stop")
                continue
            slot.unread = [new.token]
            request.tokens.append(new)
            if request.on_token is not None:
                request.on_token(new)
            if reason := request.limit():
                self._end(slot, reason)

    def _end(self, slot: _Slot, reason: EndedBy) -> None:
        request, slot.request, slot.unread = slot.request, None, []
        if request is not None:
            _finish(request, reason)


def _finish(request: Request, reason: EndedBy) -> None:
    request.ended_by = reason
    if request.on_token is not None:
        request.on_token(None)


def _common(held: Sequence[int], prompt: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(held, prompt, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(held), len(prompt)))
