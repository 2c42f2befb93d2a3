"""SentencePiece models from elsewhere: their own ids, the special tokens that they lack, and the same for transformers."""

import io
import os
import random
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from anarcho_tokenize import StreamDecoder, Tokenizer, TokenizerError, encode_chat, import_tokenizer
from anarcho_tokenize.piece_model import CONTROL, USER_DEFINED, read_model, with_controls

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

ODD = runpy.run_path(str(Path(__file__).with_name("odd_texts.py")))
NAMES = ["<unk>", "<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SYMBOLS = ["<think>", "</think>", "::", "\n"]
EXACT: dict[str, dict[str, object]] = {
    "llama": {"model_type": "bpe", "byte_fallback": True, **PLAIN},
    "without prefix": {
        "model_type": "bpe",
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "user_defined_symbols": SYMBOLS,
        **PLAIN,
    },
    "unigram": {"model_type": "unigram", "byte_fallback": True, "user_defined_symbols": SYMBOLS, **PLAIN},
    "phrases": {"model_type": "bpe", "byte_fallback": True, "split_by_whitespace": False, **PLAIN},
}
"""Models that leave texts as they are, and have bytes for all characters."""
LOSSY: dict[str, dict[str, object]] = {
    "bpe without bytes": {"model_type": "bpe", **PLAIN},
    "unigram without bytes": {"model_type": "unigram", **PLAIN},
    "one space for many": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
}
RULES: dict[str, dict[str, object]] = {
    "nmt_nfkc bpe": {"model_type": "bpe"},
    "nmt_nfkc unigram": {"model_type": "unigram", "byte_fallback": True},
}
"""Models with rules of their own for characters, which transformers applies to clusters of them."""
ALL = EXACT | LOSSY | RULES
TEXTS = ODD["odd_texts"](120, seed=1, extra=(*SYMBOLS, "::::", "<th"))


@pytest.fixture(scope="session")
def lines(chapters: list[str]) -> list[str]:
    found = [line for chapter in chapters[:12] for line in chapter.split("\n") if line]
    return [*found, *["日本語 <think> Привет < > 0 x A 한국어 é"] * 5]


@pytest.fixture(scope="session")
def train(lines: list[str]) -> Callable[..., bytes]:
    trained: dict[str, bytes] = {}

    def model(**options: object) -> bytes:
        if repr(options) not in trained:
            stream = io.BytesIO()
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=stream, minloglevel=2, **{"vocab_size": 900, **options}
            )
            trained[repr(options)] = stream.getvalue()
        return trained[repr(options)]

    return model


def own_ids(model: bytes, text: str) -> list[int]:
    return sentencepiece.SentencePieceProcessor(model_proto=model).encode(text)


@pytest.mark.parametrize("name", ALL)
def test_ids_are_those_of_sentencepiece(name: str, train: Callable[..., bytes], chapters: list[str]) -> None:
    model = train(**ALL[name])
    tokenizer = Tokenizer(model)
    own = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in ["", " ", "\n", "<think>", *TEXTS, *chapters[:2], "a" * 3000, "日本語の<think>" * 500]:
        if not (tokenizer.writes_space_mark and "\u2581" in text):
            assert tokenizer.encode(text) == own.encode(text), ascii(text)


@pytest.mark.parametrize("name", EXACT)
def test_models_that_leave_texts_alone_bring_every_text_back(name: str, train: Callable[..., bytes]) -> None:
    tokenizer = Tokenizer(train(**EXACT[name]))
    for text in ["", " ", "  ", "\u2581", " \u2581 ", *TEXTS]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == tokenizer.normalize(text) == text
        decoder = StreamDecoder(tokenizer)
        assert "".join(map(decoder.push, ids)) + decoder.flush() == text


@pytest.mark.parametrize("name", ["one space for many", "nmt_nfkc unigram"])
def test_models_that_change_texts_bring_the_changed_text_back(name: str, train: Callable[..., bytes]) -> None:
    tokenizer = Tokenizer(train(**ALL[name]))
    assert tokenizer.normalize("  ﬁve \u2581 ") == {"one space for many": "ﬁve", "nmt_nfkc unigram": "five"}[name]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.normalize(text)


