"""How fast a model of a shape writes: tokens a second after the first one, which waits for the prompt.

Notable: the weights are random and the likeliest token is taken, for speed depends on neither; the arithmetic is that of
`anarcho generate`, float32.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from anarcho_cli.back_ends import back_end
from anarcho_cli.benching.cases import Case
from anarcho_cli.benching.subject import device_name, new_step

PROMPT_TOKENS, NEW_TOKENS = 32, 128
"""Lengths of prompt and text, less where the context is short."""


def measure_generation(case: Case) -> dict[str, Any]:
    """The figures of texts that a case's model writes."""
    from anarcho_model.generate.sampling import SamplingConfig

    framework = back_end(case.backend)
    context = case.config.model.context_length
    prompt_tokens = min(PROMPT_TOKENS, context // 4 or 1)
    new_tokens = min(NEW_TOKENS, context - prompt_tokens)
    if new_tokens < 2:
        raise ValueError(f"model.context_length is {context}; expected at least 4 to measure generation")
    prompt_ids = [n % case.config.model.vocab_size for n in range(1, prompt_tokens + 1)]
    step = new_step(framework, case.config, device=case.device)
    sampling = SamplingConfig(max_new_tokens=new_tokens, temperature=0.0)

    def begin() -> Iterator[int]:
        return iter(framework.generate(step, prompt_ids, config=sampling))

    for _ in itertools.islice(begin(), 2):  # What is prepared once is no part of the speed.
        pass
    runs = [_time_text(begin) for _ in range(min(case.steps, 3))]
    return {
        "device_name": device_name(framework, case.device),
        "precision": "float32",
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "tokens_per_second": median(rate for rate, _ in runs),
        "first_token_seconds": median(first for _, first in runs),
    }


def _time_text(begin: Callable[[], Iterator[int]]) -> tuple[float, float]:
    """Tokens a second after the first, and the seconds before that."""
    start = time.perf_counter()
    stream = begin()
    next(stream)
    first = time.perf_counter()
    rest = sum(1 for _ in stream)
    return rest / (time.perf_counter() - first), first - start
