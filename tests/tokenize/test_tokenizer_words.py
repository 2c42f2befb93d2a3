"""Encoding word by word: the ids of the whole text, in bounded memory, whatever was met before."""

import random

import numpy as np
import pytest
import sentencepiece
from anarcho_tokenize import Tokenizer, TokenizerConfig, train_tokenizer, words
from hypothesis import given, settings
from hypothesis import strategies as st

PARTS = (
    " ",
    "  ",
    "\n",
    "\n\n",
    " the",
    "the",
    "whale,",
    "“sea”",
    ".",
    "...",
    "—",
    "1851",
    "漢字",
    "\t",
    "\r",
    "é",
    "a" * 40,
    "<t>",
)


def plain(tokenizer: Tokenizer) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)


@settings(max_examples=100, deadline=None)
@given(text=st.lists(st.sampled_from(PARTS), max_size=200).map("".join))
def test_words_give_the_ids_of_the_whole(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text) == plain(tokenizer).encode(text)


@pytest.fixture(scope="module")
def mixing(chapters: list[str]) -> Tokenizer:
    """A tokenizer with a symbol that mixes letters and signs, which must not be cut between them."""
    return train_tokenizer(chapters[:3], config=TokenizerConfig(vocab_size=400, user_symbols=("<t>", "a" * 39 + ".")))


def test_letters_and_signs_are_parted_only_where_no_piece_holds_both(english: Tokenizer, mixing: Tokenizer) -> None:
    assert english._words._pattern is words._WORDS_AND_SIGNS
    assert mixing._words._pattern is words._WORDS
    text = "".join(random.Random(0).choices(PARTS, k=3000))
    for tokenizer in (english, mixing):
        assert tokenizer.encode(text) == plain(tokenizer).encode(text)


def test_forgetting_words_changes_nothing(
    english: Tokenizer, chapters: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "_REMEMBERED_CHARACTERS", 3000)
    monkeypatch.setattr(words, "_STRETCH_CHARACTERS", 500)
    forgetful = Tokenizer(english.model_bytes)
    for chapter in chapters[:8]:
        assert forgetful.encode(chapter) == plain(english).encode(chapter)
        remembered = sum(map(len, forgetful._words._young)) + sum(map(len, forgetful._words._old))
        assert remembered < 2 * (3000 + 1000)


@pytest.mark.parametrize("length", [999, 1000, 1001, 2000, 50_000])
def test_words_of_any_length_are_encoded_alike(mixed: Tokenizer, length: int) -> None:
    for alphabet in ("日本語のテキスト漢字", "abnpamx1", "a"):
        text = "".join(random.Random(length).choices(alphabet, k=length))
        if len(alphabet) > 1 or length <= 2000:
            assert mixed.encode(text) == plain(mixed).encode(text)


@pytest.mark.parametrize("alphabet", ["日本語のテキスト漢字", "abnpamx1", " a\n"])
def test_texts_are_cut_into_stretches_that_change_nothing(
    mixed: Tokenizer, alphabet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(random.Random(1).choices(alphabet, k=20_000))
    expected = plain(mixed).encode(text)
    monkeypatch.setattr(words, "_STRETCH_CHARACTERS", 50)
    assert max(map(len, mixed._words._stretches(text))) < 400
    assert mixed.encode(text) == expected


def test_arrays_are_of_int32(english: Tokenizer) -> None:
    assert english.encode_array("Call me Ishmael.").dtype == english.encode_array("").dtype == np.int32
    assert english.encode_array("").tolist() == []
