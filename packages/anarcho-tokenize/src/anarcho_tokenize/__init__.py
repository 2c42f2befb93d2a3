"""Text to token ids to packed batches, with SentencePiece and NumPy alone.

The path is one: a source -> `train_tokenizer` -> `prepare_shards` -> `TokenShards` -> `PackedBatches` or `BucketBatches`.
Names are resolved on first use, so that `import anarcho_tokenize` and its configurations load neither NumPy nor SentencePiece.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anarcho_tokenize.background import Producer, StreamedBatches
    from anarcho_tokenize.bpe import StreamDecoder, Tokenizer
    from anarcho_tokenize.buckets import BucketBatches, SequentialBucketBatches
    from anarcho_tokenize.byte_level import ByteLevelTokenizer
    from anarcho_tokenize.chat import (
        CHAT_TEMPLATE,
        encode_answer,
        encode_chat,
        encode_conversation,
        encode_preference,
        end_of_message,
        spell_chat,
    )
    from anarcho_tokenize.config import DataConfig, SourceConfig, TokenizerConfig
    from anarcho_tokenize.corpus import embedded_documents
    from anarcho_tokenize.errors import ShardError, SourceError, TokenizerError
    from anarcho_tokenize.importing import import_tokenizer
    from anarcho_tokenize.inspect import TokenizerReport, compare_tokenizers, inspect_tokenizer
    from anarcho_tokenize.loading import AnyTokenizer, load_tokenizer
    from anarcho_tokenize.merging import ShareStatus, merge_shares, missing_ranks, share_statuses
    from anarcho_tokenize.packing import Batch, PackedBatches, SequentialBatches
    from anarcho_tokenize.preparation import is_prepared, prepare_shards, read_texts, release, write_shards
    from anarcho_tokenize.production import PreparationReport
    from anarcho_tokenize.rows import Message, Preference
    from anarcho_tokenize.shard_report import ShardsReport, inspect_shards
    from anarcho_tokenize.shards import TokenShards
    from anarcho_tokenize.shares import prepare_share
    from anarcho_tokenize.sources import BadRow, Dropped, Example, Examples, NetworkError, check_source, read_documents
    from anarcho_tokenize.training import train_tokenizer

__version__ = "0.2.0"

__all__ = [
    "CHAT_TEMPLATE",
    "AnyTokenizer",
    "BadRow",
    "Batch",
    "BucketBatches",
    "ByteLevelTokenizer",
    "DataConfig",
    "Dropped",
    "Example",
    "Examples",
    "Message",
    "NetworkError",
    "PackedBatches",
    "Preference",
    "PreparationReport",
    "Producer",
    "SequentialBatches",
    "SequentialBucketBatches",
    "ShardError",
    "ShardsReport",
    "ShareStatus",
    "SourceConfig",
    "SourceError",
    "StreamDecoder",
    "StreamedBatches",
    "TokenShards",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerError",
    "TokenizerReport",
    "check_source",
    "compare_tokenizers",
    "embedded_documents",
    "encode_answer",
    "encode_chat",
    "encode_conversation",
    "encode_preference",
    "end_of_message",
    "import_tokenizer",
    "inspect_shards",
    "inspect_tokenizer",
    "is_prepared",
    "load_tokenizer",
    "merge_shares",
    "missing_ranks",
    "prepare_shards",
    "prepare_share",
    "read_documents",
    "read_texts",
    "release",
    "share_statuses",
    "spell_chat",
    "train_tokenizer",
    "write_shards",
]

_HOMES = {
    "background": ("Producer", "StreamedBatches"),
    "bpe": ("StreamDecoder", "Tokenizer"),
    "buckets": ("BucketBatches", "SequentialBucketBatches"),
    "byte_level": ("ByteLevelTokenizer",),
    "chat": (
        "CHAT_TEMPLATE",
        "encode_answer",
        "encode_chat",
        "encode_conversation",
        "encode_preference",
        "end_of_message",
        "spell_chat",
    ),
    "config": ("DataConfig", "SourceConfig", "TokenizerConfig"),
    "corpus": ("embedded_documents",),
    "errors": ("ShardError", "SourceError", "TokenizerError"),
    "importing": ("import_tokenizer",),
    "inspect": ("TokenizerReport", "compare_tokenizers", "inspect_tokenizer"),
    "loading": ("AnyTokenizer", "load_tokenizer"),
    "merging": ("ShareStatus", "merge_shares", "missing_ranks", "share_statuses"),
    "packing": ("Batch", "PackedBatches", "SequentialBatches"),
    "preparation": ("is_prepared", "prepare_shards", "read_texts", "release", "write_shards"),
    "production": ("PreparationReport",),
    "rows": ("Message", "Preference"),
    "shard_report": ("ShardsReport", "inspect_shards"),
    "shards": ("TokenShards",),
    "shares": ("prepare_share",),
    "sources": ("BadRow", "Dropped", "Example", "Examples", "NetworkError", "check_source", "read_documents"),
    "training": ("train_tokenizer",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
