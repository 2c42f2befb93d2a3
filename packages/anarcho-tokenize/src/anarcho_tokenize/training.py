"""Learns the pieces of a tokenizer from documents.

SentencePiece learns from lines (line breaks are pieces of their own) and silently drops what is too long or holds NUL; so
documents are cut into short lines first. The sample is uniform over those lines, needs no knowledge of the corpus' size, and depends on
the seed alone. Learning itself is deterministic; its number of threads is fixed, because the model file records it.
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
from anarcho_tokenize.symbols import END_OF_TEXT, LINE_BREAKS, PAD, SPACE_MARK, SPECIAL_TOKENS, UNKNOWN

_LONGEST_LINE = 1000
# NUL ends SentencePiece's strings, U+2581 is its space and U+2585 its unknown character; carriage returns end lines, too.
_LINE_ENDS = re.compile(r"[\n\r\0\u2581\u2585]+")
_PART = re.compile(rf".{{1,{_LONGEST_LINE}}}(?= |$)|.{{1,{_LONGEST_LINE}}}", re.DOTALL)
_TOO_HIGH = re.compile(r"Vocabulary size too high \(\d+\)\. Please set it to a value <= (\d+)")
_TOO_LOW = re.compile(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)")


def train_tokenizer(documents: Iterable[str], *, config: TokenizerConfig) -> Tokenizer:
    """Learn a tokenizer of exactly `config.vocab_size` pieces; equal documents and configuration give an equal file.

    Raises TokenizerError where the documents hold no text, or the vocabulary is larger or smaller than they allow.
    """
    lines = sample_lines(documents, sample_bytes=config.sample_bytes, seed=config.seed)
    if not lines:
        raise TokenizerError(
            "The documents hold no text to learn a tokenizer from; expected at least one line of text."
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **_options(config))
    except RuntimeError as error:
        raise _explain(error, config=config) from error
    return Tokenizer(model.getvalue())


def sample_lines(documents: Iterable[str], *, sample_bytes: int, seed: int) -> list[str]:
    """About `sample_bytes` bytes of lines, in the order of the documents: the lines with the smallest random numbers."""
    numbers = random.Random(seed)
    kept: list[tuple[float, int, str]] = []
    kept_bytes = 0
    for order, line in enumerate(_lines(documents)):
        heapq.heappush(kept, (-numbers.random(), order, line))
        kept_bytes += len(line.encode())
        while kept_bytes > sample_bytes and len(kept) > 1:
            kept_bytes -= len(heapq.heappop(kept)[2].encode())
    return [line for _, _, line in sorted(kept, key=lambda entry: entry[1])]


def _lines(documents: Iterable[str]) -> Iterator[str]:
    for number, document in enumerate(documents, start=1):
        check_unicode(document, name=f"Document {number}")
        for line in _LINE_ENDS.split(document):
            yield from _PART.findall(line)


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
        "user_defined_symbols": list(LINE_BREAKS),
        "max_sentence_length": 8 * _LONGEST_LINE,
        "num_threads": 1,
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
            "choose more than that, or a smaller tokenizer.character_coverage."
        )
    return TokenizerError(f"SentencePiece could not learn a tokenizer: {str(error).strip()}")
