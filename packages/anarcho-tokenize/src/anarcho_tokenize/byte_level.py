"""Tokenizers of byte-level byte-pair encoding, those of GPT-2, Llama 3, Qwen and SmolLM, with the interface of `Tokenizer`.

What is notable:

* The work is done by the library `tokenizers` (extra `byte-level`), from a tokenizer.json as it is; this module adds what training
  needs: special tokens that no text yields, exact bytes of each token, masks of conversations, a file for worker processes.
* A token stands for bytes, written with one visible character each. So any text comes back, except for bytes that a vocabulary lacks
  (some have none for the rarest of UTF-8): characters that hold one are lost in part.
* Long texts are encoded in stretches, cut before a space between two letters of ASCII: no pattern of the known pre-tokenizers joins or
  looks over that place.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", and its code for the visible characters,
https://github.com/openai/gpt-2/blob/master/src/encoder.py.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anarcho_tokenize.bpe import check_unicode
from anarcho_tokenize.chat_format import CHATML_END, ChatFormat, chat_format_of, is_chatml
from anarcho_tokenize.chat_template import ChatTemplate, template_of
from anarcho_tokenize.errors import TokenizerError
from anarcho_tokenize.normalization import Form
from anarcho_tokenize.piece_model import BPE, BYTE, CONTROL, NORMAL, USER_DEFINED, Piece, PieceModel
from anarcho_tokenize.spelling import Spellings
from anarcho_tokenize.symbols import END, END_OF_TEXT, PAD, UNKNOWN

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
_STRETCH_CHARACTERS = 1 << 17
_CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")
_DOCUMENTS_AT_ONCE = 256
_ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>")


class ByteLevelTokenizer:
    """A tokenizer from a tokenizer.json; `load_tokenizer` reads one or the other kind."""

    def __init__(self, model: bytes, *, name: str = TOKENIZER_FILE) -> None:
        """Take `model_bytes` of another one; `name` is for messages. Raises TokenizerError for anything else."""
        files = _read_object(model, name=name)
        if not all(isinstance(files.get(key), str) for key in (TOKENIZER_FILE, CONFIG_FILE)):
            raise TokenizerError(
                f"{name} is no byte-level tokenizer; expected the texts of {TOKENIZER_FILE} and {CONFIG_FILE}."
            )
        self.model_bytes = model
        """All that another process needs to make this tokenizer: the texts of tokenizer.json and tokenizer_config.json."""
        self.sha256 = hashlib.sha256(model).hexdigest()
        """Of `model_bytes`; it names this tokenizer in shards and checkpoints."""
        self.files: dict[str, str] = {key: files[key] for key in (TOKENIZER_FILE, CONFIG_FILE)}
        self.definition = _read_object(self.files[TOKENIZER_FILE], name=name)
        """What tokenizer.json holds."""
        self.settings = _read_object(self.files[CONFIG_FILE], name=f"{CONFIG_FILE} of {name}")
        """What tokenizer_config.json holds, the chat template with it."""
        _check(self.definition, name=name)
        self._tokenizer = _make(self.files[TOKENIZER_FILE], name=name)
        pieces = _pieces(self.definition)
        self.vocab_size = len(pieces)
        self.normalization: Form = "nfc" if _normalizer_type(self.definition) == "NFC" else "identity"
        self.piece_model = _piece_model(pieces, self.normalization)
        """The vocabulary, as for a SentencePiece model: without byte fallback, and with no rules of its own."""
        self._bytes = [_piece_bytes(piece) for piece in pieces]
        self._ids = {piece.text: number for number, piece in enumerate(pieces)}
        self.eos_id = self.named_token("eos_token")
        """The token that the model ends with, in a chat often the end of a message."""
        ends = [self._ids[text] for text in _ENDS_OF_TEXT if text in self._ids]
        if not ends and self.eos_id is None:
            raise TokenizerError(f"{name} names no eos_token in its {CONFIG_FILE}; expected a token that ends a text.")
        self.eot_id = ends[0] if ends else int(self.eos_id or 0)
        pad = self.named_token("pad_token")
        self.pad_id = self.eot_id if pad is None else pad
        self.bos_id = self.named_token("bos_token")
        """The begin-of-text token; it is never added to a text."""
        tokens = [piece.text for piece in pieces if piece.kind == USER_DEFINED]
        self._may_cut = not any(" " in token for token in tokens)
        self.special_tokens = self._special_tokens(pieces)
        """Name -> id: the vocabulary's own, and those of `symbols` that have a counterpart here."""
        self.spellings = Spellings(self.piece_model, added_tokens=self.definition.get("added_tokens") or ())
        """Finds special tokens in what a template wrote."""
        self.chat_format = self._chat_format(name)
        """How conversations are written; None where that is not known."""

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ByteLevelTokenizer":
        """Read a tokenizer.json and the tokenizer_config.json beside it, or those in a directory.

        Raises FileNotFoundError or TokenizerError.
        """
        file = Path(path)
        file = file / TOKENIZER_FILE if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; expected a {TOKENIZER_FILE}.")
        settings = file.with_name(CONFIG_FILE)
        values = _read_object(settings.read_bytes(), name=str(settings)) if settings.is_file() else {}
        template = file.with_name("chat_template.jinja")
        if template.is_file():
            values["chat_template"] = template.read_text(encoding="utf-8")
        return cls.of(_read_object(file.read_bytes(), name=str(file)), values, name=str(file))

    @classmethod
    def of(
        cls, definition: dict[str, Any], settings: dict[str, Any], *, name: str = TOKENIZER_FILE
    ) -> "ByteLevelTokenizer":
        """The tokenizer of what tokenizer.json and tokenizer_config.json hold."""
        texts = {
            TOKENIZER_FILE: json.dumps(definition, ensure_ascii=False, indent=1) + "\n",
            CONFIG_FILE: json.dumps(settings, ensure_ascii=False, indent=2) + "\n",
        }
        return cls(json.dumps(texts).encode(), name=name)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json (with the chat template)."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        for file_name, text in self.files.items():
            (folder / file_name).write_text(text, encoding="utf-8", newline="\n")

    def normalize(self, text: str) -> str:
        """The text that `decode(encode(text))` gives back."""
        normalizer = self._tokenizer.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises TokenizerError for lone surrogates, which no UTF-8 text can hold."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> npt.NDArray[np.int32]:
        """Token ids of a text, without a Python object for each: for long texts."""
        check_unicode(text, name="The text")
        parts = [
            np.array(self._tokenizer.encode(stretch, add_special_tokens=False).ids, dtype=np.int32)
            for stretch in self._stretches(text)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def encode_documents(
        self, documents: Iterable[str], *, num_threads: int | None = None
    ) -> Iterator[npt.NDArray[np.int32]]:
        """Yield each document's ids, in order; `num_threads` is there for the interface, the library takes every core."""
        for document in documents:
            yield self.encode_array(document)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids; U+FFFD stands for bytes that are not UTF-8. Special tokens are left out, or spelled if asked for."""
        pieces = self.piece_model.pieces
        parts = [
            pieces[token].text.encode()
            if not skip_special_tokens and 0 <= token < self.vocab_size and pieces[token].kind == CONTROL
            else self.token_bytes(token)
            for token in ids
        ]
        return b"".join(parts).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes, not always whole characters, that a token stands for; none for a special token."""
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(f"Token id {token_id} is outside the vocabulary; expected 0 to {self.vocab_size - 1}.")
        return self._bytes[token_id]

    def named_token(self, key: str) -> int | None:
        """Id of a token that tokenizer_config.json names, as a text or an object."""
        value = self.settings.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        return self._ids.get(text) if isinstance(text, str) else None

    @property
    def pre_tokenizer(self) -> list[dict[str, Any]]:
        """The steps that cut a text into words, as in tokenizer.json."""
        return _steps_of(self.definition["pre_tokenizer"])

    @property
    def merges(self) -> list[str]:
        """The merges in their order, each as two tokens with a space between."""
        return [merge if isinstance(merge, str) else " ".join(merge) for merge in self.definition["model"]["merges"]]

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """The ids that transformers puts before and behind a text, unless it is told to add no special tokens."""
        if "add_bos_token" in self.settings or "add_eos_token" in self.settings:
            named = [("add_bos_token", self.bos_id), ("add_eos_token", self.eos_id)]
            before, behind = ([token] if self.settings.get(key) and token is not None else [] for key, token in named)
            return before, behind
        plain = self._tokenizer.encode("x", add_special_tokens=False).ids
        framed = self._tokenizer.encode("x", add_special_tokens=True).ids
        start = next(at for at in range(len(framed)) if framed[at : at + len(plain)] == plain)
        return framed[:start], framed[start + len(plain) :]

    def _chat_format(self, name: str) -> ChatFormat | ChatTemplate | None:
        template = template_of(self.settings)
        if template is None or is_chatml(template):
            return chat_format_of(self.special_tokens, self.encode)
        keys = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
        pieces = self.piece_model.pieces
        named = {key: pieces[token].text for key in keys if (token := self.named_token(key)) is not None}
        return ChatTemplate(
            template,
            tokenizer=self,
            spellings=self.spellings,
            special_tokens=named,
            name=f"The chat template of {name}",
        )

    def _stretches(self, text: str) -> Iterator[str]:
        start = 0
        while self._may_cut and len(text) - start > _STRETCH_CHARACTERS:
            cut = _CUT.search(text, start + _STRETCH_CHARACTERS)
            if cut is None:
                break
            yield text[start : cut.start()]
            start = cut.start()
        yield text[start:] if start else text

    def _special_tokens(self, pieces: list[Piece]) -> dict[str, int]:
        own = {piece.text: number for number, piece in enumerate(pieces) if piece.kind == CONTROL}
        unknown = self.named_token("unk_token")
        named = {END_OF_TEXT: self.eot_id, PAD: self.pad_id, UNKNOWN: self.eot_id if unknown is None else unknown}
        if CHATML_END in own:
            named[END] = own[CHATML_END]
        return {**named, **own}


def _read_object(data: bytes | str, *, name: str) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except ValueError as error:
        raise TokenizerError(f"{name} is not valid JSON ({error}); expected an object.") from error
    if not isinstance(values, dict):
        raise TokenizerError(f"{name} holds {type(values).__name__}; expected an object.")
    return values


def _make(definition: str, *, name: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise TokenizerError(f"{name} needs tokenizers to be read; install anarcho-tokenize[byte-level].") from error
    try:
        tokenizer = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the library raises nothing more specific
        raise TokenizerError(f"{name} cannot be read by tokenizers ({error}).") from error
    tokenizer.encode_special_tokens = True  # the spelling of a special token in a text is text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check(definition: dict[str, Any], *, name: str) -> None:
    """Raise TokenizerError for what is no byte-level encoding, or not one that brings texts back."""
    model = definition.get("model") or {}
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise TokenizerError(f"{name} holds a model of type {model.get('type')!r}; expected byte-level 'BPE'.")
    byte_levels = [part for part in _steps_of(definition.get("pre_tokenizer")) if part.get("type") == "ByteLevel"]
    if len(byte_levels) != 1 or model.get("byte_fallback"):
        raise TokenizerError(f"{name} has no pre-tokenizer of type 'ByteLevel'; expected a byte-level encoding.")
    if byte_levels[0].get("add_prefix_space"):
        raise TokenizerError(f"{name} puts a space before every text; expected add_prefix_space false.")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise TokenizerError(f"{name} has {key} {model[key]!r}; expected none.")
    if _normalizer_type(definition) not in (None, "NFC"):
        raise TokenizerError(
            f"{name} has a normalizer of type {_normalizer_type(definition)!r}; expected none or 'NFC'."
        )


def _steps_of(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer or normaliser, whether it is one or a sequence."""
    if not part:
        return []
    return part.get("pretokenizers") or part.get("normalizers") or [part]


def _normalizer_type(definition: dict[str, Any]) -> str | None:
    steps = _steps_of(definition.get("normalizer"))
    return "+".join(str(step.get("type")) for step in steps) or None


def _pieces(definition: dict[str, Any]) -> list[Piece]:
    """The vocabulary in the order of its ids; ids without a token are control pieces, which no text encodes to."""
    vocab: dict[str, int] = definition["model"]["vocab"]
    added = {token["id"]: token for token in definition.get("added_tokens") or ()}
    size = 1 + max([*vocab.values(), *added], default=-1)
    pieces = [Piece(f"[unused {number}]", 0.0, CONTROL) for number in range(size)]
    for text, number in vocab.items():
        single = len(text) == 1 and text in _BYTE_OF and _BYTE_OF[text] > 0x7F
        pieces[number] = Piece(text, -float(number), BYTE if single else NORMAL)
    for number, token in added.items():
        pieces[number] = Piece(token["content"], 0.0, CONTROL if token.get("special") else USER_DEFINED)
    return pieces


def _piece_model(pieces: list[Piece], normalizer: str) -> PieceModel:
    return PieceModel(
        pieces=tuple(pieces),
        algorithm=BPE,
        byte_fallback=False,
        spaces_end_pieces=False,
        normalizer=normalizer,
        character_map=b"",
        dummy_prefix=False,
        collapse_spaces=False,
        escape_spaces=False,
    )


def _piece_bytes(piece: Piece) -> bytes:
    if piece.kind == CONTROL:
        return b""
    if piece.kind == USER_DEFINED:
        return piece.text.encode()
    return b"".join(bytes([_BYTE_OF[letter]]) if letter in _BYTE_OF else letter.encode() for letter in piece.text)


def _visible_characters() -> dict[str, int]:
    """Character -> the byte that it stands for: itself where it is visible, else one of those from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTE_OF = _visible_characters()
