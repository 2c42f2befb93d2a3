"""The tokenizer: SentencePiece's byte-pair encoding (or a unigram model), made exact for every text that UTF-8 can hold.

What is notable:

* Models of `train_tokenizer` take text as it is: no normalisation unless asked for, no added or removed space. Characters without a
  piece are written as UTF-8 bytes.
* SentencePiece writes a space as U+2581 and reads U+2581 as a space. Here that character is encoded by its three bytes, and ids are
  decoded through a table of bytes, so `decode(encode(text)) == text` for NUL, U+2581, U+FFFD and all others.
* Any other SentencePiece model works, too: what it lacks of the seven special tokens is appended to its vocabulary. Its ids are those
  of SentencePiece, except U+2581, which is written as bytes where the model leaves texts alone and has bytes. It brings back
  `normalize(text)`, and characters without a piece are lost where it has no bytes.
* Texts are encoded word by word, with a memory of words: see `words`.

Sources: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; Kudo and Richardson 2018, https://arxiv.org/abs/1808.06226.
"""

import codecs
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import sentencepiece

from anarcho_tokenize.chat_format import chat_format_of
from anarcho_tokenize.errors import TokenizerError
from anarcho_tokenize.huggingface import tokenizer_files
from anarcho_tokenize.importing import complete
from anarcho_tokenize.normalization import Form, form_named, normalize
from anarcho_tokenize.piece_model import BYTE, CONTROL, UNKNOWN_KIND, Piece, PieceModel, appended_plain_text
from anarcho_tokenize.symbols import END_OF_TEXT, PAD, SPACE_MARK, SPECIAL_TOKENS, UNKNOWN
from anarcho_tokenize.words import WordEncoder

MODEL_FILE = "tokenizer.model"


