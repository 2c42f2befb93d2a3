"""Learns the pieces of a tokenizer from documents.

SentencePiece learns from lines (line breaks are pieces of their own) and silently drops what is too long or holds NUL; so
documents are cut into short lines first. The sample is uniform over those lines, needs no knowledge of the corpus' size, and depends on
the seed alone. Only what is in the sample is kept in memory. Learning itself is deterministic; the model file records the
number of threads, so files are equal for equal threads.
"""

import heapq
import io
import random
import re
from collections.abc import Iterable, Iterator
from typing import Any

import sentencepiece

from anarcho_tokenize.bpe import Tokenizer, check_unicode
from anarcho_tokenize.config import TokenizerConfig
from anarcho_tokenize.errors import TokenizerError
from anarcho_tokenize.normalization import NORMALIZER_NAMES, Form, normalize
from anarcho_tokenize.piece_model import appended_normalizer_name
from anarcho_tokenize.symbols import END_OF_TEXT, LINE_BREAKS, PAD, SPACE_MARK, SPECIAL_TOKENS, UNKNOWN

_LONGEST_LINE = 1000
# NUL ends SentencePiece's strings, U+2581 is its space and U+2585 its unknown character; carriage returns end lines, too.
_LINE_ENDS = re.compile(r"[\n\r\0\u2581\u2585]+")
_PART = re.compile(rf".{{1,{_LONGEST_LINE}}}(?= |$)|.{{1,{_LONGEST_LINE}}}", re.DOTALL)
_TOO_HIGH = re.compile(r"Vocabulary size too high \(\d+\)\. Please set it to a value <= (\d+)")
_TOO_LOW = re.compile(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)")


def train_tokenizer(documents: Iterable[str], *, config: TokenizerConfig) -> Tokenizer:
    """Learn a tokenizer of exactly `config.vocab_size` pieces; equal documents and configuration give an equal file.

    Raises TokenizerError where the documents hold no text, a symbol cannot be one, or the vocabulary is larger or smaller than they allow.
    """
    _check_symbols(config)
    texts = _scanned(documents, scan_bytes=config.scan_bytes)
    if config.sample_documents is not None:
        texts = iter(sample_documents(texts, count=config.sample_documents, seed=config.seed))
    lines = sample_lines(texts, sample_bytes=config.sample_bytes, seed=config.seed, normalization=config.normalization)
    if not lines:
        raise TokenizerError(
            "The documents hold no text to learn a tokenizer from; expected at least one line of text."
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **_options(config))
    except RuntimeError as error:
        raise _explain(error, config=config) from error
    named = b""
    if config.normalization != "identity":
        named = appended_normalizer_name(NORMALIZER_NAMES[config.normalization])
    return Tokenizer(model.getvalue() + named)


def sample_documents(documents: Iterable[str], *, count: int, seed: int) -> list[str]:
    """A uniform sample of the documents, in their order: those with the smallest random numbers."""
    numbers = random.Random(f"documents {seed}")
    kept: list[tuple[float, int, str]] = []
    for order, document in enumerate(documents):
        entry = (-numbers.random(), order, document)
        if len(kept) < count:
            heapq.heappush(kept, entry)
        elif entry > kept[0]:
            heapq.heapreplace(kept, entry)
    return [document for _, _, document in sorted(kept, key=lambda entry: entry[1])]


def sample_lines(
    documents: Iterable[str], *, sample_bytes: int, seed: int, normalization: Form = "identity"
) -> list[str]:
    """About `sample_bytes` bytes of lines, in the order of the documents: the lines with the smallest random numbers."""
    numbers = random.Random(seed)
    kept: list[tuple[float, int, str]] = []
    kept_bytes = 0
    # A line whose number is larger than that of a line which was dropped would be dropped, too.
    bound = 1.0
    for order, line in enumerate(_lines(documents, normalization)):
        number = numbers.random()
        if number >= bound:
            continue
        heapq.heappush(kept, (-number, order, line))
        kept_bytes += len(line.encode())
        while kept_bytes > sample_bytes and len(kept) > 1:
            dropped, _, text = heapq.heappop(kept)
            kept_bytes -= len(text.encode())
            bound = -dropped
    return [line for _, _, line in sorted(kept, key=lambda entry: entry[1])]


