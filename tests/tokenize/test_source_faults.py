"""Broken data: every fault becomes a bad row with its place, and all that is good around it is read."""

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from anarcho_tokenize import DataConfig
from anarcho_tokenize.sources import BadRow, Example, Examples
from hypothesis import example, given, settings
from hypothesis import strategies as st

pyarrow = pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
GOOD = b'{"text": "good"}'


def read(path: Path, **options: Any) -> tuple[list[str], list[BadRow]]:
    """The texts, and the bad rows."""
    items = list(Examples(DataConfig(source=str(path), **options)))
    texts = [str(item.content) for item in items if isinstance(item, Example)]
    return texts, [item for item in items if isinstance(item, BadRow)]


def write_parquet(file: Path, columns: dict[str, Any]) -> None:
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), file)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            b"{broken",
            "is not JSON (Expecting property name enclosed in double quotes at character 2); expected one object a line.",
        ),
        (b'{"text": "cut', "is not JSON (Unterminated string starting at character 10)"),
        (b"[" * 100_000, "is not JSON ("),
        (b'["text"]', "holds a list; expected an object with keys."),
        (b"7", "holds a number; expected an object"),
        (b'{"text": "\xfe"}', "is not UTF-8: byte 0xFE at offset 27; convert the file to UTF-8."),
        (b'{"body": "x"}', "The row has the columns 'body'; expected 'text'"),
        (b'{"text": 7}', "The column 'text' holds 7; expected a text."),
        (b'{"text": null}', "The row has no column with a value; expected 'text'"),
        (b'{"text": ""}', "holds no text; expected at least one character."),
        (b'{"text": "a\\u0000b"}', "holds a NUL character at character 1, as binary data does; expected text."),
        (b"\0\0\0\0", "holds a NUL character at character 0"),
        (b'{"text": "\\ud800"}', "lone surrogate U+D800"),
        (
            b'{"text": "' + b"x" * 1000 + b'"}',
            "is a line of 1,013 bytes; expected at most data.max_document_bytes, 500.",
        ),
        (b'{"text": ' + b"9" * 450 + b"}", "expected a text."),
    ],
)
def test_bad_line_is_named_and_its_neighbours_are_read(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    texts, [bad] = read(tmp_path, max_document_bytes=500 if len(line) < 10_000 else 2**20)
    assert texts == ["good", "good"]
    assert bad.place == f"{tmp_path}/a.jsonl:2"
    assert reason in bad.reason
    assert bad.reason.endswith(".")
    assert len(bad.excerpt) <= 200
    assert str(bad).startswith(bad.place)
    json.dumps([bad.reason, bad.excerpt]).encode()


def test_large_line_at_the_end_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n" + b"x" * 1000)
    texts, [bad] = read(tmp_path, max_document_bytes=100)
    assert texts == ["good"]
    assert "is a line of 1,000 bytes" in bad.reason


def test_row_is_as_large_as_its_text_not_as_its_line(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"text": ["x" * 99, "漢" * 34, "y"]})
    texts, [bad] = read(tmp_path, max_document_bytes=100)
    assert texts == ["x" * 99, "y"]
    assert (bad.place, bad.excerpt) == (f"{tmp_path}/a.parquet, row 2", "漢" * 34)
    assert bad.reason == "holds 102 bytes of text; expected at most data.max_document_bytes, 100."


def test_separated_documents_are_judged_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one--\xe6\x97--t\0wo----" + b"x" * 100 + b"--three")
    texts, bad = read(tmp_path, document_separator="--", max_document_bytes=50)
    assert texts == ["one", "three"]
    assert [row.place.rpartition(", ")[2] for row in bad] == ["document 2", "document 3", "document 4"]
    assert "byte 0xE6 at offset 5" in bad[0].reason
    assert "NUL character at character 1" in bad[1].reason
    assert "is a document of 100 bytes" in bad[2].reason


@pytest.mark.parametrize(("content", "reason"), [(b"abc\xff", "byte 0xFF at offset 3"), (b"", "holds no text")])
def test_bad_text_file_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_bytes(b"good")
    texts, [bad] = read(tmp_path)
    assert (texts, bad.place) == (["good"], f"{tmp_path}/a.txt")
    assert reason in bad.reason


