"""A trained model and its tokenizer, writing text: for `anarcho generate` and for the sample at the end of a run.

A prompt is taken for the beginning of a document, so the end-of-text token goes before it, as in training.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anarcho_model.generate.sampling import SamplingConfig
    from anarcho_model.torch import GPT
    from anarcho_tokenize import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A text that a model wrote."""

    text: str
    """The new text, without the prompt."""
    prompt_tokens: int
    """Tokens before the new text."""
    new_tokens: int
    """Tokens of the new text."""
    seconds: float
    """Time that the writing took."""
    stopped_by: str
    """`end_of_text` where the model ended the document, `length` at the most new tokens, `context` where that is full."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary for JSON."""
        return dataclasses.asdict(self)


class Writer:
    """Writes text with a model and its tokenizer."""

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, directory: Path, *, device: str) -> Writer:
        """The writer for a Hugging Face model directory that holds its tokenizer; loads torch."""
        from anarcho_model.weights import load_pretrained
        from anarcho_tokenize import Tokenizer

        tokenizer = Tokenizer.load(directory)
        return cls(load_pretrained(directory, device=device), tokenizer)

    def prompt_ids(self, prompt: str) -> list[int]:
        """The token ids that stand before the new text: end-of-text, then the prompt."""
        return [self.tokenizer.eot_id, *self.tokenizer.encode(prompt)]

    def stream(self, prompt: str, *, config: SamplingConfig) -> Iterator[str]:
        """The new text in pieces, as soon as each is valid UTF-8; without stop tokens in ``config``, up to end-of-text."""
        from anarcho_tokenize import StreamDecoder

        decoder = StreamDecoder(self.tokenizer, continues=bool(prompt))
        for token in self._tokens(prompt, config):
            if piece := decoder.push(token):
                yield piece
        if piece := decoder.flush():
            yield piece

    def complete(self, prompt: str, *, config: SamplingConfig) -> Completion:
        """The new text as a whole."""
        from anarcho_tokenize import StreamDecoder

        start = time.monotonic()
        tokens = list(self._tokens(prompt, config))
        prompt_tokens = len(self.prompt_ids(prompt))
        stopped_by = "length" if len(tokens) == config.max_new_tokens else "end_of_text"
        if prompt_tokens + len(tokens) == self.model.config.context_length:
            stopped_by = "context"
        decoder = StreamDecoder(self.tokenizer, continues=bool(prompt))
        return Completion(
            text="".join(map(decoder.push, tokens)) + decoder.flush(),
            prompt_tokens=prompt_tokens,
            new_tokens=len(tokens),
            seconds=time.monotonic() - start,
            stopped_by=stopped_by,
        )

    def _tokens(self, prompt: str, config: SamplingConfig) -> Iterator[int]:
        from anarcho_model.generate.torch import generate

        stops = config.stop_token_ids or (self.tokenizer.eot_id,)
        settings = dataclasses.replace(config, stop_token_ids=stops)
        tokens = generate(self.model, self.prompt_ids(prompt), config=settings)
        # A vocabulary that is padded to a rounder size has ids without a piece; an untrained model may draw them.
        return (token for token in tokens if token < self.tokenizer.vocab_size)
