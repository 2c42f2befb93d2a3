"""What a user can choose about tokenizer and data; plain standard library, so that reading a configuration stays cheap."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from anarcho_tokenize.errors import ShardError, SourceError, TokenizerError
from anarcho_tokenize.symbols import FIRST_LEARNED

Kind = Literal["text", "chat", "preference"]
"""What a row is: a document, a conversation, or a prompt with a chosen and a rejected answer."""

REMOTE = ("hf://", "https://", "http://")
"""How the names of sources begin that are not on this machine."""

MAX_VOCABULARY, MAX_PIECE_LENGTH, MAX_THREADS = 2**31 - 1, 512, 1024
"""SentencePiece's own limits."""
MAX_WORKERS = 1024
"""Each is a process; more than any machine gains from."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How `train_tokenizer` learns its pieces."""

    vocab_size: int = 32000
    """Number of pieces, among them 7 special tokens, 256 bytes and 2 line breaks."""

    sample_bytes: int = 64 * 2**20
    """The pieces are learned from a uniform sample of about this many bytes of the documents' lines; all of a smaller corpus."""

    sample_documents: int | None = None
    """The sample is taken from a uniform sample of so many documents; from all of them when not given."""

    scan_bytes: int | None = 2**30
    """Only the first so many bytes of the source are looked at, which keeps endless sources finite; all of it when not given."""

    seed: int = 0
    """Chooses the sample; of no effect where the documents are smaller than `sample_bytes`."""

    split_digits: bool = True
    """Every digit is a piece of its own, which helps arithmetic."""

    user_symbols: tuple[str, ...] = ()
    """Texts without white space that are always one piece of their own wherever they stand, such as `<think>`."""

    normalization: Literal["identity", "nfc", "nfkc"] = "identity"
    """Unicode normal form that text is brought into first; `identity` keeps every text exactly as it is."""

    character_coverage: float = 0.9995
    """Share of the sample's characters that get a piece of their own; rarer ones are written as UTF-8 bytes."""

    max_piece_length: int = 16
    """Longest piece to learn, in characters, at most 512."""

    num_threads: int = 1
    """Threads that learn, at most 1024; the pieces are equal for equal seed and threads, the model file records both."""

    def __post_init__(self) -> None:
        _check_counts(
            self,
            "tokenizer",
            TokenizerError,
            ("vocab_size", "sample_bytes", "sample_documents", "scan_bytes", "max_piece_length", "num_threads"),
        )
        _check_limits(
            self,
            "tokenizer",
            TokenizerError,
            {"vocab_size": MAX_VOCABULARY, "max_piece_length": MAX_PIECE_LENGTH, "num_threads": MAX_THREADS},
        )
        if self.vocab_size <= FIRST_LEARNED:
            raise TokenizerError(
                f"tokenizer.vocab_size is {self.vocab_size}; expected more than the {FIRST_LEARNED} special tokens, bytes and line breaks."
            )
        if not 0.9 <= self.character_coverage <= 1:
            raise TokenizerError(
                f"tokenizer.character_coverage is {self.character_coverage!r}; expected a share between 0.9 and 1."
            )
        if self.normalization not in ("identity", "nfc", "nfkc"):
            raise TokenizerError(
                f"tokenizer.normalization is {self.normalization!r}; expected 'identity', 'nfc' or 'nfkc'."
            )


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of a mixture: where its rows are, which of them are taken, and how many beside those of the others."""

    source: str
    """`embedded`, a file, a glob or a directory of .txt, .jsonl or .parquet (.gz, .xz, .bz2 and .zst, too), `https://` of such a file,
    or `hf://name?config=..&split=..&field=..` for a dataset of the Hugging Face Hub."""

    weight: float = 1.0
    """Share of the text, in bytes, beside the weights of the other sources."""

    text_field: str | None = None
    """Key (jsonl) or column (parquet) that holds a document's text; `text` or else `content` when not given."""

    document_separator: str | None = None
    """Splits a .txt file into documents, for example `<|endoftext|>`; without it, a file is one document, or several of 16 MiB."""

    score_field: str = "score"
    """Key or column of the number that `min_score` is compared with."""

    min_score: float | None = None
    """Rows with a lower score are left out."""

    language_field: str = "language"
    """Key or column that names a row's language."""

    languages: tuple[str, ...] = ()
    """Rows in another language are left out; every language is taken when not given."""

    min_chars: int = 1
    """Rows with less text, in characters, are left out."""

    max_chars: int | None = None
    """Rows with more text, in characters, are left out."""

    def __post_init__(self) -> None:
        _check_source(self)
        if not 0 < self.weight < math.inf:
            raise SourceError(f"data.sources has the weight {self.weight!r}; expected a positive number.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text is read, and how it becomes shards and batches."""

    source: str = "embedded"
    """`embedded`, a file, a glob or a directory of .txt, .jsonl or .parquet (.gz, .xz, .bz2 and .zst, too), `https://` of such a file,
    or `hf://name?config=..&split=..&field=..` for a dataset of the Hugging Face Hub."""

    sources: tuple[SourceConfig, ...] = ()
    """A weighted mixture, in place of `source` and of the keys about fields and filters, which each source then has of its own."""

    mixture_end: Literal["first", "repeat"] = "first"
    """A mixture ends with the `first` source that ends, or sources `repeat` until each has ended once."""

    kind: Kind = "text"
    """What a row is: `text`, a `chat` (`messages` or `conversations`), or a `preference` (`chosen` and `rejected`)."""

    text_field: str | None = None
    """Key (jsonl) or column (parquet) that holds a document's text; `text` or else `content` when not given."""

    document_separator: str | None = None
    """Splits a .txt file into documents, for example `<|endoftext|>`; without it, a file is one document, or several of 16 MiB."""

    score_field: str = "score"
    """Key or column of the number that `min_score` is compared with."""

    min_score: float | None = None
    """Rows with a lower score are left out."""

    language_field: str = "language"
    """Key or column that names a row's language."""

    languages: tuple[str, ...] = ()
    """Rows in another language are left out; every language is taken when not given."""

    min_chars: int = 1
    """Rows with less text, in characters, are left out."""

    max_chars: int | None = None
    """Rows with more text, in characters, are left out."""

    deduplicate: bool = False
    """Whether a row that has been seen before, by the hash of its text, is left out."""

    max_document_bytes: int = 32 * 2**20
    """Larger rows are put into quarantine, as are broken ones."""

    max_bad_share: float = 0.05
    """Share of rows in quarantine at which reading stops, once there have been a thousand rows, or all of fewer."""

    max_tokens: int | None = None
    """Reading stops after about so many training tokens; the whole source is read when not given."""

    damaged_shards: Literal["stop", "skip"] = "stop"
    """What is done about shards whose files are not those that were written, by their sha256: `stop`, or `skip` their tokens.

    More than `max_bad_share` of the tokens stop in any case."""

    validation_fraction: float = 0.05
    """Share of the documents, chosen by a hash of their text, that is kept from training."""

    validation_tokens: int | None = None
    """Validation documents beyond so many tokens are left out; 262,144 where it streams and this is not given, others keep all."""

    shard_tokens: int = 2**22
    """A shard is closed by the chunk of documents that brings it to this many tokens."""

    streaming: bool | None = None
    """Whether training begins while the source is still read; when not given, it does so for `hf://` and `https://`."""

    shuffle_tokens: int = 2**22
    """A streaming run shuffles within stretches of so many tokens; others shuffle everything."""

    disk_budget: int | None = None
    """Bytes of shards that a streaming run keeps: trained ones are deleted, oldest first, and there is one epoch only.

    What the next samples need is kept in any case, so this is a bound only where it leaves room for two of `shuffle_tokens`."""

    packing: Literal["concat", "best-fit"] = "concat"
    """`concat` cuts the joined documents into sequences, `best-fit` puts whole documents into sequences that they fill best."""

    isolate_documents: bool = False
    """Whether attention and positions start anew at each document of a packed sequence."""

    num_workers: int | None = None
    """Processes that tokenize, at most 1024, 0 for none beside the reader; when not given, one a core where there is much text."""

    network_retries: int = 8
    """Attempts after a network failure, with growing pauses of up to a minute, before the source is given up."""

    def __post_init__(self) -> None:
        _check_source(self)
        _check_counts(
            self, "data", ShardError, ("max_document_bytes", "max_tokens", "validation_tokens", "shard_tokens")
        )
        _check_counts(self, "data", ShardError, ("shuffle_tokens", "disk_budget"))
        _check_counts(self, "data", ShardError, ("num_workers", "network_retries"), least=0)
        _check_limits(self, "data", ShardError, {"num_workers": MAX_WORKERS})
        if not 0 <= self.validation_fraction < 1:
            raise ShardError(
                f"data.validation_fraction is {self.validation_fraction!r}; expected a share from 0 to below 1."
            )
        if not 0 <= self.max_bad_share <= 1:
            raise SourceError(f"data.max_bad_share is {self.max_bad_share!r}; expected a share from 0 to 1.")
        for name, allowed in (
            ("mixture_end", ("first", "repeat")),
            ("damaged_shards", ("stop", "skip")),
            ("kind", ("text", "chat", "preference")),
            ("packing", ("concat", "best-fit")),
        ):
            if getattr(self, name) not in allowed:
                raise ShardError(f"data.{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}.")
        self._check_mixture()

    def _check_mixture(self) -> None:
        """Keys that each source of a mixture has of its own cannot stand beside `sources`."""
        if not self.sources:
            return
        own = {field.name: field.default for field in fields(SourceConfig)} | {"source": "embedded"}
        for name in own.keys() - {"weight"}:
            if getattr(self, name) != own[name]:
                raise SourceError(
                    f"data.{name} is {getattr(self, name)!r} beside data.sources; expected it in each of the sources that it is for."
                )

    @property
    def streams(self) -> bool:
        """Whether training begins while the source is still read."""
        remote = any(source.source.startswith(REMOTE) for source in self.mixture)
        return remote if self.streaming is None else self.streaming

    @property
    def mixture(self) -> tuple[SourceConfig, ...]:
        """The sources, of which there is at least one."""
        names = [field.name for field in fields(SourceConfig) if field.name != "weight"]
        return self.sources or (SourceConfig(**{name: getattr(self, name) for name in names}),)

    @property
    def name(self) -> str:
        """The sources as one text for people."""
        return ", ".join(source.source for source in self.mixture)


def data_config_of(values: Mapping[str, Any]) -> DataConfig:
    """The configuration that `dataclasses.asdict` gave as these values, which may have been JSON meanwhile."""
    sources = tuple(SourceConfig(**_with_tuples(source)) for source in values["sources"])
    others = {key: value for key, value in values.items() if key != "sources"}
    return DataConfig(**_with_tuples(others), sources=sources)


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _check_source(config: SourceConfig | DataConfig) -> None:
    if config.document_separator == "":
        raise ShardError("data.document_separator is empty; expected a text that separates documents, or no such key.")
    _check_counts(config, "data", SourceError, ("max_chars",))
    _check_counts(config, "data", SourceError, ("min_chars",), least=1)
    if config.min_score is not None and not math.isfinite(config.min_score):
        raise SourceError(f"data.min_score is {config.min_score!r}; expected a finite number, or no such key.")


def _check_counts(
    config: object, section: str, error: type[ValueError], names: tuple[str, ...], *, least: int = 1
) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise error(f"{section}.{name} is {value!r}; expected a whole number of at least {least}.")


def _check_limits(config: object, section: str, error: type[ValueError], limits: Mapping[str, int]) -> None:
    for name, most in limits.items():
        value = getattr(config, name)
        if value is not None and value > most:
            raise error(f"{section}.{name} is {value}; expected at most {most}.")
