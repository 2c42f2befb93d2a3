"""A model as lm-evaluation-harness (Gao et al.) asks it, so that its tasks run on a run or a checkpoint without an export.

Importing this module needs `lm_eval`, the extra `eval`. For example::

    import lm_eval
    from anarcho_cli.evaluation.harness import HarnessModel

    lm_eval.simple_evaluate(model=HarnessModel.load("runs/mine"), tasks=["lambada_openai"])

Texts begin after the end-of-text token, as in training; the harness's own adapter for Transformers puts it before empty contexts alone.
Contexts that are too long lose their beginning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]

from anarcho_cli.evaluation.encoding import encode_continuation, encode_document
from anarcho_cli.evaluation.subject import Subject

_MAX_NEW_TOKENS = 256


class HarnessModel(LM):
    """Answers the harness's three kinds of requests."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject = subject

    @classmethod
    def load(cls, path: str | Path, *, device: str = "cpu", batch_tokens: int = 8192) -> HarnessModel:
        """The model of a run, a checkpoint or a model directory. Raises ModelNotFoundError."""
        from anarcho_cli.models import find_model

        return cls(Subject.load(find_model(Path(path)), device=device, batch_tokens=batch_tokens))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether it is the greedy one."""
        del disable_tqdm  # nothing is shown
        asked = (encode_continuation(self.subject.tokenizer, *request.args) for request in requests)
        answers = [(score.logprob, score.is_greedy) for score in self.subject.scorer.score(asked)]
        self._remember("loglikelihood", requests, answers)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text."""
        del disable_tqdm  # nothing is shown
        asked = (encode_document(self.subject.tokenizer, request.args[0]) for request in requests)
        answers = [score.logprob for score in self.subject.scorer.score(asked)]
        self._remember("loglikelihood_rolling", requests, answers)
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the first of the texts that end it."""
        del disable_tqdm  # nothing is shown
        answers = [self._write(*request.args) for request in requests]
        self._remember("generate_until", requests, answers)
        return answers

    def _write(self, context: str, settings: Mapping[str, Any]) -> str:
        from anarcho_model.generate.sampling import SamplingConfig
        from anarcho_model.generate.torch import generate
        from anarcho_tokenize import StreamDecoder

        tokenizer, model = self.subject.tokenizer, self.subject.model
        until = settings.get("until") or []
        ends = [until] if isinstance(until, str) else list(until)
        room = min(settings.get("max_gen_toks", _MAX_NEW_TOKENS), model.config.context_length - 1)
        sampling = SamplingConfig(
            max_new_tokens=room,
            temperature=settings.get("temperature", 1.0) if settings.get("do_sample") else 0.0,
            top_p=settings.get("top_p"),
            top_k=settings.get("top_k"),
            seed=settings.get("seed", 0),
            stop_token_ids=(tokenizer.eot_id,),
        )
        prompt = [tokenizer.eot_id, *tokenizer.encode(context)][-(model.config.context_length - room) :]
        decoder = StreamDecoder(tokenizer, continues=bool(context))
        # A vocabulary that is padded to a rounder size has ids without a piece.
        known = (token for token in generate(model, prompt, config=sampling) if token < tokenizer.vocab_size)
        text = ""
        for token in known:
            text += decoder.push(token)
            if (found := _first(text, ends)) is not None:
                return text[:found]
        text += decoder.flush()
        return text[: _first(text, ends)]

    def _remember(self, kind: str, requests: Iterable[Any], answers: Iterable[Any]) -> None:
        """Hand the answers to the harness's cache, if it has one."""
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)


def _first(text: str, ends: Iterable[str]) -> int | None:
    """Where the first of several texts begins."""
    places = [place for end in ends if end and (place := text.find(end)) >= 0]
    return min(places, default=None)