def test_parquet_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"body": ["x", "y"]})
    write_parquet(tmp_path / "b.parquet", {"text": ["good"]})
    texts, bad = read(tmp_path)
    assert texts == ["good"]
    assert [row.place for row in bad] == [f"{tmp_path}/a.parquet, row {number}" for number in (1, 2)]
    assert bad[0].reason == "has no column 'text' or 'content' but ['body']; set text_field to the text's column."


def test_parquet_rows_that_are_no_text_are_named(tmp_path: Path) -> None:
    broken = pyarrow.array([b"good", b"\xff", b"fine"]).view(pyarrow.string())
    write_parquet(tmp_path / "a.parquet", {"text": ["x", None, "", "y"]})
    write_parquet(tmp_path / "b.parquet", {"text": broken})
    write_parquet(tmp_path / "c.parquet", {"text": [1, 2]})
    texts, bad = read(tmp_path)
    assert texts == ["x", "y", "good", "fine"]
    places = [row.place.rpartition("/")[2] for row in bad]
    assert places == [
        "a.parquet, row 2",
        "a.parquet, row 3",
        "b.parquet, row 2",
        "c.parquet, row 1",
        "c.parquet, row 2",
    ]
    assert "is not UTF-8: byte 0xFF at offset 0" in bad[2].reason


@pytest.mark.parametrize("content", [b"", b"PAR1 not really", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_file_that_is_not_parquet_is_one_bad_row(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    write_parquet(tmp_path / "b.parquet", {"text": ["good"]})
    texts, [bad] = read(tmp_path)
    assert (texts, bad.place) == (["good"], f"{tmp_path}/a.parquet")
    assert bad.reason.startswith("cannot be read as Parquet (")


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, 10_000), byte=st.integers(1, 255), cut=st.booleans())
@example(place=2227, byte=128, cut=False)
def test_damaged_parquet_never_raises(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int, cut: bool
) -> None:
    folder = tmp_path_factory.mktemp("damage")
    write_parquet(folder / "a.parquet", {"text": [f"text {number}" for number in range(200)], "n": list(range(200))})
    data = bytearray((folder / "a.parquet").read_bytes())
    data[place % len(data)] ^= byte
    (folder / "a.parquet").write_bytes(data[: place % len(data)] if cut else data)
    write_parquet(folder / "b.parquet", {"text": ["good"]})
    texts, _ = read(folder)
    assert texts[-1] == "good"


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("form", [".txt", ".jsonl"])
def test_cut_off_and_damaged_compressed_files_are_one_bad_row(tmp_path: Path, suffix: str, form: str) -> None:
    file = tmp_path / f"a{form}{suffix}"
    chance = random.Random(0)
    packed = PACKERS[suffix](b"".join(b'{"text": "%d"}\n' % chance.getrandbits(200) for _ in range(500)))
    (tmp_path / f"b{form}{suffix}").write_bytes(PACKERS[suffix](GOOD))
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0xFF
    for content in (packed[:-9], packed[: len(packed) // 2], b"not compressed", bytes(flipped)):
        file.write_bytes(content)
        texts, bad = read(tmp_path)
        damage = [row for row in bad if row.place == str(file)]
        assert len(damage) == 1
        assert "cannot be read (" in damage[0].reason
        assert damage[0].reason.endswith(f"expected a whole, valid {suffix} file.")
        assert texts[-1] == ("good" if form == ".jsonl" else GOOD.decode())


def test_unreadable_file_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    path_open = Path.open

    def deny(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied")
        return path_open(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", deny)
    texts, [bad] = read(tmp_path)
    assert texts == ["b"]
    assert str(bad) == f"{tmp_path}/a.txt cannot be read: permission denied; make it readable."


@settings(max_examples=60, deadline=None)
@given(content=st.lists(st.one_of(st.binary(max_size=40), st.just(GOOD), st.just(b'{"text": "\\ud83d"}')), max_size=8))
def test_no_bytes_whatsoever_raise(tmp_path_factory: pytest.TempPathFactory, content: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("noise")
    for suffix in (".jsonl", ".txt", ".parquet", ".jsonl.gz", ".txt.zst"):
        (folder / f"a{suffix}").write_bytes(b"\n".join(content))
    for kind in ("text", "chat", "preference"):
        list(Examples(DataConfig(source=str(folder), kind=kind, max_document_bytes=30)))
    texts, _ = read(folder / "a.jsonl")
    assert texts.count("good") >= content.count(GOOD) - sum(b"\n" in part for part in content)
