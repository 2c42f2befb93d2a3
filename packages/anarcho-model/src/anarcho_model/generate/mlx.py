"""Generating token ids with MLX: the same names, rules and random numbers as `anarcho_model.generate.torch`.

Notable: a single text is computed one step ahead. While the computer waits for a token, the device already reads it on,
so that neither waits for the other; the step after the last token is thrown away. Text ends at a stop id, after
`max_new_tokens`, or when prompt and text fill the model's context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import cast

import mlx.core as mx

from anarcho_model.generate.drafting import Draft
from anarcho_model.generate.drawing.mlx import choose_tokens, draw_tokens, next_token_probabilities
from anarcho_model.generate.draws import seeded_generator
from anarcho_model.generate.prompts import check_prompt
from anarcho_model.generate.sampling import SamplingConfig
from anarcho_model.generate.speculation import DraftedText
from anarcho_model.generate.stepping.mlx import Stepper
from anarcho_model.generate.steps import require_tokens
from anarcho_model.generate.texts import Texts, collect
from anarcho_model.mlx import GPT

__all__ = ["check_prompt", "draw_tokens", "generate", "generate_batch", "next_token_probabilities", "seeded_generator"]


def generate(
    model: GPT,
    prompt_ids: Sequence[int],
    *,
    config: SamplingConfig,
    draft: Draft | None = None,
    kv_bits: int | None = None,
) -> Iterator[int]:
    """Yield the ids that follow `prompt_ids`, one by one, without the stop id.

    A `draft` guesses ahead, for the same text (up to rounding) in fewer steps: see `anarcho_model.generate.drafting`.
    `kv_bits` of 4 or 8 keep keys and values quantised, which takes less memory and changes the text a little.

    Raises, at the call:
        SamplingError: the prompt is empty or holds an id outside of the vocabulary.
        ContextError: the prompt is longer than the model's context.
    Raises, as the ids are asked for:
        NotFiniteError: the model's numbers are NaN or infinite.
    """
    if draft is not None:
        stepping = partial(Stepper, kv_bits=kv_bits)
        return iter(DraftedText(model, prompt_ids, config=config, draft=draft, stepping=stepping))
    context = model.config.context_length
    check_prompt(prompt_ids, vocab_size=model.config.vocab_size, context_length=context)
    room = min(config.max_new_tokens, context - len(prompt_ids))
    stepper = Stepper(model, rows=1, capacity=len(prompt_ids) + room, kv_bits=kv_bits)
    return _stream(stepper, prompt_ids, config=config, room=room)


def generate_batch(
    model: GPT, prompts: Sequence[Sequence[int]], *, config: SamplingConfig, kv_bits: int | None = None
) -> list[list[int]]:
    """Continue several prompts, of any lengths, together; the ids without the stop id, in the prompts' order.

    Row i draws with the seed `config.seed + i`, so it is what `generate` yields for that prompt and seed (up to
    rounding between the sizes of a batch). Arguments and errors as in `generate`.
    """
    if not prompts:
        return []
    return collect(Texts(model, prompts, config=config, stepping=partial(Stepper, kv_bits=kv_bits)))


def _stream(stepper: Stepper, prompt: Sequence[int], *, config: SamplingConfig, room: int) -> Iterator[int]:
    if not room:
        return
    draws = [seeded_generator(config.seed)]
    logits = stepper.read([prompt], rows=[0], lengths=[0])
    token = choose_tokens(logits, configs=[config], generators=draws)
    mx.async_eval(token)
    for length in range(len(prompt), len(prompt) + room):
        following = token
        if length + 1 < len(prompt) + room:
            logits = stepper.step_with(token[:, None], rows=[0], lengths=[length])
            following = choose_tokens(logits, configs=[config], generators=draws)
            mx.async_eval(following)
        value = require_tokens([cast(int, token.item())])[0]
        if value in config.stop_token_ids:
            return
        yield value
        token = following
