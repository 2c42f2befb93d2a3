"""Continuing several prompts together, from start to end; free of any framework.

Notable: each text draws from numbers of its own, so that it is what it would be alone. It ends at a stop id, after
`max_new_tokens`, or when prompt and text fill the model's context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from anarcho_model.generate.draws import seeded_generator
from anarcho_model.generate.prompts import check_prompt
from anarcho_model.generate.sampling import SamplingConfig
from anarcho_model.generate.steps import Drawing, Model, Stepping

__all__ = ["Texts", "collect", "stream"]


class Texts:
    """The texts being generated; each `advance` adds one token to every one that goes on."""

    def __init__(
        self, model: Model, prompts: Sequence[Sequence[int]], *, config: SamplingConfig, stepping: Stepping
    ) -> None:
        """Errors as in `generate`."""
        self.model, self.config = model, config
        context = model.config.context_length
        for prompt in prompts:
            check_prompt(prompt, vocab_size=model.config.vocab_size, context_length=context)
        self.rooms = [min(config.max_new_tokens, context - len(prompt)) for prompt in prompts]
        capacity = max(len(prompt) + room for prompt, room in zip(prompts, self.rooms, strict=True))
        self.stepper = stepping(model, rows=len(prompts), capacity=capacity)
        self.prompts = prompts
        self.lengths = [0] * len(prompts)
        self.unread: list[int | None] = []
        self.drawings = [Drawing(config, seeded_generator(config.seed, row=row)) for row in range(len(prompts))]

    def advance(self) -> list[int | None] | None:
        """The next token of each row, None for a row that has ended; None for all when no row goes on."""
        going = [row for row, room in enumerate(self.rooms) if room]
        if not going:
            return None
        if self.unread:
            logits = self.stepper.step(self.unread, lengths=self.lengths)
            self.lengths = [n + (token is not None) for n, token in zip(self.lengths, self.unread, strict=True)]
        else:
            prompts = [self.prompts[row] for row in going]
            logits = self.stepper.read(prompts, rows=going, lengths=[0] * len(going))
            self.lengths = [len(prompt) for prompt in self.prompts]
        drawn = self.stepper.draw(logits, [self.drawings[row] for row in going])
        tokens: list[int | None] = [None] * len(self.rooms)
        for row, token in zip(going, drawn, strict=True):
            ended = token in self.config.stop_token_ids
            tokens[row] = None if ended else token
            self.rooms[row] = 0 if ended else self.rooms[row] - 1
        # The last token of a row that has all its tokens is never read, so a row that rests has a free place at its length.
        self.unread = [token if room else None for token, room in zip(tokens, self.rooms, strict=True)]
        return tokens


def collect(texts: Texts) -> list[list[int]]:
    """All texts as a whole."""
    found: list[list[int]] = [[] for _ in texts.prompts]
    while (tokens := texts.advance()) is not None:
        for text, token in zip(found, tokens, strict=True):
            if token is not None:
                text.append(token)
    texts.stepper.release()
    return found


def stream(texts: Texts) -> Iterator[int]:
    """The tokens of the only text, one by one."""
    try:
        while (tokens := texts.advance()) is not None and tokens[0] is not None:
            yield tokens[0]
    finally:
        texts.stepper.release()
