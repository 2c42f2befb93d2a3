"""Drawing the next token of each row from its logits, with MLX.

Notable: the rules, the numbers and the order of the shares are those of `anarcho_model.generate.drawing.torch`, so that
equal logits give the same token. The random number of a token does not depend on the tokens before it, so a draw is
an operation of the graph, and the next step can be prepared before its token is known. Shares are summed in float64,
which only the CPU has; on Apple's chips it reads the same memory.

Sources: top-k (Fan et al. 2018, arXiv:1805.04833), top-p (Holtzman et al. 2020, arXiv:1904.09751), min-p (Nguyen et al.
2024, arXiv:2407.01082).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from anarcho_model.generate.draws import Draws
from anarcho_model.generate.sampling import SMALLEST, SamplingConfig
from anarcho_model.generate.steps import NO_TOKEN, NewToken, alike, require_tokens

__all__ = ["choose_tokens", "draw_tokens", "next_token_probabilities", "with_logprobs"]

BELOW_ONE = 1 - 2.0**-52


def next_token_probabilities(logits: mx.array, *, config: SamplingConfig) -> mx.array:
    """Probabilities (..., vocab) after temperature, top-k, top-p and min-p, in this order; filtered tokens have 0.

    The temperature must be above 0. Each filter acts on the renormalised remains of the one before; the likeliest token
    always stays.
    """
    # Relative to the largest one, or a very small temperature would overflow.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / max(config.temperature, SMALLEST)
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        smallest = mx.topk(logits, config.top_k, axis=-1).min(axis=-1, keepdims=True)
        logits = mx.where(logits < smallest, -mx.inf, logits)
    if config.top_p is not None and config.top_p < 1:
        order = mx.argsort(-logits, axis=-1)
        ordered = mx.take_along_axis(logits, order, axis=-1)
        before = mx.cumsum(mx.softmax(ordered, axis=-1), axis=-1, inclusive=False)
        nothing = mx.zeros(logits.shape, dtype=mx.bool_)
        dropped = mx.put_along_axis(nothing, order, before >= max(config.top_p, SMALLEST), axis=-1)
        logits = mx.where(dropped, -mx.inf, logits)
    probabilities = mx.softmax(logits, axis=-1)
    if config.min_p is not None:
        largest = probabilities.max(axis=-1, keepdims=True)
        probabilities = mx.where(probabilities < config.min_p * largest, 0, probabilities)
        probabilities = probabilities / probabilities.sum(axis=-1, keepdims=True)
    return probabilities


def choose_tokens(logits: mx.array, *, configs: Sequence[SamplingConfig], generators: Sequence[Draws]) -> mx.array:
    """The next token of each row of (rows, vocab), int32 and not evaluated; with temperature 0 the likeliest one.

    NO_TOKEN, which the model may read like any other id, for a row whose logits are NaN or infinite.
    """
    groups = alike(configs)
    chosen = []
    for rows in groups:
        some = logits if len(groups) == 1 else logits[mx.array(rows)]
        if configs[rows[0]].greedy:
            # A sum, because not every device finds NaN to be the largest.
            finite = mx.isfinite(mx.logsumexp(some, axis=-1))
            chosen.append(mx.where(finite, mx.argmax(some, axis=-1).astype(mx.int32), NO_TOKEN))
        else:
            draws = [generators[row].next() for row in rows]
            chosen.append(_at(next_token_probabilities(some, config=configs[rows[0]]), draws))
    if len(groups) == 1:
        return chosen[0]
    places = sorted((row, place) for place, row in enumerate(row for rows in groups for row in rows))
    return mx.concatenate(chosen)[mx.array([place for _, place in places])]


def draw_tokens(logits: mx.array, *, configs: Sequence[SamplingConfig], generators: Sequence[Draws]) -> list[int]:
    """The next token of each row; with temperature 0 the likeliest one, and then no number is drawn.

    Raises NotFiniteError where a row's logits are NaN, or its largest is infinite.
    """
    return require_tokens(_listed(choose_tokens(logits, configs=configs, generators=generators)))


def _at(probabilities: mx.array, draws: Sequence[float]) -> mx.array:
    """The token of each row whose share of [0, 1) holds the draw; shares follow each other by id. NO_TOKEN for NaN."""
    with mx.stream(mx.cpu):
        sums = mx.cumsum(probabilities.astype(mx.float64), axis=-1)
        total = sums[:, -1:]
        # Kept under the total against rounding up to it, where no token's share is left.
        points = mx.minimum(
            mx.array(list(draws), dtype=mx.float64)[:, None] * total, total * mx.array(BELOW_ONE, mx.float64)
        )
        found = (sums <= points).sum(axis=-1).astype(mx.int32)
        return mx.where(mx.isfinite(total[:, 0]), found, NO_TOKEN)


def with_logprobs(tokens: mx.array, logits: mx.array, *, tops: Sequence[int]) -> list[NewToken]:
    """Each row's token with its log-probability, and with as many of the likeliest as it asks for."""
    sums = mx.logsumexp(logits, axis=-1)
    own = mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - sums
    likeliest = {row: mx.argsort(-logits[row])[:top] for row, top in enumerate(tops) if top}
    values = {row: logits[row][order] - sums[row] for row, order in likeliest.items()}
    mx.eval(tokens, own, likeliest, values)
    news = []
    for row, (token, logprob) in enumerate(zip(_listed(tokens), _listed(own), strict=True)):
        pairs: tuple[tuple[int, float], ...] = ()
        if row in likeliest:
            pairs = tuple(zip(_listed(likeliest[row]), _listed(values[row]), strict=True))
        news.append(NewToken(token, logprob, pairs))
    return news


def _listed(array: mx.array) -> list[Any]:
    return cast("list[Any]", array.tolist())
