"""Training: deterministic, of the asked size, and clear about what cannot be had."""

import subprocess
import sys
from collections import Counter

import pytest
from anarcho_tokenize import DataConfig, ShardError, Tokenizer, TokenizerConfig, TokenizerError, train_tokenizer
from anarcho_tokenize.piece_model import NORMAL
from anarcho_tokenize.training import sample_documents, sample_lines


@pytest.mark.parametrize("sample_bytes", [2**26, 50_000])
def test_equal_documents_and_seed_give_an_equal_file(chapters: list[str], sample_bytes: int) -> None:
    config = TokenizerConfig(vocab_size=500, sample_bytes=sample_bytes, seed=3)
    first, second = (train_tokenizer(iter(chapters), config=config) for _ in range(2))
    assert first.sha256 == second.sha256
    assert first.vocab_size == 500


def test_another_process_learns_the_same(chapters: list[str]) -> None:
    code = (
        "from anarcho_tokenize import TokenizerConfig, embedded_documents, train_tokenizer\nfrom itertools import islice\n"
        "docs = islice(embedded_documents(), 5)\n"
        "print(train_tokenizer(docs, config=TokenizerConfig(vocab_size=400)).sha256)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == train_tokenizer(chapters[:5], config=TokenizerConfig(vocab_size=400)).sha256


def test_another_seed_samples_other_lines(chapters: list[str]) -> None:
    tokenizers = [
        train_tokenizer(chapters, config=TokenizerConfig(vocab_size=500, sample_bytes=50_000, seed=seed))
        for seed in (0, 1)
    ]
    assert tokenizers[0].sha256 != tokenizers[1].sha256


def test_sample_is_uniform_within_its_bytes_and_in_order() -> None:
    lines = [f"{number:04d}" for number in range(1000)]
    counts: Counter[str] = Counter()
    for seed in range(200):
        sample = sample_lines(["\n".join(lines)], sample_bytes=400, seed=seed)
        assert len(sample) == 100
        assert sample == sorted(sample)
        counts.update(sample)
    # Each line is drawn 20 times on average, with a deviation of 4.2: quarters of the corpus must agree far more closely.
    quarters = [sum(counts[line] for line in lines[start : start + 250]) for start in range(0, 1000, 250)]
    assert all(abs(quarter - 5000) < 300 for quarter in quarters)


def test_sampled_lines_lose_nothing_but_their_separators() -> None:
    document = "a" * 2500 + " tail of words" * 300 + "\n\0x\u2581y\u2585z\r\nend  "
    assert "".join(sample_lines([document], sample_bytes=2**20, seed=0)) == "".join(
        character for character in document if character not in "\n\0\u2581\u2585\r"
    )


def test_text_without_spaces_still_gets_a_piece_for_the_space() -> None:
    tokenizer = train_tokenizer(["abc\nabcd\nabc"], config=TokenizerConfig(vocab_size=271))
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode(" a")] == [b" ", b"a"]


def test_too_large_a_vocabulary_names_the_largest_possible_which_works() -> None:
    documents = ["hello world"]
    with pytest.raises(
        TokenizerError, match=r"vocab_size is 4096, but the text supports at most (\d+) pieces"
    ) as caught:
        train_tokenizer(documents, config=TokenizerConfig(vocab_size=4096))
    largest = int(str(caught.value).split("at most ")[1].split()[0])
    assert train_tokenizer(documents, config=TokenizerConfig(vocab_size=largest)).vocab_size == largest


@pytest.mark.parametrize("vocab_size", [266, 270])
def test_too_small_a_vocabulary_says_what_is_needed(vocab_size: int) -> None:
    with pytest.raises(
        TokenizerError, match=rf"vocab_size is {vocab_size}, but .* need \d+; choose that or more"
    ) as caught:
        train_tokenizer(["hello world"], config=TokenizerConfig(vocab_size=vocab_size))
    least = int(str(caught.value).split("need ")[1].split(";")[0])
    assert train_tokenizer(["hello world"], config=TokenizerConfig(vocab_size=least)).vocab_size == least


