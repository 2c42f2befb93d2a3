"""Reports: counts that add up, tokens given to scripts by their bytes, tokenizers side by side."""

import io

import pytest
import sentencepiece
from anarcho_tokenize import Tokenizer, inspect_tokenizer
from anarcho_tokenize.inspect import NO_LETTERS, WHITE_SPACE, ScriptReport, TokenizerReport, compare_tokenizers


def scripts(report: TokenizerReport) -> dict[str, ScriptReport]:
    return {script.script: script for script in report.scripts}


def test_tokens_and_bytes_of_the_scripts_add_up_to_all(mixed: Tokenizer, chapters: list[str]) -> None:
    documents = [*chapters[:3], "Привет, мир!  日本語のテキスト\n\n 1851 Ελληνικά \u2581 😀\t", "", "  \n"]
    report = inspect_tokenizer(mixed, documents)
    assert sum(script.bytes for script in report.scripts) == report.bytes
    assert (
        sum(script.words for script in report.scripts) == report.words == sum(len(text.split()) for text in documents)
    )
    assert sum(script.tokens for script in report.scripts) == pytest.approx(report.tokens)
    assert set(scripts(report)) == {"Latin", "Cyrillic", "Han", "Greek", NO_LETTERS, WHITE_SPACE}
    assert report.scripts[0].script == "Latin", "the script with most bytes comes first"


def test_a_word_is_of_the_script_of_its_first_letter(english: Tokenizer) -> None:
    found = scripts(inspect_tokenizer(english, ["«Привет» 1851 1a \n 한국어 العربية カナ ｱ"]))
    assert found["Cyrillic"].words == found["Latin"].words == found[NO_LETTERS].words == 1
    assert {"Hangul", "Arabic", "Katakana"} < set(found)
    assert found["Katakana"].words == 2
    assert found["Cyrillic"].bytes == len("«Привет»".encode())
    assert found["Cyrillic"].tokens == len(english.encode("«Привет»"))
    assert found["Cyrillic"].tokens_per_word == found["Cyrillic"].tokens


def test_a_token_of_several_words_counts_for_each_by_its_bytes() -> None:
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ab щ"] * 50),
        model_writer=stream,
        vocab_size=280,
        model_type="bpe",
        byte_fallback=True,
        split_by_whitespace=False,
        split_by_unicode_script=False,
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = Tokenizer(stream.getvalue())
    assert len(tokenizer.encode("ab щ")) == 1
    found = scripts(inspect_tokenizer(tokenizer, ["ab щ"]))
    assert (found["Latin"].tokens, found["Cyrillic"].tokens) == (pytest.approx(2 / 5), pytest.approx(3 / 5))


def test_unused_pieces_are_those_that_no_text_used(english: Tokenizer, chapters: list[str]) -> None:
    report = inspect_tokenizer(english, chapters[:2], longest=7)
    used = {english.token_bytes(i).decode() for chapter in chapters[:2] for i in english.encode(chapter)}
    assert len(report.unused_examples) == 7
    assert not used & set(report.unused_examples)
    assert report.unused_pieces == len({english.token_bytes(i).decode() for i in range(265, 1024)} - used)
    numbers = [
        next(i for i in range(1024) if english.token_bytes(i).decode(errors="replace") == piece)
        for piece in report.unused_examples
    ]
    assert numbers == sorted(numbers), "those that were learned first come first"


def test_side_by_side_is_each_alone_and_reads_the_text_once(english: Tokenizer, mixed: Tokenizer) -> None:
    documents = iter(["Call me Ishmael.", "naïve café"])
    reports = compare_tokenizers({"a": english, "b": mixed}, documents)
    again = ["Call me Ishmael.", "naïve café"]
    assert reports == {"a": inspect_tokenizer(english, again), "b": inspect_tokenizer(mixed, again)}


def test_unknown_characters_are_counted_and_left_out_of_the_scripts() -> None:
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the white whale"] * 50),
        model_writer=stream,
        vocab_size=20,
        model_type="bpe",
        minloglevel=2,
    )
    report = inspect_tokenizer(Tokenizer(stream.getvalue()), ["the whale", "the щ"])
    assert report.unknown_token_share > 0
    assert (scripts(report)["Latin"].words, report.words) == (2, 4)
    assert (report.algorithm, report.normalization) == ("bpe", "nmt_nfkc")
