"""A tokenizer as the metadata of a GGUF file, in both directions: keys that begin with `tokenizer.`, and plain values.

What is notable:

* A SentencePiece model of the kind BPE is llama.cpp's "llama", with scores and kinds of pieces; a byte-level one is its "gpt2", with
  merges and the name of a pre-tokenizer, of which the four below are known. Anything else is refused.
* The metadata do not hold all: `differences` names what llama.cpp does otherwise.
* The chat template of this project is written without the block `generation`, which bare Jinja, as llama-cpp-python uses it, refuses.
* A model may have more rows than its tokenizer has tokens; the rest are unused tokens here, and dropped again when they are read.

Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; for the pre-tokenizers' patterns src/llama-vocab.cpp of llama.cpp,
and the tokenizer.json of the models that they are named after.
"""

from collections.abc import Mapping
from typing import Any

from anarcho_tokenize.bpe import Tokenizer
from anarcho_tokenize.byte_level import ByteLevelTokenizer
from anarcho_tokenize.chat import CHAT_TEMPLATE, end_of_message
from anarcho_tokenize.chat_template import template_of
from anarcho_tokenize.errors import TokenizerError
from anarcho_tokenize.loading import AnyTokenizer
from anarcho_tokenize.piece_model import BPE, CONTROL, NORMAL, UNUSED, USER_DEFINED, Piece, bpe_model
from anarcho_tokenize.symbols import END, SPACE_MARK, UNKNOWN

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_byte_level(use_regex=True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)],
    "llama-bpe": [_split(_LLAMA3), _byte_level(use_regex=False)],
    "qwen2": [_split(_QWEN2), _byte_level(use_regex=False)],
}
"""llama.cpp's name -> the steps of tokenizer.json; qwen2 also brings texts into the form NFC."""

_KEYS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Names in tokenizer_config.json -> in GGUF, without `tokenizer.ggml.` and `_token_id`."""
_TEMPLATE = "tokenizer.chat_template"
_BARE_TEMPLATE = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def tokenizer_of_fields(fields: Mapping[str, Any], *, name: str) -> AnyTokenizer:
    """The tokenizer of a GGUF file's metadata; `name` is for messages. Raises TokenizerError."""
    kind = fields.get("tokenizer.ggml.model")
    if kind not in ("llama", "gpt2"):
        raise TokenizerError(f"{name} has a tokenizer.ggml.model {kind!r}; expected 'llama' or 'gpt2'.")
    for key in ("tokens", "token_type", "scores" if kind == "llama" else "merges"):
        if not isinstance(fields.get(f"tokenizer.ggml.{key}"), list):
            raise TokenizerError(f"{name} has no list tokenizer.ggml.{key}; expected a whole tokenizer.")
    return _sentencepiece(fields, name=name) if kind == "llama" else _byte_level_of(fields, name=name)


def fields_of(tokenizer: AnyTokenizer, *, vocab_size: int) -> dict[str, Any]:
    """The metadata of a tokenizer, filled up with unused tokens to `vocab_size`. Raises TokenizerError."""
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"The model has {vocab_size} tokens; expected at least the tokenizer's {tokenizer.vocab_size}."
        )
    fields = _fields_of_bytes(tokenizer) if isinstance(tokenizer, ByteLevelTokenizer) else _fields_of_pieces(tokenizer)
    padding = range(tokenizer.vocab_size, vocab_size)
    fields["tokenizer.ggml.tokens"] += [f"[PAD{number}]" for number in padding]
    fields["tokenizer.ggml.token_type"] += [UNUSED for _ in padding]
    if "tokenizer.ggml.scores" in fields:
        fields["tokenizer.ggml.scores"] += [-1e9 for _ in padding]
    return fields


def differences(tokenizer: AnyTokenizer) -> list[str]:
    """What llama.cpp writes otherwise than the tokenizer, a sentence for each."""
    model, found = tokenizer.piece_model, []
    if isinstance(tokenizer, Tokenizer):
        if tokenizer.normalization != "identity":
            found.append(f"llama.cpp does not bring texts into the form {tokenizer.normalization}; do that before.")
        if model.normalizes:
            found.append(f"llama.cpp does not apply the tokenizer's own rules for characters ({model.normalizer}).")
        if tokenizer.writes_space_mark:
            found.append("llama.cpp takes the character U+2581 in a text for a space.")
    return found