@pytest.mark.parametrize("documents", [[], [""], ["\n\n", "\0"]])
def test_documents_without_text_are_refused(documents: list[str]) -> None:
    with pytest.raises(TokenizerError, match="no text to learn a tokenizer from"):
        train_tokenizer(documents, config=TokenizerConfig(vocab_size=300))


def test_lone_surrogate_names_document_and_character() -> None:
    with pytest.raises(TokenizerError, match=r"Document 2 holds the lone surrogate U\+DC80 at character 3"):
        train_tokenizer(["fine", "abc\udc80"], config=TokenizerConfig(vocab_size=300))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("vocab_size", True),
        ("vocab_size", 265),
        ("sample_bytes", -1),
        ("max_piece_length", 1.5),
        ("character_coverage", 0.5),
        ("vocab_size", 2**31),
        ("max_piece_length", 513),
        ("num_threads", 1025),
    ],
)
def test_configuration_names_the_wrong_field(field: str, value: object) -> None:
    with pytest.raises(TokenizerError, match=rf"tokenizer\.{field} is {value!r}; expected"):
        TokenizerConfig(**{field: value})


@pytest.mark.parametrize("limit", [{"max_piece_length": 512}, {"num_threads": 1024}])
def test_what_the_configuration_allows_sentencepiece_takes(limit: dict[str, int]) -> None:
    config = TokenizerConfig(vocab_size=300, **limit)
    assert train_tokenizer(["The whale and the sea, the sea and the whale."] * 20, config=config).vocab_size == 300


def test_the_largest_vocabulary_is_refused_for_the_text_alone() -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.vocab_size is 2147483647, but the text supports at most"):
        train_tokenizer(["hello world"] * 20, config=TokenizerConfig(vocab_size=2**31 - 1))


def test_more_workers_than_processes_can_be_are_refused() -> None:
    with pytest.raises(ShardError, match=r"data\.num_workers is 100000000000; expected at most 1024"):
        DataConfig(num_workers=10**11)


def test_splitting_digits_can_be_turned_off() -> None:
    tokenizer = train_tokenizer(
        ["1851 1851 1851 1851\n" * 20], config=TokenizerConfig(vocab_size=273, split_digits=False)
    )
    assert len(tokenizer.encode("1851")) < 4


def test_training_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(["hello world"], config=TokenizerConfig(vocab_size=276))
    with pytest.raises(TokenizerError):
        train_tokenizer(["hello world"], config=TokenizerConfig(vocab_size=4000))
    assert capfd.readouterr() == ("", "")


def test_coverage_below_one_writes_rare_characters_as_bytes() -> None:
    documents = ["abcdefgh " * 2000 + "Ω"]
    rare = train_tokenizer(documents, config=TokenizerConfig(vocab_size=290, character_coverage=0.999))
    kept = train_tokenizer(documents, config=TokenizerConfig(vocab_size=290, character_coverage=1.0))

    def pieces(tokenizer: Tokenizer) -> list[bytes]:
        return [tokenizer.token_bytes(i) for i in tokenizer.encode("Ω")]

    assert pieces(rare) == [b"\xce", b"\xa9"]
    assert pieces(kept) == [b"\xce\xa9"]


def test_a_sample_of_lines_does_not_prefer_short_ones() -> None:
    document = "\n".join(["a" * 10, "b" * 200] * 500)
    sampled = Counter(
        line[0] for seed in range(50) for line in sample_lines([document], sample_bytes=10_000, seed=seed)
    )
    assert sampled.total() > 4000
    assert abs(sampled["a"] - sampled["b"]) < 4 * sampled.total() ** 0.5


def test_sample_of_documents_is_uniform_in_order_and_deterministic() -> None:
    documents = [f"{number:03d}" for number in range(400)]
    counts: Counter[str] = Counter()
    for seed in range(100):
        sample = sample_documents(iter(documents), count=100, seed=seed)
        assert len(sample) == len(set(sample)) == 100
        assert sample == sorted(sample) == sample_documents(documents, count=100, seed=seed)
        counts.update(sample)
    quarters = [sum(counts[document] for document in documents[start : start + 100]) for start in range(0, 400, 100)]
    assert all(abs(quarter - 2500) < 200 for quarter in quarters)
    assert sample_documents(documents, count=1000, seed=0) == documents


