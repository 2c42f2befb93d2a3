"""Generating token ids with PyTorch, one prompt as a stream or several at once, from cached keys and values.

Notable: each row draws one number for each token from numbers of its own, so that a seed gives the same text whatever
else is drawn, and a row of a batch draws what it would draw alone. Text ends at a stop id, after `max_new_tokens`, or
when prompt and text fill the model's context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from anarcho_model.generate.drafting import Draft
from anarcho_model.generate.drawing.torch import draw_tokens, next_token_probabilities
from anarcho_model.generate.draws import seeded_generator
from anarcho_model.generate.prompts import check_prompt
from anarcho_model.generate.sampling import SamplingConfig
from anarcho_model.generate.speculation import DraftedText
from anarcho_model.generate.stepping.torch import Stepper
from anarcho_model.generate.texts import Texts, collect, stream
from anarcho_model.torch import GPT

__all__ = ["check_prompt", "draw_tokens", "generate", "generate_batch", "next_token_probabilities", "seeded_generator"]


def generate(
    model: GPT, prompt_ids: Sequence[int], *, config: SamplingConfig, draft: Draft | None = None
) -> Iterator[int]:
    """Yield the ids that follow `prompt_ids`, one by one, without the stop id.

    A `draft` guesses ahead, for the same text (up to rounding) in fewer steps: see `anarcho_model.generate.drafting`.

    Raises, at the call:
        SamplingError: the prompt is empty or holds an id outside of the vocabulary.
        ContextError: the prompt is longer than the model's context.
    Raises, as the ids are asked for:
        NotFiniteError: the model's numbers are NaN or infinite.
    """
    if draft is not None:
        return iter(DraftedText(model, prompt_ids, config=config, draft=draft, stepping=Stepper.for_text))
    return stream(Texts(model, [prompt_ids], config=config, stepping=Stepper.for_text))


def generate_batch(model: GPT, prompts: Sequence[Sequence[int]], *, config: SamplingConfig) -> list[list[int]]:
    """Continue several prompts, of any lengths, together; the ids without the stop id, in the prompts' order.

    Row i draws with the seed `config.seed + i`, so it is what `generate` yields for that prompt and seed (up to
    rounding between the sizes of a batch). Errors as in `generate`.
    """
    return collect(Texts(model, prompts, config=config, stepping=Stepper.for_text)) if prompts else []
