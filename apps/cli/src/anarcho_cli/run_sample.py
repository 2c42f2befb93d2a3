"""The sample of text with which a run ends."""

from __future__ import annotations

import dataclasses

from anarcho_tokenize import AnyTokenizer, Message, StreamDecoder, encode_chat

from anarcho_cli.back_ends import BackEnd, TrainingStep
from anarcho_cli.back_ends.settings import stop_token_ids
from anarcho_cli.config import RunConfig
from anarcho_cli.output import note


def require_prompt(config: RunConfig, tokenizer: AnyTokenizer) -> None:
    """The sample's prompt must leave room in the context, or the run would fail at its very end."""
    length = len(_sample_prompt(config, tokenizer))
    if length >= config.model.context_length:
        raise ValueError(
            f"sample.prompt has {length} tokens with what precedes it; expected fewer than model.context_length "
            f"{config.model.context_length}: shorten it"
        )


def write_sample(config: RunConfig, back_end: BackEnd, step: TrainingStep, tokenizer: AnyTokenizer) -> str | None:
    """The prompt of the configuration, and what the trained model makes of it; the model is not trained any more after that.

    None, and a note for the user, where the model's numbers are not finite: the run is what it is without a sample.
    """
    from anarcho_model.errors import NotFiniteError

    stops = config.sample.stop_token_ids or stop_token_ids(config, tokenizer)
    settings = dataclasses.replace(config.sample, stop_token_ids=stops)
    tokens = back_end.generate(step, _sample_prompt(config, tokenizer), config=settings)
    decoder = StreamDecoder(tokenizer, continues=config.data.kind == "text")
    try:
        text = "".join(decoder.push(token) for token in tokens if token < tokenizer.vocab_size) + decoder.flush()
    except NotFiniteError as error:
        note(f"no sample: {error}")
        return None
    return config.sample.prompt + (text if config.data.kind == "text" else f"\n{text}")


def _sample_prompt(config: RunConfig, tokenizer: AnyTokenizer) -> list[int]:
    """The beginning of a document, or of a conversation in which the prompt is the user's."""
    if config.data.kind == "text":
        return [tokenizer.eot_id, *tokenizer.encode(config.sample.prompt)]
    return encode_chat(tokenizer, [Message("user", config.sample.prompt)], add_generation_prompt=True)
