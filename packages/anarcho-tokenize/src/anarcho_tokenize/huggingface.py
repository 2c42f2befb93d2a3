"""The same tokenizer for transformers, tokenizers, mlx-lm and others: `tokenizer.json` and `tokenizer_config.json`.

A SentencePiece model holds pieces with scores; Hugging Face's BPE holds ordered merges. A piece of score -k is the k-th merge, in each
of its splits into two pieces. Of two equal pieces that overlap in a text, SentencePiece joins the leftmost, a merge list the one whose
split comes first; merging in order of rank seems never to leave such a choice: over 590,000 random texts of two and three letters,
with pieces learned from texts alike, no order of the splits changed an id.

Pieces are written with a space in place of U+2581, so no normaliser is needed and a literal U+2581 falls back to bytes in both.

The one difference that remains: the text of a special token, such as `<|end|>` or `<unk>`, is that token for transformers, as
chat templates need it; for `Tokenizer.encode` it is plain text, as untrusted text needs it. Bytes that are no UTF-8 decode to U+FFFD
in both, not always in equal number.
"""

import json
from collections.abc import Iterator

import sentencepiece

from anarcho_tokenize.symbols import END_OF_TEXT, FIRST_LEARNED, PAD, SPACE_MARK, SPECIAL_TOKENS, UNKNOWN


def tokenizer_files(processor: sentencepiece.SentencePieceProcessor) -> dict[str, str]:
    """File name -> JSON text, for transformers' AutoTokenizer."""
    from anarcho_tokenize.chat import CHAT_TEMPLATE  # chat.py builds on bpe.py, which builds on this module

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "bos_token": None,
        "additional_special_tokens": list(SPECIAL_TOKENS[3:]),
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return {
        "tokenizer.json": json.dumps(_tokenizer(processor), ensure_ascii=False, indent=1) + "\n",
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
    }


def _tokenizer(processor: sentencepiece.SentencePieceProcessor) -> dict[str, object]:
    vocabulary = {
        processor.id_to_piece(number).replace(SPACE_MARK, " "): number for number in range(processor.get_piece_size())
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(number, token) for number, token in enumerate(SPECIAL_TOKENS)],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNKNOWN,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [["\n", "\n"], *_merges(processor)],
        },
    }


def _added_token(number: int, token: str) -> dict[str, object]:
    return {
        "id": number,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _merges(processor: sentencepiece.SentencePieceProcessor) -> Iterator[list[str]]:
    """Pairs of pieces in the order in which they are joined."""
    learned = range(FIRST_LEARNED, processor.get_piece_size())
    score = {processor.id_to_piece(number).replace(SPACE_MARK, " "): processor.get_score(number) for number in learned}
    for piece in sorted(score, key=lambda piece: -score[piece]):
        yield from (
            [piece[:at], piece[at:]] for at in range(1, len(piece)) if piece[:at] in score and piece[at:] in score
        )