class Tokenizer:
    """A trained tokenizer; `Tokenizer.load` reads one, `train_tokenizer` makes one, `import_tokenizer` takes one over."""

    def __init__(self, model: bytes, *, name: str = MODEL_FILE) -> None:
        """Take the bytes of a SentencePiece model; `name` is for messages. Special tokens that it lacks are appended.

        Raises TokenizerError for anything else.
        """
        self.model_bytes, self.piece_model = complete(model, name=name)
        """The file tokenizer.model, all that another process needs to make this tokenizer; and its pieces and settings."""
        self.sha256 = hashlib.sha256(self.model_bytes).hexdigest()
        """Of the file tokenizer.model; it names this tokenizer in shards and checkpoints."""
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes)
        pieces = self.piece_model.pieces
        ids = {piece.text: number for number, piece in enumerate(pieces)}
        own = {UNKNOWN: self._processor.unk_id(), END_OF_TEXT: self._processor.eos_id(), PAD: self._processor.pad_id()}
        self.vocab_size = len(pieces)
        self.special_tokens: dict[str, int] = {
            token: own[token] if token in own else ids[token] for token in SPECIAL_TOKENS
        }
        """Name -> id. The model's own end of text, padding and unknown token may be spelled otherwise in its vocabulary."""
        self.eot_id = self.special_tokens[END_OF_TEXT]
        self.pad_id = self.special_tokens[PAD]
        begin = self._processor.bos_id()
        self.bos_id: int | None = begin if begin >= 0 else None
        """The begin-of-text token of a foreign model; it is never added to a text."""
        self.normalization: Form = form_named(self.piece_model.normalizer)
        """Normal form that texts are brought into first; a foreign model's own rules are in `piece_model`."""
        self._bytes = [_piece_bytes(piece) for piece in pieces]
        self._spelled = {i: piece.text for i, piece in enumerate(pieces) if piece.kind in (CONTROL, UNKNOWN_KIND)}
        self.writes_space_mark = (
            self.piece_model.byte_fallback and not self.piece_model.normalizes and SPACE_MARK in ids
        )
        """Whether U+2581 is written as its bytes, so that it comes back; otherwise it is a space, as for SentencePiece."""
        space_mark = None
        if self.writes_space_mark:
            space_mark = [ids[f"<0x{byte:02X}>"] for byte in SPACE_MARK.encode()]
        plain = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes + appended_plain_text())
        self._words = WordEncoder(plain, self.piece_model, space_mark=space_mark)
        self.chat_format = chat_format_of(self.special_tokens, self.encode)
        """How conversations are written."""

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read a tokenizer.model, or the one in a directory. Raises FileNotFoundError or TokenizerError."""
        file = Path(path)
        file = file / MODEL_FILE if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; expected a {MODEL_FILE}, as Tokenizer.save writes it.")
        return cls(file.read_bytes(), name=str(file))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write tokenizer.model, tokenizer.json and tokenizer_config.json (with the chat template)."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_bytes(self.model_bytes)
        for file_name, text in tokenizer_files(self).items():
            (folder / file_name).write_text(text, encoding="utf-8", newline="\n")

    def normalize(self, text: str) -> str:
        """The text that `decode(encode(text))` gives back, as long as all its characters are known."""
        return self._prepared(text)[int(self.piece_model.dummy_prefix) :]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises TokenizerError for lone surrogates, which no UTF-8 text can hold."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> npt.NDArray[np.int32]:
        """Token ids of a text, without a Python object for each: for long texts."""
        check_unicode(text, name="The text")
        return self._words.encode(self._prepared(text))

    def encode_documents(
        self, documents: Iterable[str], *, num_threads: int | None = None
    ) -> Iterator[npt.NDArray[np.int32]]:
        """Yield each document's ids, in order; words that are new are encoded by threads (every core when not given)."""
        threads = num_threads or os.cpu_count() or 1
        for number, document in enumerate(documents, start=1):
            check_unicode(document, name=f"Document {number}")
            yield self._words.encode(self._prepared(document), num_threads=threads)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids; U+FFFD stands for bytes that are not UTF-8. Special tokens are left out, or spelled if asked for."""
        spelled = {} if skip_special_tokens else self._spelled
        parts = [spelled[token].encode() if token in spelled else self.token_bytes(token) for token in ids]
        text = b"".join(parts).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.piece_model.dummy_prefix else text

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes, not always whole characters, that a token stands for; none for a special token."""
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(f"Token id {token_id} is outside the vocabulary; expected 0 to {self.vocab_size - 1}.")
        return self._bytes[token_id]

    def _prepared(self, text: str) -> str:
        """The text as the plain processor takes it, with the space that the model puts before it."""
        if self.piece_model.normalizes:
            return self._processor.normalize(text).replace(SPACE_MARK, " ")
        text = normalize(text, self.normalization)
        if not self.writes_space_mark:
            text = text.replace(SPACE_MARK, " ")
        return f" {text}" if text and self.piece_model.dummy_prefix else text


class Pieces(Protocol):
    """What a `StreamDecoder` needs of a tokenizer."""

    @property
    def piece_model(self) -> PieceModel:
        """The vocabulary and its settings."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for."""
        ...


class StreamDecoder:
    """Decodes one id at a time, holding back bytes until they are whole characters."""

    def __init__(self, tokenizer: Pieces, *, continues: bool = False) -> None:
        """The texts together are `tokenizer.decode` of the ids; if they continue other ids, they keep a space at their beginning."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._removes_space = tokenizer.piece_model.dummy_prefix and not continues
        self._at_start = True

    def push(self, token_id: int) -> str:
        """The text that this token completes, perhaps none."""
        return self._begun(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """What is still held back, as U+FFFD; afterwards the decoder is as new."""
        text = self._begun(self._decoder.decode(b"", final=True))
        self._decoder.reset()
        self._at_start = True
        return text

    def _begun(self, text: str) -> str:
        if text and self._at_start:
            self._at_start = False
            return text.removeprefix(" ") if self._removes_space else text
        return text


def check_unicode(text: str, *, name: str) -> None:
    """Raise TokenizerError, which begins with `name`, for a text that UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"{name} holds the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which UTF-8 cannot represent; "
            "expected Unicode text, so repair or remove it."
        ) from error


def _piece_bytes(piece: Piece) -> bytes:
    if piece.kind in (CONTROL, UNKNOWN_KIND):
        return b""
    if piece.kind == BYTE:
        return bytes([int(piece.text[1:-1], 16)])
    return piece.text.replace(SPACE_MARK, " ").encode()
