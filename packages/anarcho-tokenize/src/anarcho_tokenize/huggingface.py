"""The same tokenizer for transformers, tokenizers, mlx-lm and others: `tokenizer.json` and `tokenizer_config.json`.

A SentencePiece model holds pieces with scores; Hugging Face's BPE holds ordered merges. A piece of the k-th best score is the k-th
merge, in each of its splits into two pieces. Of two equal pieces that overlap in a text, SentencePiece joins the leftmost, a merge list
the one whose split comes first; merging in order of rank seems never to leave such a choice: over 590,000 random texts of two and
three letters, with pieces learned from texts alike, no order of the splits changed an id.

Pieces are written with a space in place of U+2581, so a literal U+2581 falls back to bytes in both. Pieces that a user defined are added
tokens that are not special. A unigram model has no such tokens: SentencePiece gives those pieces a score that always wins, and so it
stands in `tokenizer.json`. Transformers' unigram model would read the text `<0x0A>` as that byte, so such a text is cut behind its `<`.

What differs:

* The text of a special token, such as `<|end|>` or `<unk>`, is that token for transformers, as chat templates need it; for
  `Tokenizer.encode` it is plain text, as untrusted text needs it. A space before every text is then also put before the rest.
* Bytes that are no UTF-8 decode to U+FFFD in both, not always in equal number.
* Foreign models with rules of their own for characters (nmt_nfkc and the like): transformers applies the same rules to clusters of
  characters, which gives other text for some rare combinations, mostly of combining marks and Korean letters.
* Foreign models of the kind BPE with pieces of equal score, with pieces that are marked as unused, or with user-defined pieces and
  a space before every text, where a text is one such piece and nothing else. Of the kind unigram with a piece that holds `<0`.
"""

import base64
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from anarcho_tokenize.piece_model import BPE, BYTE, CONTROL, NORMAL, UNKNOWN_KIND, USER_DEFINED, Piece, PieceModel
from anarcho_tokenize.symbols import END_OF_TEXT, PAD, SPACE_MARK, UNKNOWN

if TYPE_CHECKING:
    from anarcho_tokenize.bpe import Tokenizer


def tokenizer_files(tokenizer: "Tokenizer") -> dict[str, str]:
    """File name -> JSON text, for transformers' AutoTokenizer."""
    from anarcho_tokenize.chat import CHAT_TEMPLATE  # chat.py builds on bpe.py, which builds on this module

    pieces = tokenizer.piece_model.pieces
    special = {name: pieces[token].text for name, token in tokenizer.special_tokens.items()}
    begin = None if tokenizer.bos_id is None else pieces[tokenizer.bos_id].text
    named = {special[END_OF_TEXT], special[PAD], special[UNKNOWN], begin}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": special[END_OF_TEXT],
        "pad_token": special[PAD],
        "unk_token": special[UNKNOWN],
        "bos_token": begin,
        "additional_special_tokens": [piece.text for piece in pieces if _is_special(piece) and piece.text not in named],
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return {
        "tokenizer.json": json.dumps(_tokenizer(tokenizer), ensure_ascii=False, indent=1) + "\n",
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
    }


def _tokenizer(tokenizer: "Tokenizer") -> dict[str, Any]:
    model = tokenizer.piece_model
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(number, piece)
            for number, piece in enumerate(model.pieces)
            if _is_special(piece) or (piece.kind == USER_DEFINED and model.algorithm == BPE)
        ],
        "normalizer": _normalizer(tokenizer),
        "pre_tokenizer": _pre_tokenizer(model),
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": list(_decoders(model))},
        "model": _bpe(tokenizer) if model.algorithm == BPE else _unigram(tokenizer),
    }


def _is_special(piece: Piece) -> bool:
    return piece.kind in (CONTROL, UNKNOWN_KIND)


def _is_text(piece: Piece) -> bool:
    return not _is_special(piece) and piece.kind != BYTE


def _text(piece: Piece) -> str:
    return piece.text.replace(SPACE_MARK, " ") if _is_text(piece) else piece.text


def _added_token(number: int, piece: Piece) -> dict[str, Any]:
    special = _is_special(piece)
    return {
        "id": number,
        "content": _text(piece),
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        # User-defined pieces are found in the normalised text, as SentencePiece finds them.
        "normalized": not special,
        "special": special,
    }


def _normalizer(tokenizer: "Tokenizer") -> dict[str, Any] | None:
    """What happens to a text before it is cut into pieces, in SentencePiece's order."""
    model = tokenizer.piece_model
    steps: list[dict[str, Any]] = []
    if tokenizer.normalization != "identity":
        steps.append({"type": tokenizer.normalization.upper()})
    if model.character_map:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.character_map).decode()})
    if model.collapse_spaces:
        steps += [_replace(r"\A +", ""), _replace(" {2,}", " ")]
    if not tokenizer.writes_space_mark:
        steps.append(_replace(SPACE_MARK, " "))
    if model.collapse_spaces:
        steps.append(_replace(r" +\z", ""))
    if model.dummy_prefix:
        steps.append(_space_before(model))
    return {"type": "Sequence", "normalizers": steps} if steps else None


def _space_before(model: PieceModel) -> dict[str, Any]:
    """Puts a space before a text, but not before a user-defined piece, which transformers normalises, too."""
    own = [re.escape(_text(piece)) for piece in model.pieces if piece.kind == USER_DEFINED]
    if not own or model.algorithm != BPE:
        return {"type": "Prepend", "prepend": " "}
    return _replace(rf"\A(?=[\s\S])(?!(?:{'|'.join(own)})\z)", " ")


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _pre_tokenizer(model: PieceModel) -> dict[str, Any] | None:
    """Keeps the spelling of a byte's piece from being found whole in a text, where no piece lies across the cut."""
    if (
        model.algorithm == BPE
        or not model.byte_fallback
        or any("<0" in piece.text for piece in model.pieces if _is_text(piece))
    ):
        return None
    pattern = {"Regex": "<(?=0x[0-9A-F]{2}>)"}
    return {"type": "Split", "pattern": pattern, "behavior": "MergedWithPrevious", "invert": False}


def _decoders(model: PieceModel) -> Iterator[dict[str, Any]]:
    if model.byte_fallback:
        yield {"type": "ByteFallback"}
    yield {"type": "Fuse"}
    if model.dummy_prefix:
        yield {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _bpe(tokenizer: "Tokenizer") -> dict[str, Any]:
    model = tokenizer.piece_model
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.pieces[tokenizer.special_tokens[UNKNOWN]].text,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": {_text(piece): number for number, piece in enumerate(model.pieces)},
        "merges": list(_merges(model)),
    }


def _merges(model: PieceModel) -> Iterator[list[str]]:
    """Pairs of pieces in the order in which they are joined."""
    score = {_text(piece): piece.score for piece in model.pieces if piece.kind == NORMAL}
    for piece in sorted(score, key=lambda piece: -score[piece]):
        yield from (
            [piece[:at], piece[at:]] for at in range(1, len(piece)) if piece[:at] in score and piece[at:] in score
        )


def _unigram(tokenizer: "Tokenizer") -> dict[str, Any]:
    model = tokenizer.piece_model
    scores = [piece.score for piece in model.pieces if piece.kind == NORMAL]
    vocabulary = [
        [_text(piece), len(piece.text.encode()) * max(scores) - 0.1 if piece.kind == USER_DEFINED else piece.score]
        for piece in model.pieces
    ]
    return {
        "type": "Unigram",
        "unk_id": tokenizer.special_tokens[UNKNOWN],
        "vocab": vocabulary,
        "byte_fallback": model.byte_fallback,
    }
