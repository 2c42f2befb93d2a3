"""The tokenizer: byte-pair encoding by SentencePiece, made exact for every text that UTF-8 can hold.

What is notable:

* Text is taken as it is: no normalisation, no added or removed space. Characters without a piece are written as UTF-8 bytes.
* SentencePiece writes a space as U+2581 and reads U+2581 as a space. Here that character is encoded by its three bytes, and ids are
  decoded through a table of bytes, so `decode(encode(text)) == text` for NUL, U+2581, U+FFFD and all others.
* Cost per character grows with the length of a text, so long ones are cut where the result cannot change: behind a run of line breaks
  (whose pieces never join others) and before a space that follows another character (no learned piece holds a space behind
  anything but spaces; `Tokenizer` refuses a model of which that is not true).

Sources: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; Kudo and Richardson 2018, https://arxiv.org/abs/1808.06226.
"""

import codecs
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from anarcho_tokenize.errors import TokenizerError
from anarcho_tokenize.huggingface import tokenizer_files
from anarcho_tokenize.symbols import (
    END_OF_TEXT,
    FIRST_BYTE,
    FIRST_LEARNED,
    LINE_BREAKS,
    PAD,
    SPACE_MARK,
    SPECIAL_TOKENS,
)

MODEL_FILE = "tokenizer.model"
_CUT = re.compile(r"(?<=[^ ]) |(?<=\n)[^\n]")
_CUT_CHARACTERS = 1000
_BATCH_CHARACTERS = 4_000_000


class Tokenizer:
    """A trained tokenizer; `Tokenizer.load` reads one, `train_tokenizer` makes one."""

    def __init__(self, model: bytes, *, name: str = MODEL_FILE) -> None:
        """Take the bytes of a `tokenizer.model` that `train_tokenizer` made; `name` is for messages.

        Raises TokenizerError for anything else.
        """
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._bytes = _piece_bytes(self._processor, name=name)
        except RuntimeError as error:
            raise TokenizerError(
                f"{name} is not a SentencePiece model; expected one made by train_tokenizer."
            ) from error
        self._model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        """Of the file tokenizer.model; it names this tokenizer in shards and checkpoints."""
        self.vocab_size: int = self._processor.get_piece_size()
        self.special_tokens: dict[str, int] = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
        self.eot_id = self.special_tokens[END_OF_TEXT]
        self.pad_id = self.special_tokens[PAD]
        self._space_mark_ids = [FIRST_BYTE + byte for byte in SPACE_MARK.encode()]

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
        (folder / MODEL_FILE).write_bytes(self._model)
        for file_name, text in tokenizer_files(self._processor).items():
            (folder / file_name).write_text(text, encoding="utf-8", newline="\n")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises TokenizerError for lone surrogates, which no UTF-8 text can hold."""
        check_unicode(text, name="The text")
        return list(chain.from_iterable(self._encode_cuts(_cuts(text), num_threads=1)))

    def encode_documents(
        self, documents: Iterable[str], *, num_threads: int | None = None
    ) -> Iterator[npt.NDArray[np.int32]]:
        """Yield each document's ids, in order; SentencePiece's own threads encode (every core when not given)."""
        threads = num_threads or os.cpu_count() or 1
        for batch in _batches(documents):
            cuts = [_cuts(document) for document in batch]
            encoded = iter(self._encode_cuts(list(chain.from_iterable(cuts)), num_threads=threads))
            for document_cuts in cuts:
                yield np.array([i for _ in document_cuts for i in next(encoded)], dtype=np.int32)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids; U+FFFD stands for bytes that are not UTF-8. Special tokens are left out, or spelled if asked for."""
        parts = []
        for token in ids:
            spelled = not skip_special_tokens and 0 <= token < len(SPECIAL_TOKENS)
            parts.append(SPECIAL_TOKENS[token].encode() if spelled else self.token_bytes(token))
        return b"".join(parts).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes, not always whole characters, that a token stands for; none for a special token."""
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(f"Token id {token_id} is outside the vocabulary; expected 0 to {self.vocab_size - 1}.")
        return self._bytes[token_id]

    def _encode_cuts(self, cuts: list[str], *, num_threads: int) -> list[list[int]]:
        plain = self._processor.encode([cut.replace(SPACE_MARK, "") for cut in cuts], num_threads=num_threads)
        return [self._encode_marked(cut) if SPACE_MARK in cut else ids for cut, ids in zip(cuts, plain, strict=True)]

    def _encode_marked(self, text: str) -> list[int]:
        first, *others = self._processor.encode(text.split(SPACE_MARK))
        return first + [i for ids in others for i in (*self._space_mark_ids, *ids)]


class StreamDecoder:
    """Decodes one id at a time, holding back bytes until they are whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, perhaps none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is still held back, as U+FFFD; afterwards the decoder is as new."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def _cuts(text: str) -> list[str]:
    """Cut a text into pieces of about `_CUT_CHARACTERS` that encode as the whole does."""
    cuts, start = [], 0
    while len(text) - start > _CUT_CHARACTERS and (found := _CUT.search(text, start + _CUT_CHARACTERS)):
        cuts.append(text[start : found.start()])
        start = found.start()
    cuts.append(text[start:])
    return cuts


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for number, document in enumerate(documents, start=1):
        check_unicode(document, name=f"Document {number}")
        batch.append(document)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def check_unicode(text: str, *, name: str) -> None:
    """Raise TokenizerError, which begins with `name`, for a text that UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"{name} holds the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which UTF-8 cannot represent; "
            "expected Unicode text, so repair or remove it."
        ) from error


def _piece_bytes(processor: sentencepiece.SentencePieceProcessor, *, name: str) -> list[bytes]:
    """Bytes of each piece, in the order of ids; proves on the way that the model is one of ours."""
    pieces: Sequence[str] = processor.id_to_piece(list(range(processor.get_piece_size())))
    fixed = [*SPECIAL_TOKENS, *LINE_BREAKS, *(f"<0x{byte:02X}>" for byte in range(256))]
    for number, expected in enumerate(fixed):
        found = pieces[number] if number < len(pieces) else None
        if found != expected:
            raise TokenizerError(
                f"{name} has {found!r} as piece {number}; expected {expected!r}, as in every tokenizer that train_tokenizer makes."
            )
    learned = pieces[FIRST_LEARNED:]
    joined = next((piece for piece in learned if re.search(rf"[^{SPACE_MARK}]{SPACE_MARK}|\n", piece)), None)
    if joined is not None or SPACE_MARK not in learned:
        raise TokenizerError(
            f"{name} has the piece {joined!r} or none for a space; expected spaces to begin pieces, as train_tokenizer learns them."
        )
    none = [b""] * len(SPECIAL_TOKENS)
    text = [piece.replace(SPACE_MARK, " ").encode() for piece in learned]
    return none + [mark.encode() for mark in LINE_BREAKS] + [bytes([byte]) for byte in range(256)] + text
