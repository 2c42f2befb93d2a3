"""A model as lm-evaluation-harness (Gao et al.) asks it, so that its tasks run on a run or a checkpoint without an export.

Importing this module needs `lm_eval`, the extra `eval`. For example::

    import lm_eval
    from anarcho_cli.evaluation.harness import HarnessModel

    lm_eval.simple_evaluate(model=HarnessModel.load("runs/mine"), tasks=["lambada_openai"])

Figures are those of the harness's own adapter for Transformers on the exported directory, since texts are encoded in its way: special
tokens that a text spells are these tokens, and only an empty context, or a whole text, begins with the token that begins texts (without
one the end-of-text token). Training puts that token before every document, as `anarcho eval` does. Contexts that are too long lose their
beginning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]

from anarcho_cli.evaluation.errors import EvaluationError
from anarcho_cli.evaluation.scoring import Request
from anarcho_cli.evaluation.subject import Subject

if TYPE_CHECKING:
    from anarcho_tokenize.spelling import Spellings

_MAX_NEW_TOKENS = 256


class HarnessModel(TemplateLM):
    """Answers the harness's three kinds of requests."""

    backend = "causal"

    def __init__(self, subject: Subject, *, stop_token_ids: Sequence[int] = ()) -> None:
        """`stop_token_ids` end what the model writes, beside the end-of-text token."""
        super().__init__()
        self.subject = subject
        self._spellings = _spellings_of(subject.tokenizer)
        self._before, self._behind = getattr(subject.tokenizer, "frame", ([], []))
        self._stops = tuple(dict.fromkeys([*stop_token_ids, self.eot_token_id]))

    @classmethod
    def load(
        cls, path: str | Path, *, device: str = "cpu", backend: str = "torch", batch_tokens: int = 8192
    ) -> HarnessModel:
        """The model of a run, a checkpoint or a model directory. Raises ModelNotFoundError."""
        from anarcho_model.directory import load_stop_token_ids

        from anarcho_cli.models import find_model

        directory = find_model(Path(path))
        subject = Subject.load(directory, device=device, backend=backend, batch_tokens=batch_tokens)
        return cls(subject, stop_token_ids=load_stop_token_ids(directory))

    @property
    def eot_token_id(self) -> int:
        """What the tokenizer's files name as the end: for a foreign tokenizer it may be the end of a message."""
        named = getattr(self.subject.tokenizer, "eos_id", None)
        return self.subject.tokenizer.eot_id if named is None else named

    @property
    def prefix_token_id(self) -> int:
        """What stands before an empty context, and before a whole text."""
        begin = self.subject.tokenizer.bos_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's cache of prompts."""
        return self.subject.tokenizer.sha256

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, which the harness writes into its results; None where it is not asked for."""
        from anarcho_tokenize import CHAT_TEMPLATE
        from anarcho_tokenize.chat_template import template_of

        if not chat_template:
            return None
        return template_of(getattr(self.subject.tokenizer, "settings", {})) or CHAT_TEMPLATE

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without a prompt for an answer it ends within the last message, which goes on."""
        from anarcho_tokenize import spell_chat

        if add_generation_prompt:
            return spell_chat(self.subject.tokenizer, chat_history, add_generation_prompt=True)
        text, last = spell_chat(self.subject.tokenizer, chat_history), chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, in which special tokens may be spelled."""
        from anarcho_tokenize.spelling import encode_spelled

        del kwargs  # of other adapters
        tokenizer = self.subject.tokenizer
        ids = encode_spelled(tokenizer, self._spellings, string)
        framed = add_special_tokens
        if framed is None:
            framed = not string.startswith(tokenizer.decode([self.prefix_token_id], skip_special_tokens=False))
        return [*self._before, *ids, *self._behind] if framed else ids

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text."""
        del disable_tqdm  # nothing is shown
        texts = [request.args[0] for request in requests]
        asked = (_request([self.prefix_token_id], self.tok_encode(text)) for text in texts)
        answers = [score.logprob for score in self.subject.scorer.score(asked)]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the first of the texts that end it."""
        del disable_tqdm  # nothing is shown
        answers = []
        for request in requests:
            answers.append(self._write(*request.args))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether it is the greedy one."""
        del disable_tqdm, kwargs  # nothing is shown, and batches are of the scorer's making
        for (_, continuation), _, ids in requests:
            if not ids:
                raise EvaluationError(
                    f"{continuation!r} adds no token to the text before it; expected some text to predict"
                )
        asked = (_request(context, ids) for _, context, ids in requests)
        answers = [(score.logprob, score.is_greedy) for score in self.subject.scorer.score(asked)]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _write(self, context: str, settings: Mapping[str, Any]) -> str:
        from anarcho_model.generate.sampling import SamplingConfig
        from anarcho_tokenize import StreamDecoder
        from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]

        from anarcho_cli.inference import inference_of

        tokenizer, model = self.subject.tokenizer, self.subject.model
        asked = normalize_gen_kwargs(dict(settings), _MAX_NEW_TOKENS)
        room = min(asked.get("max_gen_toks", _MAX_NEW_TOKENS), model.config.context_length - 1)
        sampling = SamplingConfig(
            max_new_tokens=room,
            temperature=asked.get("temperature", 1.0) if asked.get("do_sample") else 0.0,
            top_p=asked.get("top_p"),
            top_k=asked.get("top_k"),
            seed=asked.get("seed", 0),
            stop_token_ids=self._stops,
        )
        prompt = self.tok_encode(context)[-(model.config.context_length - room) :] or [self.prefix_token_id]
        decoder, ends = StreamDecoder(tokenizer), asked.get("until", [])
        # A vocabulary that is padded to a rounder size has ids without a piece.
        tokens = inference_of(self.subject.backend).generate(model, prompt, config=sampling)
        known = (token for token in tokens if token < tokenizer.vocab_size)
        text = ""
        for token in known:
            text += decoder.push(token)
            if (found := _first(text, ends)) is not None:
                return text[:found]
        text += decoder.flush()
        return text[: _first(text, ends)]


def _request(context: Sequence[int], continuation: Sequence[int]) -> Request:
    return Request(tokens=np.array([*context, *continuation], dtype=np.int32), first_target=len(context))


def _spellings_of(tokenizer: Any) -> Spellings:
    from anarcho_tokenize.spelling import Spellings

    return getattr(tokenizer, "spellings", None) or Spellings(tokenizer.piece_model)


def _first(text: str, ends: Iterable[str]) -> int | None:
    """Where the first of several texts begins."""
    places = [place for end in ends if end and (place := text.find(end)) >= 0]
    return min(places, default=None)
