"""A trained model and its tokenizer, writing text: for `anarcho generate` and for the sample at the end of a run.

A prompt is taken for the beginning of a document, so the end-of-text token goes before it, as in training.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anarcho_cli.inference import inference_of

if TYPE_CHECKING:
    from anarcho_model.generate.batching import Engine, Request
    from anarcho_model.generate.sampling import SamplingConfig
    from anarcho_tokenize.loading import AnyTokenizer


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
    """Time until the text was there; texts that are written together share it."""
    stopped_by: str
    """`end_of_text` where the model ended the document, `length` at the most new tokens, `context` where that is full."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary for JSON."""
        return dataclasses.asdict(self)


class Writer:
    """Writes text with a model and its tokenizer."""

    def __init__(
        self, model: Any, tokenizer: AnyTokenizer, *, backend: str = "torch", kv_bits: int | None = None
    ) -> None:
        """The model is one of the back-end's; `kv_bits` of 4 or 8 quantise keys and values where it can do that."""
        self.model = model
        self.tokenizer = tokenizer
        self.kv_bits = kv_bits
        self._inference = inference_of(backend)

    @classmethod
    def load(cls, directory: Path, *, device: str, backend: str = "torch", kv_bits: int | None = None) -> Writer:
        """The writer for a Hugging Face model directory that holds its tokenizer; loads the framework."""
        from anarcho_tokenize import load_tokenizer

        tokenizer = load_tokenizer(directory)
        model = inference_of(backend).load_model(directory, device=device)
        return cls(model, tokenizer, backend=backend, kv_bits=kv_bits)

    def make_engine(self, *, slots: int, context: int | None = None) -> Engine:
        """An engine that writes so many texts at once, each of at most `context` tokens with its prompt."""
        return self._inference.make_engine(self.model, slots=slots, context=context, kv_bits=self.kv_bits)

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
        return next(self.complete_all([prompt], config=config))

    def complete_all(self, prompts: Sequence[str], *, config: SamplingConfig, slots: int = 16) -> Iterator[Completion]:
        """The new texts in the prompts' order, up to `slots` of them written at once; text i draws with `config.seed` + i.

        Raises SamplingError or ContextError, before anything is written, for a prompt that cannot be read.
        """
        settings = self._stopping(config)
        encoded = [self.prompt_ids(prompt) for prompt in prompts]
        longest = max(map(len, encoded), default=0) + config.max_new_tokens
        context = min(longest, self.model.config.context_length)
        engine = self.make_engine(slots=max(1, min(slots, len(encoded))), context=context)
        start = time.monotonic()
        requests = []
        for number, ids in enumerate(encoded):
            seed = None if config.seed is None else (config.seed + number) % 2**63
            try:
                requests.append(engine.submit(ids, config=dataclasses.replace(settings, seed=seed)))
            except ValueError as error:
                raise type(error)(f"Prompt {number + 1}: {error}" if len(encoded) > 1 else str(error)) from error
        return (
            self._completion(request, continues=bool(prompt), start=start)
            for request, prompt in zip(requests, prompts, strict=True)
        )

    def _completion(self, request: Request, *, continues: bool, start: float) -> Completion:
        from anarcho_tokenize import StreamDecoder

        decoder = StreamDecoder(self.tokenizer, continues=continues)
        known = [new.token for new in request if new.token < self.tokenizer.vocab_size]
        return Completion(
            text="".join(map(decoder.push, known)) + decoder.flush(),
            prompt_tokens=len(request.prompt),
            new_tokens=len(request.tokens),
            seconds=time.monotonic() - start,
            stopped_by="end_of_text" if request.ended_by == "stop" else str(request.ended_by),
        )

    def _tokens(self, prompt: str, config: SamplingConfig) -> Iterator[int]:
        settings, ids = self._stopping(config), self.prompt_ids(prompt)
        tokens = self._inference.generate(self.model, ids, config=settings, kv_bits=self.kv_bits)
        # A vocabulary that is padded to a rounder size has ids without a piece; an untrained model may draw them.
        return (token for token in tokens if token < self.tokenizer.vocab_size)

    def _stopping(self, config: SamplingConfig) -> SamplingConfig:
        return dataclasses.replace(config, stop_token_ids=config.stop_token_ids or (self.tokenizer.eot_id,))