def test_only_sampled_documents_are_learned_from() -> None:
    documents = [f"{letter * 3} " * 30 for letter in "abcdefghij"]
    config = TokenizerConfig(vocab_size=271, sample_documents=2)
    letters = {piece for piece in learned(train_tokenizer(documents, config=config)) if piece.isalpha()}
    assert len({piece[0] for piece in letters}) == 2


def test_reading_stops_after_the_bytes_to_scan() -> None:
    read = []

    def endless():
        while True:
            read.append(1)
            yield "white whale " * 100

    train_tokenizer(endless(), config=TokenizerConfig(vocab_size=280, scan_bytes=5000))
    assert len(read) == 5


SYMBOLS = ("<think>", "</think>", "a,b", '"', "éé", "::", "<th")


@pytest.mark.parametrize("text", ["{}", "x{}y", " {} ", "{}{}", "\n{}\n", "whale{}1"])
@pytest.mark.parametrize("symbol", SYMBOLS)
def test_user_symbols_are_always_one_token(with_symbols: Tokenizer, symbol: str, text: str) -> None:
    pieces = [with_symbols.token_bytes(i).decode() for i in with_symbols.encode(text.format(symbol, symbol))]
    assert pieces.count(symbol) == text.count("{}")
    assert "".join(pieces) == text.format(symbol, symbol)


def test_the_longest_user_symbol_wins_and_none_is_special(with_symbols: Tokenizer) -> None:
    assert [with_symbols.token_bytes(i) for i in with_symbols.encode("<think><thin")][:2] == [b"<think>", b"<th"]
    assert with_symbols.decode(with_symbols.encode("<think>")) == "<think>"
    assert with_symbols.vocab_size == 400


@pytest.fixture(scope="module")
def with_symbols(chapters: list[str]) -> Tokenizer:
    documents = [*chapters[:3], "<think> <think>a,b" * 100]
    return train_tokenizer(documents, config=TokenizerConfig(vocab_size=400, user_symbols=SYMBOLS))


@pytest.mark.parametrize(
    ("symbols", "reason"),
    [
        (("",), "'', which is empty"),
        (("a b",), "'a b', which holds white space"),
        (("a\u3000b",), "which holds white space"),
        (("x\0",), "which holds white space, NUL"),
        (("\u2581x",), "which holds white space, NUL, U\\+2581"),
        (("\n",), "which holds white space"),
        (("<a>", "<a>"), "'<a>', which is there already"),
        (("<|end|>",), "which is there already"),
        (("<0x0A>",), "which is there already"),
        (("e\u0301",), "which is not in the form tokenizer.normalization = 'nfc'"),
        (("a\ud800",), "holds the lone surrogate"),
    ],
)
def test_texts_that_cannot_be_user_symbols_are_refused(symbols: tuple[str, ...], reason: str) -> None:
    config = TokenizerConfig(vocab_size=300, user_symbols=symbols, normalization="nfc")
    with pytest.raises(TokenizerError, match=rf"tokenizer\.user_symbols.*{reason}"):
        train_tokenizer(["the white whale"], config=config)


def test_pieces_are_learned_from_the_normal_form() -> None:
    documents = ["cafe\u0301 " * 50]
    plain, composed = (
        train_tokenizer(documents, config=TokenizerConfig(vocab_size=272, character_coverage=1.0, normalization=form))
        for form in ("identity", "nfc")
    )
    assert any("e\u0301" in piece or piece == "\u0301" for piece in learned(plain))
    assert any("é" in piece for piece in learned(composed))


def test_equal_threads_give_an_equal_file(chapters: list[str]) -> None:
    config = TokenizerConfig(vocab_size=500, num_threads=3)
    first, second = (train_tokenizer(chapters[:20], config=config) for _ in range(2))
    assert first.sha256 == second.sha256


def learned(tokenizer: Tokenizer) -> list[str]:
    return [piece.text for piece in tokenizer.piece_model.pieces if piece.kind == NORMAL]
