"""Numbers about tokenizers, for people to judge them by: how much text a token holds, and which pieces are of no use.

Fertility, tokens for each word, is counted by script, as it differs most there: Rust et al. 2021, https://arxiv.org/abs/2012.15613.
A token belongs to the words whose bytes it holds, in proportion to them, so the scripts' tokens add up to all tokens exactly.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from anarcho_tokenize.loading import AnyTokenizer
from anarcho_tokenize.piece_model import BPE, BYTE, NORMAL, UNKNOWN_KIND

# A word with the one space before it, or one character of other white space.
_PARTS = re.compile(r" ?\S+|\s")
NO_LETTERS = "no letters"
"""Script of words without a letter: numbers and signs."""
WHITE_SPACE = "white space"
"""Script of white space but the one space before a word."""


@dataclass(frozen=True, kw_only=True)
class ScriptReport:
    """How a tokenizer writes the words of one script; a word is of the script of its first letter."""

    script: str
    """`Latin`, `Cyrillic`, `Han` and so on, `no letters` or `white space`."""

    words: int
    """Texts between white space; 0 for white space itself."""

    characters: int
    """Unicode characters, with the one space before each word."""

    bytes: int
    """UTF-8 bytes of the same."""

    tokens: float
    """Tokens; one that holds bytes of several words counts for each in proportion."""

    tokens_per_word: float
    """Fertility; of little meaning for scripts without spaces."""

    bytes_per_token: float
    """How much text a token holds on average; higher is shorter."""


@dataclass(frozen=True, kw_only=True)
class TokenizerReport:
    """What `inspect_tokenizer` found."""

    sha256: str
    """Of the file tokenizer.model."""

    algorithm: str
    """`bpe` or `unigram`."""

    normalization: str
    """Normal form of Unicode that texts are brought into, `identity` for none, or the name of a foreign model's own rules."""

    vocab_size: int
    """Number of pieces."""

    special_tokens: dict[str, int]
    """Token -> id."""

    longest_pieces: tuple[str, ...]
    """The longest pieces, longest first."""

    documents: int
    """Documents that the following numbers are over."""

    bytes: int
    """Their UTF-8 bytes."""

    words: int
    """Their texts between white space."""

    tokens: int
    """Their tokens, without end-of-text."""

    bytes_per_token: float
    """How much text a token holds on average; higher is shorter."""

    tokens_per_word: float
    """Fertility, with the tokens for line breaks and other white space."""

    byte_token_share: float
    """Share of the tokens that are single bytes, for want of a piece."""

    unknown_token_share: float
    """Share of the tokens that stand for unknown characters; only of foreign models without bytes."""

    unused_pieces: int
    """Learned pieces that occur nowhere in these documents."""

    unused_examples: tuple[str, ...]
    """Some of them, those that were learned first: frequent where the pieces were learned, but not here."""

    scripts: tuple[ScriptReport, ...]
    """By script, most bytes first; without documents in which characters are unknown."""


def inspect_tokenizer(tokenizer: AnyTokenizer, documents: Iterable[str], *, longest: int = 20) -> TokenizerReport:
    """Count how a tokenizer writes some documents; `longest` is how many of the longest and of the unused pieces to list."""
    return compare_tokenizers({"": tokenizer}, documents, longest=longest)[""]


def compare_tokenizers(
    tokenizers: Mapping[str, AnyTokenizer], documents: Iterable[str], *, longest: int = 20
) -> dict[str, TokenizerReport]:
    """Count how several tokenizers, given by name, write the same documents, which are read once."""
    counts = {name: _Counts(tokenizer) for name, tokenizer in tokenizers.items()}
    num_documents = num_bytes = num_words = 0
    for document in documents:
        num_documents += 1
        num_bytes += len(document.encode())
        num_words += len(document.split())
        for count in counts.values():
            count.add(document)
    return {
        name: count.report(documents=num_documents, num_bytes=num_bytes, words=num_words, longest=longest)
        for name, count in counts.items()
    }


