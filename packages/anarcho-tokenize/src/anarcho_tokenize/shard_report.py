"""Numbers about prepared data, for people to judge it by."""

from dataclasses import dataclass

import numpy as np

from anarcho_tokenize.config import Kind
from anarcho_tokenize.errors import ShardError
from anarcho_tokenize.loading import AnyTokenizer
from anarcho_tokenize.shards import TokenShards

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True, kw_only=True)
class ShardsReport:
    """What `inspect_shards` found."""

    fingerprint: str
    """Names the tokens; equal data has equal fingerprints."""

    kind: Kind
    """What a document is."""

    complete: bool
    """Whether the preparation has come to its end."""

    tokenizer_sha256: str
    """The tokenizer that made them."""

    source: str
    """Where the text was from."""

    shards: int
    """Number of shards, evicted ones included."""

    documents: int
    """Number of documents; a preference counts two."""

    tokens: int
    """Number of tokens, of texts an end-of-text for each document among them."""

    bytes: int
    """UTF-8 bytes of the documents."""

    bytes_per_token: float
    """Bytes of text for each token; 0 where there are none."""

    length_quantiles: dict[float, int]
    """Share of documents -> the length, in tokens, that they do not exceed; empty where there are none."""

    first_document: str | None
    """The start of the first document, decoded; None without a tokenizer or documents."""


def inspect_shards(
    shards: TokenShards, tokenizer: AnyTokenizer | None = None, *, first_tokens: int = 200
) -> ShardsReport:
    """Describe prepared data; with its tokenizer, decode up to `first_tokens` tokens of the first document.

    Raises ShardError where the tokenizer is not the one that made the shards.
    """
    if tokenizer is not None:
        require_tokenizer(shards, tokenizer)
    starts = shards.document_starts()
    lengths = np.diff(starts)
    some = len(lengths) > 0
    quantiles = np.quantile(lengths, _QUANTILES, method="inverted_cdf") if some else []
    first = None
    if tokenizer is not None and some and not shards.is_evicted(0):
        first = tokenizer.decode(shards.tokens(0, min(int(lengths[0]), first_tokens)).tolist())
    return ShardsReport(
        fingerprint=shards.fingerprint,
        kind=shards.kind,
        complete=shards.complete,
        tokenizer_sha256=shards.tokenizer_sha256,
        source=shards.source,
        shards=len(shards.shard_starts) - 1,
        documents=shards.num_documents,
        tokens=shards.num_tokens,
        bytes=shards.num_bytes,
        bytes_per_token=shards.num_bytes / shards.num_tokens if shards.num_tokens else 0.0,
        length_quantiles={share: int(length) for share, length in zip(_QUANTILES, quantiles, strict=bool(some))},
        first_document=first,
    )


def require_tokenizer(shards: TokenShards, tokenizer: AnyTokenizer) -> None:
    """Raise ShardError where the tokenizer is not the one that made the shards."""
    if tokenizer.sha256 != shards.tokenizer_sha256:
        raise ShardError(
            f"{shards.directory} was made by the tokenizer {shards.tokenizer_sha256[:12]}, not {tokenizer.sha256[:12]}; "
            "give the tokenizer of its run, or prepare the data anew."
        )
