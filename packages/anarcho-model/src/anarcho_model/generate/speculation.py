"""Generating one text from guesses that the model checks several at a time; free of any framework.

Notable: reading a few tokens takes about as long as reading one where streaming the weights takes the time, on a CPU
above all; how much that gains depends on how many guesses are right. See `anarcho_model.generate.drafting` for why the
text stays the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from anarcho_model.generate.drafting import Draft
from anarcho_model.generate.draws import seeded_generator
from anarcho_model.generate.prompts import check_prompt
from anarcho_model.generate.sampling import SamplingConfig, SamplingError
from anarcho_model.generate.steps import Drawing, Model, Stepping

__all__ = ["DraftModel", "DraftedText"]


class DraftedText:
    """A text being generated; each `advance` reads one token and the guesses after it."""

    def __init__(
        self,
        model: Model,
        prompt: Sequence[int],
        *,
        config: SamplingConfig,
        draft: Draft,
        stepping: Stepping,
    ) -> None:
        """Errors as in `generate`."""
        context, vocab_size = model.config.context_length, model.config.vocab_size
        check_prompt(prompt, vocab_size=vocab_size, context_length=context)
        self.config, self.draft, self.vocab_size = config, draft, vocab_size
        self.tokens = list(prompt)
        self.unread = list(prompt)
        self.room = min(config.max_new_tokens, context - len(prompt))
        self.stepper = stepping(model, rows=1, capacity=len(prompt) + self.room)
        self.drawing = Drawing(config, seeded_generator(config.seed))

    def __iter__(self) -> Iterator[int]:
        try:
            while drawn := self.advance():
                yield from drawn
        finally:
            self.stepper.release()

    def advance(self) -> list[int]:
        """The next tokens, at least one; none once the text has ended."""
        if not self.room:
            return []
        guesses: list[int] = []
        length = len(self.tokens) - len(self.unread)
        if length:
            proposed = self.draft.propose(self.tokens, most=self.room - 1)[: self.room - 1]
            unknown = next((n for n, guess in enumerate(proposed) if not 0 <= guess < self.vocab_size), len(proposed))
            guesses = proposed[:unknown]
            logits = self.stepper.read_all([*self.unread, *guesses], length=length)
        else:
            logits = self.stepper.read([self.unread], rows=[0], lengths=[0])
        drawn: list[int] = []
        for row in range(len(guesses) + 1):
            token = self.stepper.draw(logits, [self.drawing], rows=[row])[0]
            if token in self.config.stop_token_ids:
                self.room = 0
                return drawn
            drawn.append(token)
            if row < len(guesses) and token != guesses[row]:
                break
        self.tokens += drawn
        self.unread, self.room = drawn[-1:], self.room - len(drawn)
        return drawn


class DraftModel:
    """Guesses what a smaller model of the same vocabulary finds likeliest."""

    def __init__(self, model: Model, *, guesses: int = 4, stepping: Stepping) -> None:
        """Take memory for the keys and values of a whole context of the smaller model, for one text at a time."""
        if guesses < 1:
            raise SamplingError(f"DraftModel.guesses is {guesses}, expected at least 1.")
        self.guesses = guesses
        self.context, self.vocab_size = model.config.context_length, model.config.vocab_size
        self.stepper = stepping(model, rows=1, capacity=self.context)
        self.greedy = Drawing(SamplingConfig(temperature=0.0), seeded_generator(0))
        self.held: list[int] = []

    def propose(self, tokens: Sequence[int], *, most: int) -> list[int]:
        """The smaller model's greedy continuation; none where the text does not fit its context or vocabulary."""
        most = min(most, self.guesses, self.context - len(tokens))
        if most < 1 or max(tokens) >= self.vocab_size:
            return []
        pairs = enumerate(zip(self.held, tokens, strict=False))
        kept = next((n for n, (a, b) in pairs if a != b), min(len(self.held), len(tokens)))
        kept = min(kept, len(tokens) - 1)
        logits = self.stepper.read([tokens[kept:]], rows=[0], lengths=[kept])
        self.held, guesses = list(tokens), self.stepper.draw(logits, [self.greedy])
        while len(guesses) < most:
            logits = self.stepper.step(guesses[-1:], lengths=[len(self.held)])
            self.held.append(guesses[-1])
            guesses += self.stepper.draw(logits, [self.greedy])
        return guesses
