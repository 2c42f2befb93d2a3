"""Encoding and decoding: exact for every text, independent of threads and of where long texts are cut."""

import random
import sys
from pathlib import Path

import pytest
import sentencepiece
from anarcho_tokenize import StreamDecoder, Tokenizer, TokenizerError
from hypothesis import given, settings
from hypothesis import strategies as st

SPECIAL = ["<unk>", "<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEXTS = st.one_of(st.text(), st.text(alphabet=" \n\r\t\u2581\u2585\ufffd\ufeff\0aA1<|>é漢😀"))


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_every_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_every_unicode_character_round_trips(tokenizer: Tokenizer) -> None:
    points = [point for point in range(sys.maxunicode + 1) if not 0xD800 <= point <= 0xDFFF]
    text = "".join(map(chr, [*points[:0x3000], *points[0x3000::17]]))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["", "\0", "\u2581", "a\u2581b", " \u2581 ", "\u2581\u2581", "\ufffd", "\x1b[0m\x7f\x85", "\ud7ff\ue000"]
)
def test_awkward_texts_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_space_mark_is_written_as_its_bytes_and_space_is_not(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("\u2581")] == [b"\xe2", b"\x96", b"\x81"]
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode(" ")] == [b" "]


@pytest.mark.parametrize("token", SPECIAL)
def test_text_that_spells_a_special_token_stays_text(tokenizer: Tokenizer, token: str) -> None:
    ids = tokenizer.encode(f"a{token}b")
    assert min(ids) >= len(SPECIAL)
    assert tokenizer.decode(ids) == f"a{token}b"


def test_special_tokens_have_the_fixed_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.special_tokens == {token: number for number, token in enumerate(SPECIAL)}
    assert (tokenizer.eot_id, tokenizer.pad_id) == (1, 2)


def test_special_tokens_decode_to_nothing_unless_asked_for(tokenizer: Tokenizer) -> None:
    ids = [4, *tokenizer.encode("hi"), 6]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|user|>hi<|end|>"
    assert tokenizer.token_bytes(1) == b""


def test_line_breaks_are_one_token_each_or_in_pairs(tokenizer: Tokenizer) -> None:
    assert [len(tokenizer.encode("\n" * count)) for count in range(1, 6)] == [1, 1, 2, 2, 3]


def test_digits_are_tokens_of_their_own(english: Tokenizer) -> None:
    assert [english.token_bytes(i) for i in english.encode("1851")] == [b"1", b"8", b"5", b"1"]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_cutting_long_texts_changes_nothing(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    words = [
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "the",
        " the",
        "banana",
        "ananas",
        "x",
        " whale",
        ".",
        "1000",
        "漢",
        "\t",
        "aaaaaaa",
    ]
    text = "".join(random.Random(seed).choices(words, k=3000))
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save(folder)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert tokenizer.encode(text) == plain.encode(text)


def test_text_without_any_place_to_cut_is_encoded(tokenizer: Tokenizer) -> None:
    text = "banana" * 2000
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_documents_keep_their_order_for_any_number_of_threads(
    english: Tokenizer, chapters: list[str], num_threads: int
) -> None:
    documents = ["", *chapters[:12], "\u2581 x", ""]
    encoded = [ids.tolist() for ids in english.encode_documents(documents, num_threads=num_threads)]
    assert encoded == [english.encode(document) for document in documents]


def test_documents_are_read_lazily_but_all_of_them(english: Tokenizer) -> None:
    assert len(list(english.encode_documents(iter(["a", "b", "c"])))) == 3
    assert list(english.encode_documents([])) == []


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, data=st.data())
def test_streamed_text_equals_the_whole(tokenizer: Tokenizer, text: str, data: st.DataObject) -> None:
    ids = tokenizer.encode(text)
    ids = ids[: data.draw(st.integers(0, len(ids)))]
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(i) for i in ids]
    assert "".join(parts) + decoder.flush() == tokenizer.decode(ids)


def test_streaming_holds_back_unfinished_characters(english: Tokenizer) -> None:
    decoder = StreamDecoder(english)
    assert [decoder.push(i) for i in english.encode("😀")] == ["", "", "", "😀"]
    assert decoder.push(english.encode("😀")[0]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


@pytest.mark.parametrize("text", ["ab\ud800c", "\udfff"])
def test_lone_surrogates_are_refused_by_name(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(
        TokenizerError, match=r"lone surrogate U\+D(800|FFF) at character [02], which UTF-8 cannot represent"
    ):
        tokenizer.encode(text)
    with pytest.raises(TokenizerError, match="Document 2 holds the lone surrogate"):
        list(tokenizer.encode_documents(["fine", text]))


@pytest.mark.parametrize("token", [-1, 10**6])
def test_ids_outside_the_vocabulary_are_refused(english: Tokenizer, token: int) -> None:
    with pytest.raises(TokenizerError, match=rf"Token id {token} is outside the vocabulary; expected 0 to 1023"):
        english.decode([token])


def test_saved_tokenizer_loads_equal_from_file_and_directory(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "deep" / "folder")
    for path in (tmp_path / "deep" / "folder", str(tmp_path / "deep" / "folder" / "tokenizer.model")):
        loaded = Tokenizer.load(path)
        assert (loaded.sha256, loaded.vocab_size) == (tokenizer.sha256, tokenizer.vocab_size)
        assert loaded.encode("the white whale") == tokenizer.encode("the white whale")


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model is missing"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x80\x04\x95pickle"])
def test_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        Tokenizer.load(file)


def test_truncated_model_is_refused(english: Tokenizer, tmp_path: Path) -> None:
    english.save(tmp_path)
    file = tmp_path / "tokenizer.model"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(TokenizerError):
        Tokenizer.load(file)