def _scanned(documents: Iterable[str], *, scan_bytes: int | None) -> Iterator[str]:
    """The documents until they are as many bytes as asked for; the one that reaches the limit is the last."""
    scanned = 0
    for number, document in enumerate(documents, start=1):
        check_unicode(document, name=f"Document {number}")
        yield document
        scanned += len(document.encode())
        if scan_bytes is not None and scanned >= scan_bytes:
            return


def _lines(documents: Iterable[str], normalization: Form) -> Iterator[str]:
    for document in documents:
        for line in _LINE_ENDS.split(normalize(document, normalization)):
            if len(line) <= _LONGEST_LINE:
                if line:
                    yield line
            else:
                yield from _PART.findall(line)


def _check_symbols(config: TokenizerConfig) -> None:
    """Raise TokenizerError for a user symbol that cannot be a piece of its own."""
    taken = {*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))}
    for symbol in config.user_symbols:
        check_unicode(symbol, name=f"The symbol {symbol!a} in tokenizer.user_symbols")
        if wrong := _wrong_with(symbol, taken, config.normalization):
            raise TokenizerError(
                f"tokenizer.user_symbols has {symbol!r}, which {wrong}; expected different texts without white space, such as '<think>'."
            )
        taken.add(symbol)


def _wrong_with(symbol: str, taken: set[str], normalization: Form) -> str | None:
    if not symbol:
        return "is empty"
    if symbol in taken:
        return "is there already"
    if any(character.isspace() or character in "\0\u2581\u2585" for character in symbol):
        return "holds white space, NUL, U+2581 or U+2585"
    if normalize(symbol, normalization) != symbol:
        return f"is not in the form tokenizer.normalization = {normalization!r}"
    return None


def _options(config: TokenizerConfig) -> dict[str, Any]:
    return {
        "model_type": "bpe",
        "vocab_size": config.vocab_size,
        "character_coverage": config.character_coverage,
        "max_sentencepiece_length": config.max_piece_length,
        "split_digits": config.split_digits,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "byte_fallback": True,
        # Without a piece for the space, byte fallback would write it as the bytes of U+2581.
        "required_chars": SPACE_MARK,
        "unk_id": 0,
        "unk_piece": UNKNOWN,
        "eos_id": 1,
        "eos_piece": END_OF_TEXT,
        "pad_id": 2,
        "pad_piece": PAD,
        "bos_id": -1,
        "control_symbols": list(SPECIAL_TOKENS[3:]),
        "user_defined_symbols": [*LINE_BREAKS, *config.user_symbols],
        "max_sentence_length": 8 * _LONGEST_LINE,
        "num_threads": config.num_threads,
        "minloglevel": 2,
    }


def _explain(error: RuntimeError, *, config: TokenizerConfig) -> TokenizerError:
    """SentencePiece's message holds the number that helps; the rest of it is about its own source."""
    if largest := _TOO_HIGH.search(str(error)):
        return TokenizerError(
            f"tokenizer.vocab_size is {config.vocab_size}, but the text supports at most {largest[1]} pieces; "
            "choose that or less, or give more text."
        )
    if smallest := _TOO_LOW.search(str(error)):
        return TokenizerError(
            f"tokenizer.vocab_size is {config.vocab_size}, but special tokens, bytes and the text's characters need {smallest[1]}; "
            "choose that or more, or a smaller tokenizer.character_coverage."
        )
    return TokenizerError(f"SentencePiece could not learn a tokenizer: {str(error).strip()}")
