"""Text to token ids to packed batches, with SentencePiece and NumPy alone.

The path is one: `read_documents` -> `train_tokenizer` -> `prepare_shards` -> `TokenShards` -> `ConcatBatches`.
Names are resolved on first use, so that `import anarcho_tokenize` and its configurations load neither NumPy nor SentencePiece.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anarcho_tokenize.bpe import StreamDecoder, Tokenizer
    from anarcho_tokenize.chat import CHAT_TEMPLATE, encode_chat
    from anarcho_tokenize.config import DataConfig, TokenizerConfig
    from anarcho_tokenize.corpus import embedded_documents
    from anarcho_tokenize.errors import ShardError, SourceError, TokenizerError
    from anarcho_tokenize.inspect import ShardsReport, TokenizerReport, inspect_shards, inspect_tokenizer
    from anarcho_tokenize.packing import Batch, ConcatBatches, SequentialBatches
    from anarcho_tokenize.preparation import prepare_shards
    from anarcho_tokenize.shards import TokenShards
    from anarcho_tokenize.sources import read_documents
    from anarcho_tokenize.training import train_tokenizer

__version__ = "0.1.0"

__all__ = [
    "CHAT_TEMPLATE",
    "Batch",
    "ConcatBatches",
    "DataConfig",
    "SequentialBatches",
    "ShardError",
    "ShardsReport",
    "SourceError",
    "StreamDecoder",
    "TokenShards",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerError",
    "TokenizerReport",
    "embedded_documents",
    "encode_chat",
    "inspect_shards",
    "inspect_tokenizer",
    "prepare_shards",
    "read_documents",
    "train_tokenizer",
]

_HOMES = {
    "bpe": ("StreamDecoder", "Tokenizer"),
    "chat": ("CHAT_TEMPLATE", "encode_chat"),
    "config": ("DataConfig", "TokenizerConfig"),
    "corpus": ("embedded_documents",),
    "errors": ("ShardError", "SourceError", "TokenizerError"),
    "inspect": ("ShardsReport", "TokenizerReport", "inspect_shards", "inspect_tokenizer"),
    "packing": ("Batch", "ConcatBatches", "SequentialBatches"),
    "preparation": ("prepare_shards",),
    "shards": ("TokenShards",),
    "sources": ("read_documents",),
    "training": ("train_tokenizer",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
