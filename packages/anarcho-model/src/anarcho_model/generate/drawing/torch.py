"""Drawing the next token of each row from its logits, with PyTorch.

Notable: each row draws one number for each token (see `anarcho_model.generate.draws`); the token is the one at which
the sum of the probabilities reaches that number, found for all rows at once where their logits are.

Sources: top-k (Fan et al. 2018, arXiv:1805.04833), top-p (Holtzman et al. 2020, arXiv:1904.09751), min-p (Nguyen et al.
2024, arXiv:2407.01082).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anarcho_model.generate.draws import Draws
from anarcho_model.generate.sampling import SMALLEST, SamplingConfig
from anarcho_model.generate.steps import NO_TOKEN, NewToken, alike, require_tokens

__all__ = ["choose_tokens", "draw_tokens", "next_token_probabilities", "with_logprobs"]


def next_token_probabilities(
    logits: Float[Tensor, "*rows vocab"], *, config: SamplingConfig
) -> Float[Tensor, "*rows vocab"]:
    """Probabilities after temperature, top-k, top-p and min-p, in this order; filtered tokens have 0.

    The temperature must be above 0. Each filter acts on the renormalised remains of the one before; the likeliest token
    always stays.
    """
    # Relative to the largest one, or a very small temperature would overflow.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(config.temperature, SMALLEST)
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        smallest = logits.topk(config.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if config.top_p is not None and config.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[..., 0] = 0
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= max(config.top_p, SMALLEST))
        logits = logits.masked_fill(dropped, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if config.min_p is not None:
        largest = probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < config.min_p * largest, 0)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return probabilities


def choose_tokens(
    logits: Float[Tensor, "rows vocab"],
    *,
    configs: Sequence[SamplingConfig],
    generators: Sequence[Draws],
) -> list[int]:
    """As `draw_tokens`, with NO_TOKEN for a row whose logits are NaN or infinite."""
    tokens = [0] * len(configs)
    for rows in alike(configs):
        some = logits if len(rows) == len(tokens) else logits[rows]
        if configs[rows[0]].greedy:
            likeliest = some.max(dim=-1)
            chosen = torch.where(likeliest.values.isfinite(), likeliest.indices, NO_TOKEN)
        else:
            draws = torch.tensor([generators[row].next() for row in rows], dtype=torch.float64)
            chosen = _at(next_token_probabilities(some, config=configs[rows[0]]), draws)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            tokens[row] = token
    return tokens


def draw_tokens(
    logits: Float[Tensor, "rows vocab"],
    *,
    configs: Sequence[SamplingConfig],
    generators: Sequence[Draws],
) -> list[int]:
    """The next token of each row; with temperature 0 the likeliest one, and then nothing is drawn from the generator.

    Raises NotFiniteError where a row's logits are NaN, or its largest is infinite.
    """
    return require_tokens(choose_tokens(logits, configs=configs, generators=generators))


def _at(probabilities: Float[Tensor, "rows vocab"], draws: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """The token of each row whose share of [0, 1) holds the draw; shares follow each other by id. NO_TOKEN for NaN."""
    sums = probabilities.double().cumsum(dim=-1)
    total = sums[:, -1:]
    # Kept under the total against rounding up to it, where no token's share is left.
    points = torch.minimum(draws.to(sums.device)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.where(total.isfinite(), torch.searchsorted(sums, points, right=True), NO_TOKEN)[:, 0]


def with_logprobs(tokens: Sequence[int], logits: Float[Tensor, "rows vocab"], *, tops: Sequence[int]) -> list[NewToken]:
    """Each row's token with its log-probability, and with as many of the likeliest as it asks for."""
    sums = logits.logsumexp(dim=-1)
    places = torch.tensor(tokens, device=logits.device).clamp(min=0)  # of NO_TOKEN, any will do
    own = (logits.gather(1, places[:, None])[:, 0] - sums).tolist()
    news = []
    for row, (token, top) in enumerate(zip(tokens, tops, strict=True)):
        pairs: tuple[tuple[int, float], ...] = ()
        if top:
            likeliest = logits[row].topk(top)
            values = (likeliest.values - sums[row]).tolist()
            pairs = tuple(zip(likeliest.indices.tolist(), values, strict=True))
        news.append(NewToken(token, own[row], pairs))
    return news