def _sentencepiece(fields: Mapping[str, Any], *, name: str) -> Tokenizer:
    columns = (fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    pieces = [
        Piece(text.replace(" ", SPACE_MARK) if kind == USER_DEFINED else text, score, kind)
        for text, score, kind in zip(*columns, strict=True)
    ]
    while pieces and pieces[-1].kind == UNUSED and pieces[-1].text.startswith("[PAD"):
        pieces.pop()
    ids = {key: _token(fields, key) for key in _KEYS.values()}
    return Tokenizer(
        bpe_model(
            pieces,
            unknown=ids["unknown"] or 0,
            end=ids["eos"],
            padding=ids["padding"],
            # The key has to be there, and means no more than the end where no text begins with the token.
            begin=None if ids["bos"] == ids["eos"] else ids["bos"],
            dummy_prefix=bool(fields.get("tokenizer.ggml.add_space_prefix", True)),
        ),
        name=f"the tokenizer of {name}",
    )


def _fields_of_pieces(tokenizer: Tokenizer) -> dict[str, Any]:
    model = tokenizer.piece_model
    if model.algorithm != BPE:
        raise TokenizerError(
            "The tokenizer is of the kind unigram; expected bpe, the only one of SentencePiece's for GGUF."
        )
    own = tokenizer.special_tokens
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [
            # llama.cpp looks for these in the text as it is.
            piece.text.replace(SPACE_MARK, " ") if piece.kind == USER_DEFINED else piece.text
            for piece in model.pieces
        ],
        "tokenizer.ggml.scores": [float(piece.score) for piece in model.pieces],
        "tokenizer.ggml.token_type": [piece.kind for piece in model.pieces],
        "tokenizer.ggml.bos_token_id": tokenizer.eot_id if tokenizer.bos_id is None else tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eot_id,
        "tokenizer.ggml.unknown_token_id": own[UNKNOWN],
        "tokenizer.ggml.padding_token_id": tokenizer.pad_id,
        "tokenizer.ggml.eot_token_id": own[END],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": model.dummy_prefix,
        _TEMPLATE: _BARE_TEMPLATE,
    }


def _byte_level_of(fields: Mapping[str, Any], *, name: str) -> ByteLevelTokenizer:
    pre = fields.get("tokenizer.ggml.pre")
    if pre not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        raise TokenizerError(f"{name} has a tokenizer.ggml.pre {pre!r}; expected one of {known}.")
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    steps = _PRE_TOKENIZERS[pre]
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(number, text, special=kind == CONTROL)
            for number, (text, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        ],
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": {
                text: number
                for number, (text, kind) in enumerate(zip(tokens, kinds, strict=True))
                if not (kind == UNUSED and text.startswith("[PAD"))
            },
            "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
        },
    }
    ids = {key: _token(fields, gguf_key) for key, gguf_key in _KEYS.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: None if number is None else tokens[number] for key, number in ids.items()},
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", False)),
        "clean_up_tokenization_spaces": False,
        **({"chat_template": fields[_TEMPLATE]} if _TEMPLATE in fields else {}),
    }
    return ByteLevelTokenizer.of(definition, settings, name=f"the tokenizer of {name}")


def _added_token(number: int, text: str, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": text, **flags, "special": special}


def _fields_of_bytes(tokenizer: ByteLevelTokenizer) -> dict[str, Any]:
    steps = tokenizer.pre_tokenizer
    own = [step | ({"trim_offsets": True} if step.get("type") == "ByteLevel" else {}) for step in steps]
    pre = next((name for name, known in _PRE_TOKENIZERS.items() if own == known), None)
    if pre is None or (pre == "qwen2") != (tokenizer.normalization == "nfc"):
        raise TokenizerError(
            "The tokenizer's pre-tokenizer or normalizer is not known to be one of llama.cpp's; "
            f"expected one of {', '.join(_PRE_TOKENIZERS)}."
        )
    pieces = tokenizer.piece_model.pieces
    kinds = {CONTROL: CONTROL, USER_DEFINED: USER_DEFINED}
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [piece.text for piece in pieces],
        "tokenizer.ggml.token_type": [kinds.get(piece.kind, NORMAL) for piece in pieces],
        "tokenizer.ggml.merges": tokenizer.merges,
        "tokenizer.ggml.add_bos_token": bool(tokenizer.settings.get("add_bos_token", False)),
        "tokenizer.ggml.add_space_prefix": False,
    }
    for key, gguf_key in _KEYS.items():
        if (number := tokenizer.named_token(key)) is not None:
            fields[f"tokenizer.ggml.{gguf_key}_token_id"] = number
    if (end := end_of_message(tokenizer)) is not None:
        fields["tokenizer.ggml.eot_token_id"] = end
    if (template := template_of(tokenizer.settings)) is not None:
        fields[_TEMPLATE] = template
    return fields


def _token(fields: Mapping[str, Any], key: str) -> int | None:
    value = fields.get(f"tokenizer.ggml.{key}_token_id")
    return value if isinstance(value, int) and value < len(fields["tokenizer.ggml.tokens"]) else None
