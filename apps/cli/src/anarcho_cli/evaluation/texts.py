"""How well a model predicts the documents of a source.

Bits per byte compare models of different tokenizers; perplexities per token do not. Bytes are those of the UTF-8 text as it is in the
source.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator

from anarcho_cli.evaluation.encoding import encode_document
from anarcho_cli.evaluation.report import Evaluation
from anarcho_cli.evaluation.scoring import Request
from anarcho_cli.evaluation.sources import TextSource
from anarcho_cli.evaluation.statistics import exponential, ratio
from anarcho_cli.evaluation.subject import Subject


def evaluate_text(subject: Subject, source: TextSource, *, notify: Callable[[str], None]) -> Evaluation:
    """Bits per byte, and perplexities per token and byte, with standard errors over documents."""
    sizes: list[int] = []
    digest = hashlib.sha256()

    def requests() -> Iterator[Request]:
        for text in source.documents(notify=notify):
            data = text.encode()
            sizes.append(len(data))
            digest.update(hashlib.sha256(data).digest())
            yield encode_document(subject.tokenizer, text)

    scores = list(subject.scorer.score(requests()))
    nats, tokens = [-score.logprob for score in scores], [score.num_tokens for score in scores]
    per_byte, per_token = ratio(nats, sizes), ratio(nats, tokens)
    return Evaluation(
        name=source.name,
        kind="text",
        num_items=len(scores),
        sha256=digest.hexdigest(),
        estimates={
            "bits_per_byte": ratio([value / math.log(2) for value in nats], sizes),
            "byte_perplexity": exponential(per_byte),
            "token_perplexity": exponential(per_token),
        },
        counts={
            "bytes": sum(sizes),
            "tokens": sum(tokens),
            "windows": sum(score.num_windows for score in scores),
            "documents_in_windows": sum(score.is_cut for score in scores),
        },
    )
