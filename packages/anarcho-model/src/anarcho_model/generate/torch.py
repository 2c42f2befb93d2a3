"""Generating token ids with PyTorch, one prompt as a stream or several at once, from cached keys and values.

Notable: draws use a generator of their own on the CPU, so that a seed gives the same text whatever else is drawn, and a
row of a batch draws what it would draw alone. Text ends at a stop id, after `max_new_tokens`, or when prompt and text
fill the model's context.

Sources: top-k (Fan et al. 2018, arXiv:1805.04833), top-p (Holtzman et al. 2020, arXiv:1904.09751), min-p (Nguyen et al.
2024, arXiv:2407.01082).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from anarcho_model.generate.sampling import SamplingConfig, SamplingError
from anarcho_model.torch import GPT, ContextError, KVCache

__all__ = ["check_prompt", "draw", "generate", "generate_batch", "next_token_probabilities", "seeded_generator"]


def generate(model: GPT, prompt_ids: Sequence[int], *, config: SamplingConfig) -> Iterator[int]:
    """Yield the ids that follow `prompt_ids`, one by one, without the stop id.

    Raises, at the call:
        SamplingError: the prompt is empty or holds an id outside of the vocabulary.
        ContextError: the prompt is longer than the model's context.
    """
    rows = _Rows(model, [prompt_ids], config=config)
    return _stream(rows)


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
        self.unread = [list(prompt) for prompt in prompts]
        self.read = [0] * len(prompts)
        capacity = max(len(prompt) + room for prompt, room in zip(prompts, self.rooms, strict=True))
        self.cache = KVCache(model, batch=len(prompts), capacity=capacity)
        self.generators = [seeded_generator(config.seed, row=row) for row in range(len(prompts))]

    @torch.no_grad()
    def advance(self) -> list[int | None] | None:
        """The next token of each row, None for a row that has ended; None for all when no row goes on."""
        if not any(self.rooms):
            return None
        logits = self._read()
        drawn = [self._draw(row, logits[row]) if room else None for row, room in enumerate(self.rooms)]
        self.rooms = [0 if token is None else room - 1 for token, room in zip(drawn, self.rooms, strict=True)]
        self.unread = [[0 if token is None else token] for token in drawn]
        return drawn

    def _read(self) -> Float[Tensor, "rows vocab"]:
        """Read every row's unread tokens and return the logits after them, on the CPU in float32.

        A row that has ended reads id 0 along with the others; at the end of the cache it does so in place.
        """
        widths = [len(tokens) for tokens in self.unread]
        padded = [tokens + [0] * (max(widths) - len(tokens)) for tokens in self.unread]
        device = self.cache.lengths.device
        starts = [min(read, self.cache.capacity - 1) for read in self.read]
        self.cache.lengths = torch.tensor(starts, device=device)
        hidden = self.model.hidden_states(torch.tensor(padded, device=device), cache=self.cache)
        self.read = [start + width for start, width in zip(starts, widths, strict=True)]
        last = hidden[torch.arange(len(widths), device=device), torch.tensor(widths, device=device) - 1]
        return self.model.unembed(last).float().cpu()

    def _draw(self, row: int, logits: Tensor) -> int | None:
        token = draw(logits, config=self.config, generator=self.generators[row])
        return None if token in self.config.stop_token_ids else token


def _stream(rows: _Rows) -> Iterator[int]:
    while (tokens := rows.advance()) is not None and tokens[0] is not None:
        yield tokens[0]


def draw(logits: Float[Tensor, " vocab"], *, config: SamplingConfig, generator: torch.Generator) -> int:
    """The next token; with temperature 0 the likeliest one, and then nothing is drawn from the generator."""
    if config.temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(next_token_probabilities(logits, config=config), 1, generator=generator))


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
