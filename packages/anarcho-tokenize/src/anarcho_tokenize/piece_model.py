"""What a SentencePiece model file says of itself, read and added to without protobuf.

The file is a protobuf message. Serialised messages may be concatenated: a later single field replaces an earlier one, repeated fields
go on, and messages inside merge. So pieces are appended, and settings changed, by bytes at the end of the file.

Source of the field numbers: sentencepiece_model.proto, https://github.com/google/sentencepiece, and for the encoding
https://protobuf.dev/programming-guides/encoding/.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

NORMAL, UNKNOWN_KIND, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of pieces."""

UNIGRAM, BPE = 1, 2
"""Algorithms; 3 and 4 are words and characters."""

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_ALGORITHM, _SPACES_END_PIECES, _BYTE_FALLBACK = 3, 24, 35
_UNK_ID, _BOS_ID, _EOS_ID, _PAD_ID = 40, 41, 42, 43
_UNK_PIECE, _BOS_PIECE, _EOS_PIECE, _PAD_PIECE = 45, 46, 47, 48
_NAME, _CHARACTER_MAP, _DUMMY_PREFIX, _COLLAPSE_SPACES, _ESCAPE_SPACES = 1, 2, 3, 4, 5
_NO_ID = 2**64 - 1
"""-1, as protobuf writes it."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Piece(NamedTuple):
    """One entry of the vocabulary; U+2581 in the text is a space."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceModel:
    """The parts of a model file that decide how text is encoded."""

    pieces: tuple[Piece, ...]
    """In the order of their ids."""

    algorithm: int
    """UNIGRAM, BPE or another number."""

    byte_fallback: bool
    """Whether characters without a piece are written as bytes."""

    spaces_end_pieces: bool
    """Whether a space belongs to the word before it."""

    normalizer: str
    """Name of the normalisation; it says nothing of what is in `character_map`."""

    character_map: bytes
    """Compiled rules that replace characters; empty for none."""

    dummy_prefix: bool
    """Whether a space is put before every text."""

    collapse_spaces: bool
    """Whether spaces at both ends are removed, and runs of them made one."""

    escape_spaces: bool
    """Whether spaces are U+2581 in pieces."""

    @property
    def normalizes(self) -> bool:
        """Whether SentencePiece itself changes a text beyond the space before it."""
        return bool(self.character_map) or self.collapse_spaces


def read_model(data: bytes) -> PieceModel:
    """Read the bytes of a model file. Raises ValueError where they are no protobuf message of this kind."""
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if not isinstance(value, bytes):
            continue
        if number == _PIECES:
            pieces.append(_piece(value))
        elif number == _TRAINER:
            trainer.update(_fields(value))
        elif number == _NORMALIZER:
            normalizer.update(_fields(value))
    return PieceModel(
        pieces=tuple(pieces),
        algorithm=int(trainer.get(_ALGORITHM, UNIGRAM)),
        byte_fallback=bool(trainer.get(_BYTE_FALLBACK, 0)),
        spaces_end_pieces=bool(trainer.get(_SPACES_END_PIECES, 0)),
        normalizer=bytes(normalizer.get(_NAME, b"")).decode(errors="replace"),
        character_map=bytes(normalizer.get(_CHARACTER_MAP, b"")),
        dummy_prefix=bool(normalizer.get(_DUMMY_PREFIX, 1)),
        collapse_spaces=bool(normalizer.get(_COLLAPSE_SPACES, 1)),
        escape_spaces=bool(normalizer.get(_ESCAPE_SPACES, 1)),
    )


def bpe_model(
    pieces: Sequence[Piece],
    *,
    unknown: int,
    end: int | None,
    padding: int | None,
    begin: int | None,
    dummy_prefix: bool,
) -> bytes:
    """The bytes of a model file of the kind BPE that takes texts as they are; the numbers are ids of special pieces."""
    trainer = _field(_ALGORITHM, BPE) + _field(_BYTE_FALLBACK, int(any(piece.kind == BYTE for piece in pieces)))
    special = ((_UNK_ID, _UNK_PIECE, unknown), (_BOS_ID, _BOS_PIECE, begin), (_EOS_ID, _EOS_PIECE, end))
    for id_field, piece_field, number in (*special, (_PAD_ID, _PAD_PIECE, padding)):
        trainer += _field(id_field, _NO_ID if number is None else number)
        trainer += b"" if number is None else _field(piece_field, pieces[number].text.encode())
    normalizer = _field(_NAME, b"identity") + _field(_DUMMY_PREFIX, int(dummy_prefix)) + _field(_COLLAPSE_SPACES, 0)
    vocabulary = b"".join(_field(_PIECES, _encoded_piece(piece)) for piece in pieces)
    return vocabulary + _field(_TRAINER, trainer) + _field(_NORMALIZER, normalizer)


def appended_control(text: str) -> bytes:
    """Bytes that, at the end of a model file, append a piece that no text encodes to."""
    return _field(_PIECES, _control(text))


def appended_end_of_text(text: str, token: int) -> bytes:
    """Bytes that name the piece that ends a text, for SentencePiece's `eos_id`."""
    return _field(_TRAINER, _field(_EOS_ID, token) + _field(_EOS_PIECE, text.encode()))


def appended_padding(text: str, token: int) -> bytes:
    """Bytes that name the piece of padding, for SentencePiece's `pad_id`."""
    return _field(_TRAINER, _field(_PAD_ID, token) + _field(_PAD_PIECE, text.encode()))


def appended_normalizer_name(name: str) -> bytes:
    """Bytes that name the normalisation."""
    return _field(_NORMALIZER, _field(_NAME, name.encode()))


def appended_plain_text() -> bytes:
    """Bytes that make SentencePiece take every text as it is."""
    rules = (_field(_CHARACTER_MAP, b""), _field(_DUMMY_PREFIX, 0), _field(_COLLAPSE_SPACES, 0))
    return _field(_NORMALIZER, b"".join(rules))


def with_controls(data: bytes, texts: set[str]) -> bytes:
    """The model file with the pieces of these texts made control pieces, which no text encodes to."""
    parts = []
    for number, value in _fields(data):
        if number == _PIECES and isinstance(value, bytes) and (piece := _piece(value)).text in texts:
            value = _control(piece.text)
        parts.append(_field(number, value))
    return b"".join(parts)


def _control(text: str) -> bytes:
    return _encoded_piece(Piece(text, 0.0, CONTROL))


def _encoded_piece(piece: Piece) -> bytes:
    score = struct.pack("<Bf", _SCORE << 3 | _FIXED32, piece.score)
    return _field(_TEXT, piece.text.encode()) + score + _field(_KIND, piece.kind)


def _piece(data: bytes) -> Piece:
    values = dict(_fields(data))
    score = values.get(_SCORE, 0)
    return Piece(
        text=bytes(values.get(_TEXT, b"")).decode(),
        score=struct.unpack("<f", struct.pack("<I", score))[0] if isinstance(score, int) else 0.0,
        kind=int(values.get(_KIND, NORMAL)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field; fixed-width numbers are given as unsigned integers."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
        elif wire == _BYTES:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
            value, at = int.from_bytes(data[at : at + size], "little"), at + size
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at > end:
            raise ValueError(f"a field ends at byte {at} of {end}")
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a number has no end")


def _field(number: int, value: int | bytes) -> bytes:
    """A field of a whole number or of bytes."""
    if isinstance(value, int):
        return _encoded(number << 3 | _VARINT) + _encoded(value)
    return _encoded(number << 3 | _BYTES) + _encoded(len(value)) + value


def _encoded(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
