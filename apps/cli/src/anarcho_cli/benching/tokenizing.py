"""How fast the tokenizer is on this machine's processor: learning and encoding, on a part of the embedded corpus."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from anarcho_cli.benching.cases import Case

if TYPE_CHECKING:
    from anarcho_tokenize import Tokenizer

LEARN_BYTES, ENCODE_BYTES = 1_000_000, 4_000_000
"""How much of the corpus is learned from and encoded: some seconds' work."""


def measure_tokenizer(case: Case) -> dict[str, Any]:
    """Bytes a second of learning a case's vocabulary and of encoding, in one process."""
    from anarcho_tokenize import Tokenizer, train_tokenizer

    sample = embedded_part(LEARN_BYTES)
    config = case.config.tokenizer
    start = time.perf_counter()
    model = train_tokenizer(sample, config=config).model_bytes
    learning = time.perf_counter() - start
    texts = embedded_part(ENCODE_BYTES)
    size = sum(len(text.encode()) for text in texts)
    # A tokenizer remembers words, so each pass has a new one.
    passes = [_encode(Tokenizer(model), texts) for _ in range(min(case.steps, 3))]
    tokens, encoding = passes[0][0], median(seconds for _, seconds in passes)
    return {
        "vocab_size": config.vocab_size,
        "learning_bytes_per_second": sum(len(text.encode()) for text in sample) / learning,
        "bytes_per_second": size / encoding,
        "tokens_per_second": tokens / encoding,
        "bytes_per_token": size / tokens,
    }


def embedded_part(size: int) -> list[str]:
    """The first documents of the embedded corpus, of about so many bytes together."""
    from anarcho_tokenize import embedded_documents

    return list(beginning(embedded_documents(), size))


def beginning(texts: Iterable[str], size: int) -> Iterator[str]:
    """The first texts, of about so many bytes together."""
    for text in texts:
        yield text
        size -= len(text.encode())
        if size <= 0:
            return


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[int, float]:
    """How many tokens the texts are, and the seconds that it takes to find them."""
    start = time.perf_counter()
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    return tokens, time.perf_counter() - start
