"""Log-probabilities of given tokens under a model, many requests at a time.

Requests are cut into windows of the model's context, ordered by length and batched up to a number of tokens, padding included; only the
positions that are asked for go through the output layer, a chunk at a time. Padding stands behind a row, where a causal model does not see
it, so that no result depends on what it was batched with (but for rounding).

A request that the context holds is one window. Of a longer one, the targets are read in full strides: each window holds as many targets
as the context has tokens, the first of which is predicted from the token before it alone, and the last window reaches back as far as the
context allows. Each target is predicted exactly once. These are the rolling windows of lm-evaluation-harness.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from anarcho_model.errors import NotFiniteError

from anarcho_cli.evaluation.errors import EvaluationError
from anarcho_cli.inference import inference_of

# Requests that are held and sorted at a time: enough for full batches, and a bound on memory for endless sources.
_BLOCK_TOKENS = 2**20


class Window(NamedTuple):
    """The tokens [begin, stop) of a request, of which those from `start` on are predicted."""

    begin: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """Tokens, of which those from `first_target` on are to be predicted, or with a mask some of these."""

    tokens: npt.NDArray[np.int32]
    first_target: int
    """At least 1, as the first token has nothing before it."""
    mask: npt.NDArray[np.bool_] | None = None
    """Whether each of them counts, of shape (tokens - first_target,); None where all do."""

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted."""
        return len(self.tokens) - self.first_target if self.mask is None else int(self.mask.sum())

    def targets(self, window: Window) -> npt.NDArray[np.int64]:
        """Places in a window of its tokens that are predicted."""
        places = np.arange(window.start, window.stop) - window.begin
        if self.mask is None:
            return places
        return places[self.mask[window.start - self.first_target : window.stop - self.first_target]]


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a model says to a request."""

    logprob: float
    """Sum of the targets' log-probabilities in nats; 0 for a request without targets."""
    is_greedy: bool
    """Whether each target is the likeliest token of all."""
    num_tokens: int
    """Targets."""
    num_windows: int
    """Windows that they were read in."""
    is_cut: bool
    """Whether the model's context did not hold the whole request."""


def windows_of(num_tokens: int, *, first_target: int, context_length: int) -> Iterator[Window]:
    """Cut a request into windows of at most `context_length` inputs, which are all its tokens but the last."""
    for start in range(first_target, num_tokens, context_length):
        stop = min(start + context_length, num_tokens)
        yield Window(max(0, stop - context_length - 1), start, stop)


class Scorer:
    """Scores requests with a model, on the model's device."""

    def __init__(self, model: Any, *, backend: str = "torch", batch_tokens: int = 8192) -> None:
        """The model is one of the back-end's; `batch_tokens` bounds the tokens of a batch, padding included.

        A batch holds at least one window.
        """
        self.model = model
        self._inference = inference_of(backend)
        self.batch_tokens = batch_tokens

    def score(self, requests: Iterable[Request]) -> Iterator[Score]:
        """A score for each request, in order.

        Raises EvaluationError for a token that the model has no embedding of, NotFiniteError where the model's numbers are
        NaN or infinite.
        """
        block: list[Request] = []
        held = 0
        for request in requests:
            block.append(request)
            held += len(request.tokens)
            if held >= _BLOCK_TOKENS:
                yield from self._score_block(block)
                block, held = [], 0
        yield from self._score_block(block)

    def _score_block(self, requests: Sequence[Request]) -> list[Score]:
        context = self.model.config.context_length
        found = [
            (number, window)
            for number, request in enumerate(requests)
            for window in windows_of(len(request.tokens), first_target=request.first_target, context_length=context)
            if len(request.targets(window))
        ]
        found.sort(key=lambda item: item[1].begin - item[1].stop)
        logprobs, greedy, counts = [0.0] * len(requests), [True] * len(requests), [0] * len(requests)
        for batch in self._batches(found):
            rows = [(requests[number].tokens[w.begin : w.stop], requests[number].targets(w)) for number, w in batch]
            for (number, _), (logprob, is_greedy) in zip(batch, self._score_rows(rows), strict=True):
                logprobs[number] += logprob
                greedy[number] &= is_greedy
                counts[number] += 1
        return [
            Score(
                logprob=logprobs[number],
                is_greedy=greedy[number],
                num_tokens=request.num_targets,
                num_windows=counts[number],
                is_cut=len(request.tokens) > context + 1,
            )
            for number, request in enumerate(requests)
        ]

    def _batches(self, windows: Sequence[tuple[int, Window]]) -> Iterator[Sequence[tuple[int, Window]]]:
        """Neighbours of a list that starts with the longest, so that the first of a batch says how wide it is."""
        start = 0
        while start < len(windows):
            longest = windows[start][1]
            count = max(1, self.batch_tokens // (longest.stop - longest.begin))
            yield windows[start : start + count]
            start += count

    def _score_rows(
        self, rows: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]
    ) -> list[tuple[float, bool]]:
        """Sum of log-probabilities, and greediness, of the tokens of each row at given places, at least one in all."""
        width = max(len(tokens) for tokens, _ in rows) - 1
        padded = np.zeros((len(rows), width), dtype=np.int64)
        for row, (tokens, _) in enumerate(rows):
            self._check(tokens)
            padded[row, : len(tokens) - 1] = tokens[:-1]
        # A token is predicted at the place before its own.
        sources = np.concatenate([row * width + places - 1 for row, (_, places) in enumerate(rows)])
        targets = np.concatenate([tokens[places] for tokens, places in rows]).astype(np.int64)
        logprobs, likeliest = self._inference.judge(self.model, padded, sources=sources, targets=targets)
        if not np.isfinite(logprobs).all():
            raise NotFiniteError
        bounds = np.cumsum([len(places) for _, places in rows])[:-1]
        parts = zip(np.split(logprobs, bounds), np.split(likeliest, bounds), strict=True)
        return [(float(part.sum()), bool(best.all())) for part, best in parts]

    def _check(self, tokens: npt.NDArray[np.int32]) -> None:
        """An id beyond the embedding is a mistake of the model directory, and would be an obscure failure of the device."""
        if (largest := int(tokens.max())) >= self.model.config.vocab_size:
            raise EvaluationError(
                f"the tokenizer writes the id {largest}, but the model has {self.model.config.vocab_size} tokens; "
                "use the tokenizer that it was trained with, and no conversations where it has no tokens for them"
            )