@pytest.mark.parametrize("name", EXACT | LOSSY)
def test_transformers_gives_the_same_ids_and_texts(
    name: str, train: Callable[..., bytes], tmp_path: Path, chapters: list[str]
) -> None:
    tokenizer = Tokenizer(train(**ALL[name]))
    tokenizer.save(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ["", " ", *TEXTS, chapters[3]]:
        ids = tokenizer.encode(text)
        assert reference(text)["input_ids"] == ids, ascii(text)
        assert reference.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", RULES)
def test_transformers_gives_the_same_ids_for_usual_texts_where_a_model_has_rules(
    name: str, train: Callable[..., bytes], tmp_path: Path, chapters: list[str]
) -> None:
    tokenizer = Tokenizer(train(**ALL[name]))
    tokenizer.save(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*chapters[:3], "  ﬁve  ½\u3000naïve\ttabs\n\n日本語 한국어 Привет ", "\u2581 a \u2581"]:
        assert reference(text)["input_ids"] == tokenizer.encode(text)


def test_missing_special_tokens_are_appended_and_own_ones_are_kept(train: Callable[..., bytes]) -> None:
    model = train(**EXACT["llama"])
    tokenizer = Tokenizer(model)
    assert list(tokenizer.special_tokens) == NAMES
    assert list(tokenizer.special_tokens.values()) == [0, 2, 900, 901, 902, 903, 904]
    assert (tokenizer.eot_id, tokenizer.pad_id, tokenizer.vocab_size) == (2, 900, 905)
    assert tokenizer.decode([1, 2, 901], skip_special_tokens=False) == "<s></s><|system|>"
    assert tokenizer.decode([1, *tokenizer.encode("hi"), 2]) == "hi"
    saved = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    assert (saved.piece_size(), saved.eos_id(), saved.pad_id()) == (905, 2, 900)
    assert tokenizer.model_bytes.startswith(model)


def test_a_model_without_an_end_gets_one(train: Callable[..., bytes], tmp_path: Path) -> None:
    tokenizer = Tokenizer(train(bos_id=-1, eos_id=-1, **EXACT["llama"]))
    assert tokenizer.eot_id == 900
    assert sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes).eos_id() == 900
    tokenizer.save(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (reference.bos_token, reference.eos_token, reference.eos_token_id) == (None, "<|endoftext|>", 900)


def test_the_models_own_begin_and_end_are_those_of_transformers(train: Callable[..., bytes], tmp_path: Path) -> None:
    tokenizer = Tokenizer(train(bos_piece="<bos>", eos_piece="<eos>", **EXACT["llama"]))
    tokenizer.save(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (reference.bos_token, reference.bos_token_id) == ("<bos>", tokenizer.bos_id)
    assert (reference.eos_token, reference.eos_token_id) == ("<eos>", tokenizer.eot_id)
    assert reference("the whale")["input_ids"] == tokenizer.encode("the whale"), "neither is added to a text"


def test_special_tokens_that_text_could_spell_are_made_unreachable(train: Callable[..., bytes]) -> None:
    model = train(user_defined_symbols=["<|user|>", "<|end|>"], **EXACT["llama"])
    assert own_ids(model, "<|user|>")[-1] == 3
    tokenizer = Tokenizer(model)
    assert tokenizer.special_tokens["<|user|>"] == 3
    assert 3 not in tokenizer.encode("<|user|>")
    assert tokenizer.decode(tokenizer.encode("a<|user|>b")) == "a<|user|>b"
    kinds = {piece.text: piece.kind for piece in tokenizer.piece_model.pieces}
    assert kinds["<|user|>"] == kinds["<|end|>"] == CONTROL


@pytest.mark.parametrize("name", ALL)
def test_a_completed_model_is_its_own_completion(name: str, train: Callable[..., bytes], tmp_path: Path) -> None:
    tokenizer = Tokenizer(train(**ALL[name]))
    tokenizer.save(tmp_path)
    for again in (Tokenizer(tokenizer.model_bytes), Tokenizer.load(tmp_path), import_tokenizer(tmp_path)):
        assert again.model_bytes == tokenizer.model_bytes == (tmp_path / "tokenizer.model").read_bytes()
        assert again.sha256 == tokenizer.sha256


@pytest.mark.parametrize("name", ["llama", "unigram", "nmt_nfkc bpe"])
def test_conversations_agree_with_the_saved_template(name: str, train: Callable[..., bytes], tmp_path: Path) -> None:
    tokenizer = Tokenizer(train(**ALL[name]))
    tokenizer.save(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Where is the whale?"}, {"role": "assistant", "content": " In the sea."}]
    expected = reference.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert encode_chat(tokenizer, messages) == expected


def test_a_continuation_keeps_the_space_before_its_first_word(train: Callable[..., bytes]) -> None:
    tokenizer = Tokenizer(train(**EXACT["llama"]))
    ids = tokenizer.encode("the whale")
    assert "".join(map(StreamDecoder(tokenizer).push, ids)) == "the whale"
    assert "".join(map(StreamDecoder(tokenizer, continues=True).push, ids)) == " the whale"


def test_long_texts_without_spaces_are_cut_where_it_changes_nothing(train: Callable[..., bytes]) -> None:
    model = train(**EXACT["without prefix"])
    chance = random.Random(0)
    text = "".join(chance.choices(["ing", "the", "whale", "日", "::", "x", ",", "<think>", "qu"], k=8000))
    assert Tokenizer(model).encode(text) == own_ids(model, text)


def test_reading_and_writing_back_a_model_changes_nothing(train: Callable[..., bytes]) -> None:
    model = train(**EXACT["unigram"])
    assert with_controls(model, set()) == model
    found = read_model(model)
    own = sentencepiece.SentencePieceProcessor(model_proto=model)
    numbers = list(range(own.piece_size()))
    assert [piece.text for piece in found.pieces] == own.id_to_piece(numbers)
    assert [piece.score for piece in found.pieces] == own.get_score(numbers)
    assert [piece.text for piece in found.pieces if piece.kind == USER_DEFINED] == SYMBOLS


def test_a_directory_with_one_model_of_any_name_is_taken_over(train: Callable[..., bytes], tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(train(**EXACT["llama"]))
    assert import_tokenizer(tmp_path).vocab_size == 905
    (tmp_path / "other.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"holds 2 files that end in \.model; expected one"):
        import_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent\.model is missing"):
        import_tokenizer(tmp_path / "absent.model")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "word", "hard_vocab_limit": False}, "is a model of words or characters"),
        ({"model_type": "bpe", "treat_whitespace_as_suffix": True}, "writes spaces at the end of pieces"),
    ],
)
def test_models_that_cannot_be_taken_over_are_refused(
    options: dict[str, object], reason: str, train: Callable[..., bytes]
) -> None:
    with pytest.raises(TokenizerError, match=f"some model {reason}"):
        Tokenizer(train(**options), name="some model")
