"""Positions: after any number of items, reading goes on from the position with exactly the rest, whatever the source is."""

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from anarcho_tokenize import DataConfig, SourceError, lines, tables
from anarcho_tokenize.config import SourceConfig
from anarcho_tokenize.sources import BadRow, Dropped, Example, Examples
from hypothesis import given, settings
from hypothesis import strategies as st

pyarrow = pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def rows(count: int, *, seed: int = 0) -> list[dict[str, object]]:
    """Rows of which some are dropped by a filter, and some are bad."""
    chance = random.Random(seed)
    texts = ["".join(chance.choices("ab \n漢", k=chance.randrange(1, 40))) for _ in range(count)]
    return [{"text": text if chance.random() < 0.9 else None, "score": chance.random()} for text in texts]


def write_lines(file: Path, *, count: int = 30, seed: int = 0, packer: Callable[[bytes], bytes] = bytes) -> None:
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows(count, seed=seed)]
    lines[3:3] = [b"", b"{broken", b"\xff\xfe", b"[1]", b"\n"]
    file.write_bytes(packer(b"\n".join(lines)))


def write_parquet(file: Path, *, count: int = 30, seed: int = 0, row_group_size: int = 7) -> None:
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows(count, seed=seed)), file, row_group_size=row_group_size)


def read_all(config: DataConfig, position: dict[str, Any] | None = None) -> list[Example | BadRow | Dropped]:
    return list(Examples(config, position=position, is_duplicate=None))


