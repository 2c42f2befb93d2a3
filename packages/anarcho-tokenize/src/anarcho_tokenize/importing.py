"""Takes over SentencePiece models that were made elsewhere, such as those of Llama and Mistral.

A tokenizer here has seven special tokens. The end of a text, padding and the unknown token are the model's own pieces where it has them;
whatever is missing is appended to its vocabulary as control pieces, which no text encodes to. All ids that the model had stay as
they were, so its embeddings need rows at their end only.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import sentencepiece

from anarcho_tokenize.errors import TokenizerError
from anarcho_tokenize.piece_model import (
    BPE,
    BYTE,
    CONTROL,
    UNIGRAM,
    UNKNOWN_KIND,
    PieceModel,
    appended_control,
    appended_end_of_text,
    appended_padding,
    read_model,
    with_controls,
)
from anarcho_tokenize.symbols import END_OF_TEXT, PAD, SPECIAL_TOKENS, UNKNOWN

if TYPE_CHECKING:
    from anarcho_tokenize.bpe import Tokenizer

_MODEL_NAMES = ("tokenizer.model", "*.model")


def import_tokenizer(path: str | os.PathLike[str]) -> "Tokenizer":
    """Read any SentencePiece model, a file or the one in a directory, and append the special tokens that it lacks.

    Raises FileNotFoundError, or TokenizerError for what is no such model or cannot be taken over exactly.
    """
    from anarcho_tokenize.bpe import Tokenizer  # which builds on this module

    found = Path(path)
    if found.is_dir():
        files = next((files for name in _MODEL_NAMES if (files := sorted(found.glob(name)))), [])
        if len(files) != 1:
            raise FileNotFoundError(
                f"{found} holds {len(files)} files that end in .model; expected one, or give the path of the file itself."
            )
        found = files[0]
    if not found.is_file():
        raise FileNotFoundError(f"{found} is missing; expected a SentencePiece model, a file that ends in .model.")
    return Tokenizer(found.read_bytes(), name=str(found))


def complete(given: bytes, *, name: str) -> tuple[bytes, PieceModel]:
    """A model file with all seven special tokens, and what it says; the one given, where nothing is missing. Raises TokenizerError."""
    try:
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(given)
        model = read_model(given)
    except (RuntimeError, ValueError) as error:
        raise TokenizerError(f"{name} is not a SentencePiece model; expected the bytes of a .model file.") from error
    _check(model, name=name)
    kinds = {piece.text: piece.kind for piece in model.pieces}
    own = {END_OF_TEXT: processor.eos_id() >= 0, PAD: processor.pad_id() >= 0, UNKNOWN: processor.unk_id() >= 0}
    lacking = [token for token in SPECIAL_TOKENS if not own.get(token) and kinds.get(token) != CONTROL]
    raw = set(lacking) & kinds.keys()
    data = with_controls(given, raw) if raw else given
    appended = [token for token in lacking if token not in raw]
    ids = {piece.text: number for number, piece in enumerate(model.pieces)}
    ids |= {token: len(model.pieces) + number for number, token in enumerate(appended)}
    data += b"".join(map(appended_control, appended))
    if not own[END_OF_TEXT]:
        data += appended_end_of_text(END_OF_TEXT, ids[END_OF_TEXT])
    if not own[PAD]:
        data += appended_padding(PAD, ids[PAD])
    return data, model if data == given else read_model(data)


def _check(model: PieceModel, *, name: str) -> None:
    """Raise TokenizerError for what cannot be encoded and saved as it is meant."""
    if model.algorithm not in (BPE, UNIGRAM):
        raise TokenizerError(f"{name} is a model of words or characters; expected one of the kind bpe or unigram.")
    if model.spaces_end_pieces or not model.escape_spaces:
        raise TokenizerError(
            f"{name} writes spaces at the end of pieces or not as U+2581; expected U+2581 at their beginning."
        )
    readable = (piece.text for piece in model.pieces if piece.kind not in (CONTROL, UNKNOWN_KIND, BYTE))
    if spaced := next((text for text in readable if " " in text), None):
        raise TokenizerError(
            f"{name} has the piece {spaced!r} with a space, which no text encodes to; expected U+2581."
        )
    missing = 256 - sum(piece.kind == BYTE for piece in model.pieces)
    if model.byte_fallback and missing:
        raise TokenizerError(f"{name} lacks {missing} of the 256 bytes that its byte fallback needs.")
