"""What a user can choose about tokenizer and data; plain standard library, so that reading a configuration stays cheap."""

from dataclasses import dataclass

from anarcho_tokenize.errors import ShardError, TokenizerError
from anarcho_tokenize.symbols import FIRST_LEARNED


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How `train_tokenizer` learns its pieces."""

    vocab_size: int = 32000
    """Number of pieces, among them 7 special tokens, 256 bytes and 2 line breaks."""

    sample_bytes: int = 64 * 2**20
    """The pieces are learned from a uniform sample of about this many bytes of the documents' lines; all of a smaller corpus."""

    seed: int = 0
    """Chooses the sample; of no effect where the documents are smaller than `sample_bytes`."""

    split_digits: bool = True
    """Every digit is a piece of its own, which helps arithmetic."""

    character_coverage: float = 0.9995
    """Share of the sample's characters that get a piece of their own; rarer ones are written as UTF-8 bytes."""

    max_piece_length: int = 16
    """Longest piece to learn, in characters."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "sample_bytes", "max_piece_length"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise TokenizerError(f"tokenizer.{name} is {value!r}; expected a whole number of at least 1.")
        if self.vocab_size <= FIRST_LEARNED:
            raise TokenizerError(
                f"tokenizer.vocab_size is {self.vocab_size}; expected more than the {FIRST_LEARNED} special tokens, bytes and line breaks."
            )
        if not 0.9 <= self.character_coverage <= 1:
            raise TokenizerError(
                f"tokenizer.character_coverage is {self.character_coverage!r}; expected a share between 0.9 and 1."
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text is read, and how it becomes shards and batches."""

    source: str = "embedded"
    """`embedded`, or a file, a glob or a directory of .txt, .jsonl or .parquet (.gz, .xz, .bz2 and .zst, too)."""

    text_field: str = "text"
    """Key (jsonl) or column (parquet) that holds a document's text."""

    document_separator: str | None = None
    """Splits a .txt file into documents, for example `<|endoftext|>`; without it, a file is one document."""

    validation_fraction: float = 0.05
    """Share of the documents, chosen by a hash of their text, that is kept from training."""

    shard_tokens: int = 2**26
    """A shard is closed by the document that brings it to this many tokens."""

    isolate_documents: bool = False
    """Whether attention and positions start anew at each document of a packed sequence."""

    num_threads: int | None = None
    """Threads that tokenize; every core when not given."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise ShardError(
                f"data.validation_fraction is {self.validation_fraction!r}; expected a share from 0 to below 1."
            )
        for name in ("shard_tokens", "num_threads"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ShardError(f"data.{name} is {value!r}; expected a whole number of at least 1.")
        if self.document_separator == "":
            raise ShardError(
                "data.document_separator is empty; expected a text that separates documents, or no such key."
            )
