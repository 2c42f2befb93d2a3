"""What is taken of the rows: filters, duplicates, and shares of a mixture."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from anarcho_tokenize import DataConfig, SourceError
from anarcho_tokenize.config import SourceConfig
from anarcho_tokenize.sources import BadRow, Dropped, Example, Examples
from hypothesis import given, settings
from hypothesis import strategies as st


def write(file: Path, rows: list[dict[str, Any]]) -> SourceConfig:
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return SourceConfig(source=str(file))


def texts(config: DataConfig, **options: Any) -> list[str]:
    return [str(item.content) for item in Examples(config, **options) if isinstance(item, Example)]


def test_filters_name_what_they_leave_out(tmp_path: Path) -> None:
    rows = [
        {"text": "taken", "score": 0.5, "language": "en"},
        {"text": "low", "score": 0.4, "language": "en"},
        {"text": "fremd", "score": 1, "language": "de"},
        {"text": "x", "score": 1, "language": "en"},
        {"text": "long" * 10, "score": 1, "language": "en"},
    ]
    source = write(tmp_path / "a.jsonl", rows).source
    items = list(Examples(DataConfig(source=source, min_score=0.5, languages=("en",), min_chars=2, max_chars=10)))
    assert isinstance(items[0], Example)
    assert [item.reason for item in items[1:] if isinstance(item, Dropped)] == [
        "min_score",
        "language",
        "min_chars",
        "max_chars",
    ]


@pytest.mark.parametrize("value", [None, "0.9", True, [1], float("nan")])
def test_row_without_a_score_is_bad(tmp_path: Path, value: object) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "a", "edu": value}]).source
    [bad] = Examples(DataConfig(source=source, min_score=0.0, score_field="edu"))
    assert isinstance(bad, BadRow)
    assert bad.reason == f"has {value!r} as 'edu'; expected a number, which data.min_score is compared with."


def test_row_without_a_language_is_bad(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b", "lang": "en"}]).source
    bad, good = Examples(DataConfig(source=source, languages=("en",), language_field="lang"))
    assert isinstance(bad, BadRow)
    assert isinstance(good, Example)


def test_length_is_that_of_all_texts_of_a_row(tmp_path: Path) -> None:
    row = {"prompt": "1234", "chosen": "12", "rejected": "123"}
    source = write(tmp_path / "a.jsonl", [row]).source
    for least, is_taken in ((9, True), (10, False)):
        [item] = Examples(DataConfig(source=source, kind="preference", min_chars=least))
        assert isinstance(item, Example) is is_taken
    [example] = Examples(DataConfig(source=source, kind="preference"))
    assert isinstance(example, Example)
    assert example.num_bytes == 9


def test_duplicates_are_left_out_once_asked_for_each_row_that_filters_let_through(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": text} for text in ("a", "b", "a", "", "long", "b", "c")]).source
    seen: list[bytes] = []

    def is_duplicate(key: bytes) -> bool:
        seen.append(key)
        return key in seen[:-1]

    config = DataConfig(source=source, deduplicate=True, max_chars=1)
    assert texts(config, is_duplicate=is_duplicate) == ["a", "b", "c"]
    assert len(seen) == 5
    assert {len(key) for key in seen} == {16}
    seen.clear()
    assert len(texts(DataConfig(source=source, max_chars=1), is_duplicate=is_duplicate)) == 5
    assert not seen, "nobody is asked unless duplicates are to be left out"


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 60), min_size=30, max_size=60), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
)
def test_shares_of_bytes_follow_the_weights_within_a_document_of_each_source(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[list[int]], weights: list[float]
) -> None:
    folder = tmp_path_factory.mktemp("mixture")
    sources = []
    for number, sizes in enumerate(lengths):
        source = write(folder / f"{number}.jsonl", [{"text": "x" * size} for size in sizes])
        sources.append(SourceConfig(source=source.source, weight=weights[number]))
    counts = [0.0] * len(sources)
    longest = [max(sizes) for sizes in lengths]
    for item in Examples(DataConfig(sources=tuple(sources))):
        assert isinstance(item, Example)
        counts[item.source] += item.num_bytes
        strides = [count / source.weight for count, source in zip(counts, sources, strict=True)]
        bound = max(size / source.weight for size, source in zip(longest, sources, strict=True))
        assert max(strides) - min(strides) <= bound + 1e-9


def test_shares_of_bytes_are_within_a_hundredth_of_the_weights(tmp_path: Path) -> None:
    sources = []
    for number, weight in enumerate((0.7, 0.2, 0.1)):
        rows = [{"text": "x" * (1 + (7 * row + number) % 90)} for row in range(3000)]
        sources.append(SourceConfig(source=write(tmp_path / f"{number}.jsonl", rows).source, weight=weight))
    counts = [0, 0, 0]
    for item in Examples(DataConfig(sources=tuple(sources))):
        assert isinstance(item, Example)
        counts[item.source] += item.num_bytes
    for count, source in zip(counts, sources, strict=True):
        assert count / sum(counts) == pytest.approx(source.weight, abs=0.01)


def test_rows_that_are_left_out_do_not_count_for_the_shares(tmp_path: Path) -> None:
    dropped = [{"text": "x" * 100}, {"text": "y"}] * 50
    kept = [{"text": "z"}] * 50
    sources = (
        SourceConfig(source=write(tmp_path / "a.jsonl", dropped).source, max_chars=10),
        write(tmp_path / "b.jsonl", kept),
    )
    taken = texts(DataConfig(sources=sources))
    assert abs(taken.count("y") - taken.count("z")) <= 1
    assert len(taken) >= 99


def test_mixture_ends_with_the_first_source_that_ends(tmp_path: Path) -> None:
    sources = (
        write(tmp_path / "a.jsonl", [{"text": "a"}] * 3),
        write(tmp_path / "b.jsonl", [{"text": "b"}] * 100),
    )
    assert "".join(texts(DataConfig(sources=sources))) == "ababab"


def test_sources_repeat_until_each_has_ended_once(tmp_path: Path) -> None:
    sources = (
        write(tmp_path / "a.jsonl", [{"text": text} for text in "abc"]),
        write(tmp_path / "b.jsonl", [{"text": text} for text in "1234567"]),
    )
    items = [item for item in Examples(DataConfig(sources=sources, mixture_end="repeat")) if isinstance(item, Example)]
    assert "".join(str(item.content) for item in items if item.source == 1) == "1234567"
    repeated = [(item.content, item.repeated) for item in items if item.source == 0]
    assert repeated[:7] == [(text, number >= 3) for number, text in enumerate("abcabca")]
    assert not any(item.repeated for item in items if item.source == 1)


def test_later_passes_are_no_duplicates_of_the_first(tmp_path: Path) -> None:
    sources = (
        write(tmp_path / "a.jsonl", [{"text": text} for text in "abb"]),
        write(tmp_path / "b.jsonl", [{"text": text} for text in "12345"]),
    )
    seen: set[bytes] = set()

    def is_duplicate(key: bytes) -> bool:
        is_seen = key in seen
        seen.add(key)
        return is_seen

    config = DataConfig(sources=sources, mixture_end="repeat", deduplicate=True)
    found = "".join(texts(config, is_duplicate=is_duplicate))
    assert found.translate(str.maketrans("", "", "12345")).startswith("ababa")


@pytest.mark.parametrize("end", ["first", "repeat"])
def test_source_of_which_nothing_is_taken_does_not_keep_the_others_waiting(tmp_path: Path, end: Any) -> None:
    sources = (
        SourceConfig(source=write(tmp_path / "a.jsonl", [{"text": "a"}] * 3).source, min_chars=5),
        write(tmp_path / "b.jsonl", [{"text": "b"}] * 4),
    )
    items = list(Examples(DataConfig(sources=sources, mixture_end=end)))
    assert sum(isinstance(item, Dropped) for item in items) == 3
    assert sum(isinstance(item, Example) for item in items) == (0 if end == "first" else 4)


def test_each_source_has_its_own_field(tmp_path: Path) -> None:
    sources = (
        SourceConfig(source=write(tmp_path / "a.jsonl", [{"body": "a"}] * 2).source, text_field="body"),
        write(tmp_path / "b.jsonl", [{"content": "b"}] * 2),
    )
    assert texts(DataConfig(sources=sources)) == ["a", "b", "a", "b"]


def test_progress_of_a_mixture_tells_when_it_will_end(tmp_path: Path) -> None:
    sources = (
        write(tmp_path / "a.jsonl", [{"text": "a" * 50}] * 100),
        write(tmp_path / "b.jsonl", [{"text": "b" * 50}] * 10_000),
    )
    examples = Examples(DataConfig(sources=sources))
    for count, _item in enumerate(examples):
        if count == 100:
            done, total = examples.progress
            assert total is not None
            assert done / total == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_that_leaves_nothing_to_others_is_refused(weight: float) -> None:
    with pytest.raises(SourceError, match=r"data.sources has the weight .*; expected a positive number"):
        SourceConfig(source="a.txt", weight=weight)


@pytest.mark.parametrize("config", [DataConfig, SourceConfig])
@pytest.mark.parametrize("score", [math.inf, math.nan])
def test_a_score_that_no_row_compares_with_is_refused(config: type, score: float) -> None:
    with pytest.raises(SourceError, match=r"data.min_score is .*; expected a finite number"):
        config(source="a.txt", min_score=score)
