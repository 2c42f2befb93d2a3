"""Generating token ids with PyTorch, one prompt as a stream or several at once, from cached keys and values.

Notable: each row draws one number for each token from a generator of its own on the CPU, so that a seed gives the same
text whatever else is drawn, and a row of a batch draws what it would draw alone; the token is the one at which the sum
of the probabilities reaches that number, found for all rows at once where their logits are. Text ends at a stop id,
after `max_new_tokens`, or when prompt and text fill the model's context.

Sources: top-k (Fan et al. 2018, arXiv:1805.04833), top-p (Holtzman et al. 2020, arXiv:1904.09751), min-p (Nguyen et al.
2024, arXiv:2407.01082).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anarcho_model.generate.sampling import SamplingConfig, SamplingError
from anarcho_model.generate.stepping.torch import Stepper
from anarcho_model.torch import GPT, ContextError

if TYPE_CHECKING:
    from anarcho_model.generate.drafted.torch import DraftedText
    from anarcho_model.generate.drafting import Draft

__all__ = ["check_prompt", "draw_tokens", "generate", "generate_batch", "next_token_probabilities", "seeded_generator"]


def generate(
    model: GPT, prompt_ids: Sequence[int], *, config: SamplingConfig, draft: Draft | None = None
) -> Iterator[int]:
    """Yield the ids that follow `prompt_ids`, one by one, without the stop id.

    A `draft` guesses ahead, for the same text (up to rounding) in fewer steps: see `anarcho_model.generate.drafting`.

    Raises, at the call:
        SamplingError: the prompt is empty or holds an id outside of the vocabulary.
        ContextError: the prompt is longer than the model's context.
    """
    if draft is not None:
        from anarcho_model.generate.drafted.torch import DraftedText

        return _drafted(DraftedText(model, prompt_ids, config=config, draft=draft))
    return _stream(_Rows(model, [prompt_ids], config=config))


def generate_batch(model: GPT, prompts: Sequence[Sequence[int]], *, config: SamplingConfig) -> list[list[int]]:
    """Continue several prompts, of any lengths, together; the ids without the stop id, in the prompts' order.

    Row i draws with the seed `config.seed + i`, so it is what `generate` yields for that prompt and seed (up to
    rounding between the sizes of a batch). Errors as in `generate`.
    """
    rows = _Rows(model, prompts, config=config) if prompts else None
    texts: list[list[int]] = [[] for _ in prompts]
    while rows is not None and (tokens := rows.advance()) is not None:
        for text, token in zip(texts, tokens, strict=True):
            if token is not None:
                text.append(token)
    if rows is not None:
        rows.stepper.release()
    return texts


def next_token_probabilities(
    logits: Float[Tensor, "*rows vocab"], *, config: SamplingConfig
) -> Float[Tensor, "*rows vocab"]:
    """Probabilities after temperature, top-k, top-p and min-p, in this order; filtered tokens have 0.

    The temperature must be above 0. Each filter acts on the renormalised remains of the one before; the likeliest token
    always stays.
    """
    # Relative to the largest one, or a very small temperature would overflow.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        smallest = logits.topk(config.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if config.top_p is not None and config.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[..., 0] = 0
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= config.top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if config.min_p is not None:
        largest = probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < config.min_p * largest, 0)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return probabilities


class _Rows:
    """The texts being generated; each `advance` adds one token to every one that goes on."""

    def __init__(self, model: GPT, prompts: Sequence[Sequence[int]], *, config: SamplingConfig) -> None:
        self.model, self.config = model, config
        context = model.config.context_length
        for prompt in prompts:
            check_prompt(prompt, vocab_size=model.config.vocab_size, context_length=context)
        self.rooms = [min(config.max_new_tokens, context - len(prompt)) for prompt in prompts]
        capacity = max(len(prompt) + room for prompt, room in zip(prompts, self.rooms, strict=True))
        self.stepper = Stepper.for_text(model, rows=len(prompts), capacity=capacity)
        self.prompts = prompts
        self.lengths = [0] * len(prompts)
        self.unread: list[int | None] = []
        self.generators = [seeded_generator(config.seed, row=row) for row in range(len(prompts))]

    @torch.inference_mode()
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
        drawn = draw_tokens(logits, configs=[self.config] * len(going), generators=[self.generators[r] for r in going])
        tokens: list[int | None] = [None] * len(self.rooms)
        for row, token in zip(going, drawn, strict=True):
            ended = token in self.config.stop_token_ids
            tokens[row] = None if ended else token
            self.rooms[row] = 0 if ended else self.rooms[row] - 1
        # The last token of a row that has all its tokens is never read, so a row that rests has a free place at its length.
        self.unread = [token if room else None for token, room in zip(tokens, self.rooms, strict=True)]
        return tokens


def _stream(rows: _Rows) -> Iterator[int]:
    try:
        while (tokens := rows.advance()) is not None and tokens[0] is not None:
            yield tokens[0]
    finally:
        rows.stepper.release()


def _drafted(text: DraftedText) -> Iterator[int]:
    try:
        while drawn := text.advance():
            yield from drawn
    finally:
        text.stepper.release()


def draw_tokens(
    logits: Float[Tensor, "rows vocab"],
    *,
    configs: Sequence[SamplingConfig],
    generators: Sequence[torch.Generator],
) -> list[int]:
    """The next token of each row; with temperature 0 the likeliest one, and then nothing is drawn from the generator."""
    tokens = [0] * len(configs)
    for rows in _alike(configs):
        some = logits if len(rows) == len(tokens) else logits[rows]
        if configs[rows[0]].temperature == 0:
            chosen = some.argmax(dim=-1)
        else:
            draws = [torch.rand((), generator=generators[row], dtype=torch.float64) for row in rows]
            chosen = _at(next_token_probabilities(some, config=configs[rows[0]]), torch.stack(draws))
        for row, token in zip(rows, chosen.tolist(), strict=True):
            tokens[row] = token
    return tokens


def _alike(configs: Sequence[SamplingConfig]) -> list[list[int]]:
    """Rows by the settings that decide how they are drawn."""
    groups: dict[object, list[int]] = {}
    for row, config in enumerate(configs):
        filters = (config.top_k, config.top_p, config.min_p) if config.temperature else ()
        groups.setdefault((config.temperature, *filters), []).append(row)
    return list(groups.values())


def _at(probabilities: Float[Tensor, "rows vocab"], draws: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """The token of each row whose share of [0, 1) holds the draw; shares follow each other by id."""
    sums = probabilities.double().cumsum(dim=-1)
    total = sums[:, -1:]
    # Kept under the total against rounding up to it, where no token's share is left.
    points = torch.minimum(draws.to(sums.device)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, points, right=True)[:, 0]


def seeded_generator(seed: int | None, *, row: int = 0) -> torch.Generator:
    """The generator of row `row` of a batch with this seed; without one, a generator that nobody can repeat."""
    generator = torch.Generator("cpu")
    if seed is None:
        generator.seed()
        return generator
    return generator.manual_seed((seed + row) % 2**63)


def check_prompt(prompt: Sequence[int], *, vocab_size: int, context_length: int) -> None:
    """Raise SamplingError for an empty prompt or an unknown id, ContextError for a prompt longer than the context."""
    if not prompt:
        raise SamplingError("The prompt is empty, expected at least one token, such as the end-of-text id.")
    outside = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise SamplingError(
            f"The prompt holds the id {outside}, expected ids from 0 to {vocab_size - 1}: was it encoded by another tokenizer?"
        )
    if len(prompt) > context_length:
        raise ContextError(
            f"The prompt has {len(prompt)} tokens, but the model's context is {context_length}; shorten the prompt."
        )
