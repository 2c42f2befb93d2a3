"""Numbers about a tokenizer and about prepared data, for people to judge them by."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from anarcho_tokenize.bpe import Tokenizer
from anarcho_tokenize.errors import ShardError
from anarcho_tokenize.shards import TokenShards
from anarcho_tokenize.symbols import FIRST_BYTE, FIRST_LEARNED

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True, kw_only=True)
class TokenizerReport:
    """What `inspect_tokenizer` found."""

    sha256: str
    """Of the file tokenizer.model."""

    vocab_size: int
    """Number of pieces."""

    special_tokens: dict[str, int]
    """Token -> id."""

    longest_pieces: tuple[str, ...]
    """The longest pieces, longest first."""

    documents: int
    """Documents that the following numbers are over."""

    bytes: int
    """Their UTF-8 bytes."""

    tokens: int
    """Their tokens, without end-of-text."""

    bytes_per_token: float
    """How much text a token holds on average; higher is shorter."""

    byte_token_share: float
    """Share of the tokens that are single bytes, for want of a piece."""

    unused_pieces: int
    """Learned pieces that occur nowhere in these documents."""


@dataclass(frozen=True, kw_only=True)
class ShardsReport:
    """What `inspect_shards` found."""

    fingerprint: str
    """Names the tokens; equal data has equal fingerprints."""

    tokenizer_sha256: str
    """The tokenizer that made them."""

    source: str
    """Where the text was from."""

    documents: int
    """Number of documents."""

    tokens: int
    """Number of tokens, an end-of-text for each document among them."""

    bytes: int
    """UTF-8 bytes of the documents."""

    bytes_per_token: float
    """Bytes of text for each token; 0 where there are none."""

    length_quantiles: dict[float, int]
    """Share of documents -> the length, in tokens, that they do not exceed; empty where there are none."""

    first_document: str | None
    """The start of the first document, decoded; None without a tokenizer or documents."""


def inspect_tokenizer(tokenizer: Tokenizer, documents: Iterable[str], *, longest: int = 20) -> TokenizerReport:
    """Count how a tokenizer writes some documents; `longest` is how many of the longest pieces to list."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    num_documents = num_bytes = 0

    def counted() -> Iterable[str]:
        nonlocal num_documents, num_bytes
        for document in documents:
            num_documents += 1
            num_bytes += len(document.encode())
            yield document

    for ids in tokenizer.encode_documents(counted()):
        counts += np.bincount(ids, minlength=tokenizer.vocab_size)
    tokens = int(counts.sum())
    learned = range(FIRST_LEARNED, tokenizer.vocab_size)
    texts = (tokenizer.token_bytes(token).decode() for token in learned)
    byte_tokens = int(counts[FIRST_BYTE:FIRST_LEARNED].sum())
    return TokenizerReport(
        sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        special_tokens=tokenizer.special_tokens,
        longest_pieces=tuple(sorted(texts, key=lambda text: (-len(text), text))[:longest]),
        documents=num_documents,
        bytes=num_bytes,
        tokens=tokens,
        bytes_per_token=num_bytes / tokens if tokens else 0.0,
        byte_token_share=byte_tokens / tokens if tokens else 0.0,
        unused_pieces=int((counts[FIRST_LEARNED:] == 0).sum()),
    )


def inspect_shards(shards: TokenShards, tokenizer: Tokenizer | None = None, *, first_tokens: int = 200) -> ShardsReport:
    """Describe prepared data; with its tokenizer, decode up to `first_tokens` tokens of the first document.

    Raises ShardError where the tokenizer is not the one that made the shards.
    """
    if tokenizer is not None and tokenizer.sha256 != shards.tokenizer_sha256:
        raise ShardError(
            f"{shards.directory} was made by the tokenizer {shards.tokenizer_sha256[:12]}, not {tokenizer.sha256[:12]}; "
            "give the tokenizer of its run, or prepare the data anew."
        )
    starts = shards.document_starts()
    lengths = np.diff(starts)
    some = len(lengths) > 0
    quantiles = np.quantile(lengths, _QUANTILES, method="inverted_cdf") if some else []
    first = None
    if tokenizer is not None and some:
        first = tokenizer.decode(shards.tokens(0, min(int(lengths[0]), first_tokens)).tolist())
    return ShardsReport(
        fingerprint=shards.fingerprint,
        tokenizer_sha256=shards.tokenizer_sha256,
        source=shards.source,
        documents=shards.num_documents,
        tokens=shards.num_tokens,
        bytes=shards.num_bytes,
        bytes_per_token=shards.num_bytes / shards.num_tokens if shards.num_tokens else 0.0,
        length_quantiles={share: int(length) for share, length in zip(_QUANTILES, quantiles, strict=bool(some))},
        first_document=first,
    )