def check_every_position(config: DataConfig) -> list[Example | BadRow | Dropped]:
    """Read with a stop after every item, and return all items."""
    examples = Examples(config)
    positions = [json.dumps(examples.position)]
    items = []
    for item in examples:
        items.append(item)
        positions.append(json.dumps(examples.position))
    for count, position in enumerate(positions):
        assert read_all(config, json.loads(position)) == items[count:], count
    return items


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small parts, chunks and batches, so that little data crosses many of their borders."""
    monkeypatch.setattr(lines, "PART_BYTES", 50)
    monkeypatch.setattr(lines, "_CHUNK_BYTES", 7)
    monkeypatch.setattr(tables, "_BATCH_ROWS", 3)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("suffix", PACKERS)
def test_json_lines_go_on_after_every_item(tmp_path: Path, suffix: str) -> None:
    for number in range(3):
        write_lines(tmp_path / f"{number}.jsonl{suffix}", seed=number, count=8, packer=PACKERS[suffix])
    items = check_every_position(DataConfig(source=str(tmp_path), min_score=0.3))
    assert {type(item) for item in items} == {Example, BadRow, Dropped}


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("separator", [None, "<¶>"])
def test_text_files_go_on_after_every_item(tmp_path: Path, suffix: str, separator: str | None) -> None:
    text = (separator or "\n").join(str(row["text"]) for row in rows(16))
    for number, content in enumerate((text, "", "one", "漢" * 100)):
        (tmp_path / f"{number}.txt{suffix}").write_bytes(PACKERS[suffix](content.encode()))
    items = check_every_position(DataConfig(source=str(tmp_path), document_separator=separator, max_document_bytes=60))
    assert sum(isinstance(item, Example) for item in items) >= 5


@pytest.mark.usefixtures("small_steps")
def test_parquet_goes_on_after_every_item(tmp_path: Path) -> None:
    for number in range(2):
        write_parquet(tmp_path / f"{number}.parquet", seed=number)
    (tmp_path / "3.parquet").write_bytes(b"PAR1 broken")
    write_parquet(tmp_path / "4.parquet", row_group_size=30)
    items = check_every_position(DataConfig(source=str(tmp_path), min_score=0.3))
    assert {type(item) for item in items} == {Example, BadRow, Dropped}


def test_parquet_does_not_read_the_row_groups_before_the_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "a.parquet", count=40, row_group_size=10)
    config = DataConfig(source=str(tmp_path))
    examples = Examples(config)
    for _, _item in zip(range(25), examples, strict=False):
        pass
    from pyarrow import parquet

    read: list[int] = []
    batches = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile,
        "iter_batches",
        lambda self, *args, **options: read.extend(options["row_groups"]) or batches(self, *args, **options),
    )
    assert len(read_all(config, examples.position)) == 15
    assert read == [2, 3]


def test_unpacked_file_is_not_read_before_the_position(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    write_lines(file, count=200)
    config = DataConfig(source=str(file))
    examples = Examples(config)
    for _, _item in zip(range(100), examples, strict=False):
        pass
    rest = read_all(config, examples.position)
    offset = examples.position["sources"][0]["place"]["offset"]
    file.write_bytes(b"\0" * offset + file.read_bytes()[offset:])
    assert offset > 1000
    assert read_all(config, examples.position) == rest


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
@pytest.mark.parametrize("form", [".jsonl", ".txt"])
def test_damaged_compressed_file_gives_the_same_rows_from_every_position(
    tmp_path: Path, suffix: str, form: str
) -> None:
    chance = random.Random(1)
    for number in range(2):
        texts = [f"{chance.getrandbits(16_000):x}" for _ in range(100)]
        packed = PACKERS[suffix]("\n".join(json.dumps({"text": text}) for text in texts).encode())
        (tmp_path / f"{number}{form}{suffix}").write_bytes(packed[: len(packed) * 2 // 3] if number == 0 else packed)
    config = DataConfig(source=str(tmp_path), document_separator="\n" if form == ".txt" else None)
    examples = Examples(config)
    items, positions = [], []
    for item in examples:
        items.append(item)
        positions.append(examples.position)
    bad = [number for number, item in enumerate(items) if isinstance(item, BadRow)]
    assert len(bad) == 1
    assert len(items) == bad[0] + 101, "all of the file after the damaged one is read"
    if suffix != ".bz2":
        assert bad[0] > 20, "what precedes the damage is delivered"
    for count in (0, bad[0] // 2, bad[0] - 1, bad[0], bad[0] + 1):
        if 0 <= count < len(positions):
            assert read_all(config, positions[count]) == items[count + 1 :]


@settings(max_examples=15, deadline=None)
@given(
    counts=st.lists(st.integers(0, 6), min_size=2, max_size=3),
    weights=st.lists(st.sampled_from([0.1, 0.5, 1.0, 3.0]), min_size=3, max_size=3),
    end=st.sampled_from(["first", "repeat"]),
)
def test_mixtures_go_on_after_every_item(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], weights: list[float], end: Any
) -> None:
    folder = tmp_path_factory.mktemp("mixture")
    sources = []
    for number, (count, weight) in enumerate(zip(counts, weights, strict=False)):
        file = folder / f"{number}.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows(count, seed=number)))
        sources.append(SourceConfig(source=str(file), weight=weight, min_score=0.2))
    check_every_position(DataConfig(sources=tuple(sources), mixture_end=end))


def test_embedded_corpus_goes_on() -> None:
    config = DataConfig()
    examples = Examples(config)
    items, positions = [], []
    for item in examples:
        items.append(item)
        positions.append(examples.position)
    assert read_all(config, positions[150]) == items[151:]


def test_position_before_and_after_everything(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl")
    config = DataConfig(source=str(tmp_path))
    assert read_all(config, Examples(config).position) == read_all(config)
    examples = Examples(config)
    assert len(list(examples)) > 0
    assert read_all(config, examples.position) == []
    assert list(examples) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda d: (d / "c.jsonl").write_text("{}"), r"had 2 files of [\d,]+ bytes, now 3 files of"),
        (lambda d: (d / "a.jsonl").unlink(), r"had 2 files of [\d,]+ bytes, now 1 file of"),
        (lambda d: (d / "a.jsonl").rename(d / "z.jsonl"), r"had .*, now as many of other names or sizes"),
        (lambda d: (d / "a.jsonl").write_text("{}"), r"had .*, now 2 files of"),
    ],
)
def test_source_that_has_changed_is_refused(tmp_path: Path, change: Callable[[Path], None], problem: str) -> None:
    for name in ("a", "b"):
        write_lines(tmp_path / f"{name}.jsonl")
    config = DataConfig(source=str(tmp_path))
    examples = Examples(config)
    next(iter(examples))
    change(tmp_path)
    with pytest.raises(SourceError, match=rf"{tmp_path} has changed since its reading began: it {problem}"):
        read_all(config, examples.position)


@pytest.mark.parametrize("spec", [".", "a.jsonl", "*.jsonl", "./a.jsonl"])
def test_relative_and_absolute_names_are_of_the_same_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    write_lines(tmp_path / "a.jsonl")
    monkeypatch.chdir(tmp_path)
    examples = Examples(DataConfig(source=spec))
    items = list(zip(range(10), examples, strict=False))
    rest = read_all(DataConfig(source=str(tmp_path / "a.jsonl")), examples.position)
    assert len(items) + len(rest) == len(read_all(DataConfig(source=spec)))


def test_moved_source_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    write_lines(tmp_path / "old" / "a.jsonl")
    examples = Examples(DataConfig(source=str(tmp_path / "old")))
    next(iter(examples))
    (tmp_path / "old").rename(tmp_path / "new")
    rest = read_all(DataConfig(source=str(tmp_path / "new")), examples.position)
    assert len(rest) == len(read_all(DataConfig(source=str(tmp_path / "new")))) - 1


def test_position_of_another_number_of_sources_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl")
    position = Examples(DataConfig(source=str(tmp_path))).position
    sources = (SourceConfig(source=str(tmp_path)), SourceConfig(source=str(tmp_path)))
    with pytest.raises(SourceError, match=r"version 1 and 1 sources; expected version 1 and 2, as in data\.sources"):
        Examples(DataConfig(sources=sources), position=position)


def test_progress_reaches_the_bytes_on_disk(tmp_path: Path) -> None:
    for suffix in (".gz", ""):
        write_lines(tmp_path / f"a.jsonl{suffix}", count=3000, packer=PACKERS[suffix])
    write_parquet(tmp_path / "b.parquet", count=3000)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    examples = Examples(DataConfig(source=str(tmp_path)))
    seen = [examples.progress for _ in examples]
    assert {total for _, total in seen} == {size}
    done = [read for read, _ in seen]
    assert done[0] < size / 3
    assert len(set(done)) > 10
    assert examples.progress == (size, size)
