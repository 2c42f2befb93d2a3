"""Normal forms: those of `tokenizers`, the same for every version of Python, and part of the saved tokenizer."""

import os
import runpy
import sys
import unicodedata
from pathlib import Path

import pytest
from anarcho_tokenize import Tokenizer, TokenizerConfig, train_tokenizer
from anarcho_tokenize.normalization import Form, normalize
from hypothesis import given, settings
from hypothesis import strategies as st

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
normalizers = pytest.importorskip("tokenizers.normalizers")

ODD = runpy.run_path(str(Path(__file__).with_name("odd_texts.py")))
FORMS: tuple[Form, ...] = ("nfc", "nfkc")
SYMBOLS = ("<think>", "éé", "::")
TEXTS = ODD["odd_texts"](250, seed=2, extra=(*SYMBOLS, "<think>\u0338", "e\u0301e\u0301", "\u2581", "ﷺ"))


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest) -> Form:
    return request.param


@pytest.fixture(scope="module")
def normalizing(form: Form, chapters: list[str]) -> Tokenizer:
    config = TokenizerConfig(vocab_size=500, normalization=form, user_symbols=SYMBOLS)
    return train_tokenizer(chapters[:5], config=config)


def reference_form(form: Form):
    return {"nfc": normalizers.NFC, "nfkc": normalizers.NFKC}[form]()


def test_every_character_that_a_form_may_change_is_changed_as_tokenizers_does(form: Form) -> None:
    reference = reference_form(form)
    for character in map(chr, range(sys.maxunicode + 1)):
        if unicodedata.combining(character) or unicodedata.decomposition(character):
            text = f"{character}a\u0301{character}\u0327\u0334{character}"
            assert normalize(text, form) == reference.normalize_str(text), ascii(character)


@settings(max_examples=200, deadline=None)
@given(
    text=st.one_of(st.text(), st.text(alphabet=st.one_of(st.sampled_from(ODD["MARKS"]), st.characters(codec="utf-8"))))
)
def test_any_text_is_normalised_as_tokenizers_does(form: Form, text: str) -> None:
    assert normalize(text, form) == reference_form(form).normalize_str(text)


def test_characters_that_came_after_unicode_9_are_left_as_they_are() -> None:
    # A square era name of 2019 and a sign of Unicode 16 that is a combination of two.
    assert normalize("㋿ﬁ", "nfkc") == "㋿fi"
    assert normalize("\U000105d2\u0307", "nfc") == "\U000105d2\u0307"


def test_what_comes_back_is_the_normal_form(normalizing: Tokenizer) -> None:
    for text in TEXTS:
        assert normalizing.decode(normalizing.encode(text)) == normalizing.normalize(text)
        assert normalizing.encode(normalizing.normalize(text)) == normalizing.encode(text)


def test_the_model_file_alone_says_the_form(normalizing: Tokenizer, form: Form) -> None:
    again = Tokenizer(normalizing.model_bytes)
    assert (again.normalization, again.sha256) == (form, normalizing.sha256)
    assert again.encode("e\u0301") == again.encode("é")


def test_transformers_gives_the_same_ids(normalizing: Tokenizer, tmp_path: Path) -> None:
    normalizing.save(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert reference(text)["input_ids"] == normalizing.encode(text), ascii(text)


def test_without_a_form_texts_stay_as_they_are(english: Tokenizer) -> None:
    assert english.normalization == "identity"
    assert english.decode(english.encode("e\u0301 ﬁ ㋿")) == english.normalize("e\u0301 ﬁ ㋿") == "e\u0301 ﬁ ㋿"
