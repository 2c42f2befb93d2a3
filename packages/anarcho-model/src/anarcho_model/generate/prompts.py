"""What a prompt has to be; free of any framework."""

from __future__ import annotations

from collections.abc import Sequence

from anarcho_model.errors import ContextError
from anarcho_model.generate.sampling import SamplingError

__all__ = ["check_prompt"]


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
