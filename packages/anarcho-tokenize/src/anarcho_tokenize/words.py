"""Fast exact encoding: a text is cut where no piece can join its sides, and each part is encoded once and remembered.

SentencePiece encodes a text as a whole, and the cost of a character grows with the length. But two sides of a place are encoded
independently where no piece of the vocabulary holds the two characters there next to each other: byte-pair encoding cannot merge across
it, and no path of a unigram model steps over it. For almost every model such places are before each space that follows another
character, around each run of line breaks, and between letters and signs; the pieces prove which of them a model has. So texts fall into
words, of which a long text holds few different ones: they are encoded once and remembered, in a bounded memory. Long words are cut
between any two characters that no piece holds side by side.

A unigram model adds scores up along the whole text, as 32-bit floats: in texts of some hundred thousand characters SentencePiece's sum
has lost the digits that tell close alternatives apart. Words are free of that; their ids are those of exact sums, as transformers computes.

Where characters may be unknown, runs of them are one token, so a cut must never fall between two; a space is always known.
"""

import re
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import sentencepiece

from anarcho_tokenize.piece_model import BPE, NORMAL, UNUSED, USER_DEFINED, PieceModel
from anarcho_tokenize.symbols import SPACE_MARK

_STRETCH_CHARACTERS = 1 << 17
_REMEMBERED_CHARACTERS = 1 << 20
_LONG_WORD = 1000
_SIGNS = r"\t\r!-@\[-`{-~\u00a1-\u00bf\u2010-\u205e\ufeff"
_WORDS_AND_SIGNS = re.compile(rf" *+[^ \n{_SIGNS}]++| *+[{_SIGNS}]++| ++|\n++")
_WORDS = re.compile(r" *+[^ \n]++| ++|\n++")
_WORDS_WITH_LINES = re.compile(r" *+[^ ]++| ++")
_NEXT_WORD = re.compile(r"(?<=[^ ]) |(?<=\n)[^\n]")
_NEXT_SPACE = re.compile(r"(?<=[^ ]) ")
_MIXES_SIGNS = re.compile(rf"[{_SIGNS}][^{_SIGNS}]|[^{_SIGNS}{SPACE_MARK}][{_SIGNS}]")


class WordEncoder:
    """Encodes texts, and remembers the words that it has met lately."""

    def __init__(
        self, processor: sentencepiece.SentencePieceProcessor, model: PieceModel, *, space_mark: Sequence[int] | None
    ) -> None:
        """`processor` takes texts as they are. `space_mark` are the ids for U+2581; None where texts hold none."""
        self._processor = processor
        self._space_mark = None if space_mark is None else _packed(space_mark)
        texts = [piece.text for piece in model.pieces if piece.kind in (NORMAL, USER_DEFINED, UNUSED)]
        self._pattern = _word_pattern(texts, byte_fallback=model.byte_fallback)
        self._pairs: set[tuple[str, str]] = set()
        self._cuts_words = model.byte_fallback and model.algorithm == BPE
        if self._cuts_words:
            self._pairs.update(pair for text in texts for pair in pairwise(text))
        # Two generations: where the young one is full it becomes the old one, from which words that come again return.
        self._young: dict[str, bytes] = {}
        self._old: dict[str, bytes] = {}
        self._young_characters = 0

    def encode(self, text: str, *, num_threads: int = 1) -> npt.NDArray[np.int32]:
        """Ids of a text; words that are not remembered are encoded by so many threads."""
        ids = bytearray()
        for stretch in self._stretches(text):
            words = [stretch] if self._pattern is None else self._pattern.findall(stretch)
            if self._young_characters > _REMEMBERED_CHARACTERS:
                self._old, self._young, self._young_characters = self._young, {}, 0
            if new := set(words).difference(self._young):
                self._learn(new, num_threads=num_threads)
            ids += b"".join(map(self._young.__getitem__, words))
        return np.frombuffer(ids, dtype=np.int32)

    def _learn(self, words: set[str], *, num_threads: int) -> None:
        """Put words into the young generation."""
        self._young_characters += sum(map(len, words))
        unknown = []
        for word in words:
            if (ids := self._old.get(word)) is not None:
                self._young[word] = ids
            elif len(word) > _LONG_WORD or (SPACE_MARK in word and self._space_mark is not None):
                self._young[word] = self._encoded_in_parts(word)
            else:
                unknown.append(word)
        # Lists of ids and `array` are quicker for short words than SentencePiece's NumPy arrays.
        encoded = self._processor.encode(unknown, num_threads=num_threads if len(unknown) > 100 else 1)
        self._young.update(zip(unknown, map(_packed, encoded), strict=True))

    def _encoded_in_parts(self, word: str) -> bytes:
        between = self._space_mark
        parts = [word] if between is None else word.split(SPACE_MARK)
        encoded = (b"".join(map(_packed, self._processor.encode(list(self._cuts(part))))) for part in parts)
        return (between or b"").join(encoded)

    def _cuts(self, word: str) -> Iterator[str]:
        """Cut a long word, such as a line of a script without spaces."""
        start = 0
        while start < len(word):
            end = self._next_cut(word, start + _LONG_WORD)
            yield word[start:end]
            start = end

    def _next_cut(self, text: str, at: int) -> int:
        """The first place from `at` on between characters that no piece holds side by side, or the end."""
        if not self._cuts_words:
            return len(text)
        while at < len(text) and (_marked(text[at - 1]), _marked(text[at])) in self._pairs:
            at += 1
        return min(at, len(text))

    def _stretches(self, text: str) -> Iterator[str]:
        """Parts of a text that are made of whole words, so that never all words of a long one are in memory."""
        start = 0
        while start < len(text):
            end = self._stretch_end(text, start + _STRETCH_CHARACTERS)
            yield text[start:end]
            start = end

    def _stretch_end(self, text: str, at: int) -> int:
        if at >= len(text):
            return len(text)
        if self._pattern is not None:
            next_word = _NEXT_SPACE if self._pattern is _WORDS_WITH_LINES else _NEXT_WORD
            # A longer word is cut as long words are, if that is possible.
            limit = at + _STRETCH_CHARACTERS if self._cuts_words else len(text)
            if found := next_word.search(text, at, limit):
                return found.start()
        return self._next_cut(text, at)


def _marked(character: str) -> str:
    return SPACE_MARK if character == " " else character


def _packed(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()


def _word_pattern(texts: Sequence[str], *, byte_fallback: bool) -> re.Pattern[str] | None:
    """How texts may be cut into words; None for not at all."""
    known = set(texts)
    if SPACE_MARK not in known or any(re.search(rf"[^{SPACE_MARK}]{SPACE_MARK}", text) for text in texts):
        return None
    if not (byte_fallback or "\n" in known) or any("\n" in text and text.strip("\n") for text in texts):
        return _WORDS_WITH_LINES
    if not byte_fallback or any(map(_MIXES_SIGNS.search, texts)):
        return _WORDS
    return _WORDS_AND_SIGNS