class _Counts:
    """What one tokenizer has made of the documents so far."""

    def __init__(self, tokenizer: AnyTokenizer) -> None:
        self._tokenizer = tokenizer
        pieces = tokenizer.piece_model.pieces
        self._kinds = np.array([piece.kind for piece in pieces])
        self._lengths = np.array([len(tokenizer.token_bytes(token)) for token in range(len(pieces))])
        self._uses = np.zeros(len(pieces), dtype=np.int64)
        self._scripts: dict[str, npt.NDArray[np.float64]] = {}
        """Script -> words, characters, bytes and tokens."""

    def add(self, document: str) -> None:
        ids = self._tokenizer.encode_array(document)
        self._uses += np.bincount(ids, minlength=len(self._uses))
        self._add_scripts(self._tokenizer.normalize(document), self._lengths[ids])

    def _add_scripts(self, text: str, lengths: npt.NDArray[np.int64]) -> None:
        if self._tokenizer.piece_model.dummy_prefix and text:
            text = f" {text}"
        parts = _PARTS.findall(text)
        ends = np.cumsum([0, *(len(part.encode()) for part in parts)])
        if not parts or ends[-1] != lengths.sum():
            return
        # How many tokens end before a byte, with the share of the one around it.
        before = np.interp(ends, np.cumsum([0, *lengths]), np.arange(len(lengths) + 1))
        scripts = np.array([_script_of_word(part) for part in parts])
        columns = np.stack([scripts != WHITE_SPACE, list(map(len, parts)), np.diff(ends), np.diff(before)])
        for script in np.unique(scripts):
            sums = columns[:, scripts == script].sum(axis=1)
            self._scripts[str(script)] = self._scripts.get(str(script), 0) + sums

    def report(self, *, documents: int, num_bytes: int, words: int, longest: int) -> TokenizerReport:
        tokenizer, model = self._tokenizer, self._tokenizer.piece_model
        tokens = int(self._uses.sum())
        learned = np.flatnonzero(self._kinds == NORMAL)
        texts = [tokenizer.token_bytes(int(token)).decode(errors="replace") for token in learned]
        unused = sorted(learned[self._uses[learned] == 0].tolist(), key=lambda token: -model.pieces[token].score)
        scripts = [_script_report(script, sums) for script, sums in self._scripts.items()]
        own_rules = model.normalizer if model.normalizes else "identity"
        return TokenizerReport(
            sha256=tokenizer.sha256,
            algorithm="bpe" if model.algorithm == BPE else "unigram",
            normalization=own_rules if tokenizer.normalization == "identity" else tokenizer.normalization,
            vocab_size=tokenizer.vocab_size,
            special_tokens=tokenizer.special_tokens,
            longest_pieces=tuple(sorted(texts, key=lambda text: (-len(text), text))[:longest]),
            documents=documents,
            bytes=num_bytes,
            words=words,
            tokens=tokens,
            bytes_per_token=_ratio(num_bytes, tokens),
            tokens_per_word=_ratio(tokens, words),
            byte_token_share=_ratio(int(self._uses[self._kinds == BYTE].sum()), tokens),
            unknown_token_share=_ratio(int(self._uses[self._kinds == UNKNOWN_KIND].sum()), tokens),
            unused_pieces=len(unused),
            unused_examples=tuple(tokenizer.token_bytes(token).decode(errors="replace") for token in unused[:longest]),
            scripts=tuple(sorted(scripts, key=lambda script: -script.bytes)),
        )


def _script_report(script: str, sums: npt.NDArray[np.float64]) -> ScriptReport:
    words, characters, size, tokens = sums.tolist()
    return ScriptReport(
        script=script,
        words=int(words),
        characters=int(characters),
        bytes=int(size),
        tokens=tokens,
        tokens_per_word=_ratio(tokens, words),
        bytes_per_token=_ratio(size, tokens),
    )


def _ratio(dividend: float, divisor: float) -> float:
    return dividend / divisor if divisor else 0.0


@lru_cache(maxsize=1 << 16)
def _script_of_word(part: str) -> str:
    if part.isspace():
        return WHITE_SPACE
    return next((_script(character) for character in part if character.isalpha()), NO_LETTERS)


@lru_cache(maxsize=1 << 14)
def _script(letter: str) -> str:
    """Script of a letter, which is the first word of its Unicode name for nearly all of them."""
    names = unicodedata.name(letter, "Unnamed").split()
    script = names[1] if names[0] in ("FULLWIDTH", "HALFWIDTH") and len(names) > 1 else names[0]
    return "Han" if script in ("CJK", "CJK-UNIFIED", "IDEOGRAPHIC") else script.partition("-")[0].capitalize()
