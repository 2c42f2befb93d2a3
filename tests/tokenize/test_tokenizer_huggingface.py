"""The saved directory is the same tokenizer for transformers."""

import json
import os
import runpy
from pathlib import Path

import pytest
from anarcho_tokenize import Tokenizer, TokenizerConfig, TokenizerError, train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def reference(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def ids_of(reference, text: str) -> list[int]:
    return reference(text, add_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("chapter", [0, 31, 59])
def test_ids_equal_on_the_corpus(tokenizer: Tokenizer, reference, chapters: list[str], chapter: int) -> None:
    assert tokenizer.encode(chapters[chapter]) == ids_of(reference, chapters[chapter])


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "   leading and trailing   ",
        "runs  of   spaces    and\t\ttabs \n \n\n\n\n  x",
        "12345 3.14159 2,000,000 1e-9",
        "\0\x01\x02\x1b[31m\x7f\x85\u2028\u200b",
        "日本語のテキスト。中文 한국어 Привет мир! Ελληνικά العربية עברית हिन्दी naïve e\u0301",
        "😀👩‍👩‍👧‍👦🏳️‍🌈",
        "\u2581a\u2581 \u2581\u2581 b",
        "\ufeff\ufffd\u2585",
        "\r\n\r\n",
        "banana ananas nananana aaaaaaaaa abababababa papapapa mamama xxxxxxxxxxx",
        "x" * 3000,
    ],
)
def test_ids_and_text_equal_on_awkward_texts(tokenizer: Tokenizer, reference, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == ids_of(reference, text)
    assert reference.decode(ids) == tokenizer.decode(ids) == text


@settings(max_examples=150, deadline=None)
@given(
    text=st.one_of(
        # A special token that a text spells is text to our encoder, and itself to transformers.
        st.text().filter(lambda text: "<" not in text),
        st.text(alphabet=" \n\tan"),
        st.lists(
            st.sampled_from(
                ["an", "na", "a", "n", "ban", "as", "ab", " ", "  ", "x", "aa", "pa", "ma", "the", "\n", "1", "é"]
            )
        ).map("".join),
    )
)
def test_ids_equal_on_any_text(tokenizer: Tokenizer, reference, text: str) -> None:
    assert tokenizer.encode(text) == ids_of(reference, text)


@settings(max_examples=15, deadline=None)
@given(words=st.lists(st.text(alphabet="an", min_size=3, max_size=12), min_size=30, max_size=40), data=st.data())
def test_ids_equal_where_pieces_repeat_themselves(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], data: st.DataObject
) -> None:
    learned = train_as_large_as_possible([" ".join(words)])
    folder = tmp_path_factory.mktemp("saved")
    learned.save(folder)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    for text in [*words, data.draw(st.text(alphabet="an ", max_size=300))]:
        assert learned.encode(text) == ids_of(reference, text)


def test_ids_and_texts_equal_on_odd_texts(tokenizer: Tokenizer, reference) -> None:
    for text in runpy.run_path(str(Path(__file__).with_name("odd_texts.py")))["odd_texts"](1000, seed=0):
        ids = tokenizer.encode(text)
        assert ids == ids_of(reference, text), ascii(text)
        assert reference.decode(ids) == tokenizer.decode(ids) == text


def train_as_large_as_possible(documents: list[str]) -> Tokenizer:
    with pytest.raises(TokenizerError) as caught:
        train_tokenizer(documents, config=TokenizerConfig(vocab_size=5000))
    largest = int(str(caught.value).split("at most ")[1].split()[0])
    return train_tokenizer(documents, config=TokenizerConfig(vocab_size=largest))


def test_vocabulary_and_special_tokens_are_known(tokenizer: Tokenizer, reference) -> None:
    assert len(reference) == reference.vocab_size == tokenizer.vocab_size
    assert (reference.eos_token, reference.eos_token_id) == ("<|endoftext|>", tokenizer.eot_id)
    assert (reference.pad_token, reference.pad_token_id) == ("<|pad|>", tokenizer.pad_id)
    assert reference.bos_token is None
    assert set(reference.all_special_tokens) == set(tokenizer.special_tokens)
    assert reference.convert_tokens_to_ids(list(tokenizer.special_tokens)) == list(range(7))


def test_special_tokens_are_skipped_in_decoding(tokenizer: Tokenizer, reference) -> None:
    ids = [3, *tokenizer.encode("a b"), 6, 1]
    assert reference.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    assert reference.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False)


def test_the_documented_difference_is_the_text_of_special_tokens(tokenizer: Tokenizer, reference) -> None:
    assert ids_of(reference, "<|end|>") == [6]
    assert 6 not in tokenizer.encode("<|end|>")


def test_loading_beside_a_llama_config_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": tokenizer.vocab_size}
    (tmp_path / "config.json").write_text(json.dumps(config))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = " Call me  Ishmael.\n\n\u2581 1851"
    assert ids_of(reference, text) == tokenizer.encode(text)
    assert reference.decode(tokenizer.encode(text)) == text


def test_saved_files_are_equal_each_time(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a")
    Tokenizer.load(tmp_path / "a").save(tmp_path / "b")
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
