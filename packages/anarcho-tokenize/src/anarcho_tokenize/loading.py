"""Reading a tokenizer of either kind: SentencePiece's, or byte-level byte-pair encoding."""

import os
from pathlib import Path

from anarcho_tokenize.bpe import MODEL_FILE, Tokenizer
from anarcho_tokenize.byte_level import TOKENIZER_FILE, ByteLevelTokenizer

AnyTokenizer = Tokenizer | ByteLevelTokenizer
"""Both have one interface."""


def load_tokenizer(path: str | os.PathLike[str]) -> AnyTokenizer:
    """The tokenizer of a directory, from its tokenizer.model, or without one its tokenizer.json; or the one of such a file.

    Raises FileNotFoundError or TokenizerError.
    """
    given = Path(path)
    if given.suffix == ".json" or ((given / TOKENIZER_FILE).is_file() and not (given / MODEL_FILE).is_file()):
        return ByteLevelTokenizer.load(given)
    return Tokenizer.load(given)


def tokenizer_of_bytes(model: bytes) -> AnyTokenizer:
    """The tokenizer whose `model_bytes` these are, as another process is given them."""
    return ByteLevelTokenizer(model) if model.startswith(b"{") else Tokenizer(model)
