"""Reading documents: every kind of file, in a fixed order, and an error that names the place for whatever is wrong."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from anarcho_tokenize import SourceError, embedded_documents, read_documents, unpacking
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
TEXT = "First line\r\nsecond – 日本 \0\n\n"


def write_parquet(file: Path, columns: dict[str, list[object]]) -> None:
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), file)


@pytest.mark.parametrize("suffix", PACKERS)
def test_text_file_is_one_document_unchanged(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"book.txt{suffix}"
    file.write_bytes(PACKERS[suffix](TEXT.encode()))
    assert list(read_documents(file)) == [TEXT]
    assert list(read_documents(str(file))) == [TEXT]


@pytest.mark.parametrize("suffix", PACKERS)
def test_json_lines_give_the_field_of_each_line(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"rows.jsonl{suffix}"
    lines = [
        json.dumps({"text": "one", "n": 1}),
        "",
        json.dumps({"text": ""}),
        json.dumps({"text": TEXT}, ensure_ascii=False),
    ]
    file.write_bytes(PACKERS[suffix]("\n".join(lines).encode()))
    assert list(read_documents(file)) == ["one", TEXT]


def test_parquet_gives_the_column(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    texts = [f"document {number}" for number in range(3000)]
    write_parquet(file, {"body": [*texts, ""], "n": list(range(3001))})
    assert list(read_documents(file, text_field="body")) == texts


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.text(alphabet="ab\n–漢", min_size=1, max_size=8), min_size=1, max_size=8),
    chunk=st.integers(1, 9),
)
def test_separator_splits_a_text_file_wherever_reads_end(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], chunk: int
) -> None:
    from anarcho_tokenize import sources

    file = tmp_path_factory.mktemp("text") / "all.txt"
    file.write_bytes("<¶>".join(documents).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_CHUNK_BYTES", chunk)
        assert list(read_documents(file, document_separator="<¶>")) == documents


def test_empty_parts_between_separators_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("---a------b---")
    assert list(read_documents(tmp_path / "all.txt", document_separator="---")) == ["a", "b"]


def test_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\xef\xbb\xbf")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "b"}\n')
    assert list(read_documents(tmp_path)) == ["a\ufeff", "b"]


def test_directory_is_read_in_sorted_order_to_any_depth_without_hidden_or_other_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/c.TXT", ".hidden.txt", ".git/x.txt", "notes.md", "c.txt.gz.part"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(read_documents(tmp_path)) == ["a/c.TXT", "a/z.txt", "b.txt"]


def test_glob_is_read_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b2.txt", "b1.txt", "c.txt", "deep/b0.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(read_documents(f"{tmp_path}/b*.txt")) == ["b1.txt", "b2.txt"]
    assert list(read_documents(f"{tmp_path}/**/b*.txt")) == ["b1.txt", "b2.txt", "deep/b0.txt"]


def test_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("exact")
    assert list(read_documents(tmp_path / "a[1].txt")) == ["exact"]


def test_files_of_several_zstandard_frames_are_read_whole(tmp_path: Path) -> None:
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "a.txt.zst").write_bytes(compress(b"one ") + compress(b"") + compress(b"two" * 200_000))
    assert list(read_documents(tmp_path)) == ["one " + "two" * 200_000]


def test_embedded_is_the_embedded_corpus() -> None:
    assert list(read_documents("embedded")) == list(embedded_documents())


@pytest.mark.parametrize("spec", ["missing.txt", "no/such/directory", "*.jsonl"])
def test_missing_source_is_named(tmp_path: Path, spec: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"does not exist; expected 'embedded', a file, a directory or a glob"):
        list(read_documents(tmp_path / spec))


@pytest.mark.parametrize("name", ["notes.md", "data.csv", "plain", "rows.parquet.gz"])
def test_unknown_kind_of_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(SourceError, match=rf"{name} has an unknown kind; expected a name that ends in \.txt"):
        list(read_documents(tmp_path / name))


def test_directory_without_text_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(SourceError, match=r"holds no text file; expected \.txt"):
        list(read_documents(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", b""), ("a.txt", b"\xef\xbb\xbf"), ("a.jsonl", b"\n \n"), ("a.jsonl", b'{"text": ""}')],
)
def test_source_without_any_text_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=r"holds no text; expected at least one document that is not empty"):
        list(read_documents(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.txt", b"abc\xff", r"byte 0xFF at offset 3"),
        ("a.txt", b"one--two\xe6\x97", r"byte 0xE6 at offset 8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xfe"}', r"byte 0xFE at offset 24"),
        ("a.txt", b"\xed\xa0\x80", r"byte 0xED at offset 0"),
    ],
)
@pytest.mark.parametrize("separator", [None, "--"])
def test_text_that_is_not_utf8_is_named_with_its_offset(
    tmp_path: Path, name: str, content: bytes, place: str, separator: str | None
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=rf"{name} is not UTF-8: {place}; convert the file"):
        list(read_documents(tmp_path / name, document_separator=separator))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{broken", r"a\.jsonl:2 is not JSON \(.*\); expected one object a line"),
        ("[" * 100_000, r"a\.jsonl:2 is not JSON"),
        ('["text"]', r"a\.jsonl:2 holds a list; expected an object with the key 'text'"),
        ('{"body": "x"}', r"a\.jsonl:2 has no key 'text' but \['body'\]; set text_field"),
        ('{"text": 7}', r"a\.jsonl:2 has int as 'text'; expected text"),
        ('{"text": null}', r"a\.jsonl:2 has NoneType as 'text'"),
        ('{"text": "\\ud800"}', r"a\.jsonl:2 holds the lone surrogate U\+D800"),
    ],
)
def test_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(SourceError, match=problem):
        list(read_documents(tmp_path))


def test_parquet_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"body": ["x"]})
    with pytest.raises(SourceError, match=r"a\.parquet has no column 'text' but \['body'\]; set text_field"):
        list(read_documents(tmp_path))


def test_parquet_row_that_is_no_text_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"text": ["x", None]})
    with pytest.raises(SourceError, match=r"a\.parquet, row 2, has NoneType as 'text'; expected text"):
        list(read_documents(tmp_path))


@pytest.mark.parametrize("content", [b"", b"PAR1 not really"])
def test_file_that_is_not_parquet_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(SourceError, match=r"a\.parquet cannot be read as Parquet"):
        list(read_documents(tmp_path))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_cut_off_and_damaged_compressed_files_are_named(tmp_path: Path, suffix: str, kind: str) -> None:
    file = tmp_path / f"a{kind}{suffix}"
    noise = "".join(chr(33 + number * number % 89) for number in range(20_000))
    packed = PACKERS[suffix](json.dumps({"text": noise}).encode())
    for content in (packed[:-9], packed[: len(packed) // 2], b"not compressed"):
        file.write_bytes(content)
        with pytest.raises(
            SourceError, match=rf"a{kind}{suffix} cannot be read \(.*\); expected a whole, valid {suffix} file"
        ):
            list(read_documents(file))


def test_flipped_bits_of_a_gzip_file_are_named(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(TEXT.encode() * 50))
    packed[20] ^= 0xFF
    (tmp_path / "a.txt.gz").write_bytes(packed)
    with pytest.raises(SourceError, match=r"a\.txt\.gz cannot be read"):
        list(read_documents(tmp_path))


def test_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setitem(unpacking._OPENERS, ".txt", deny)
    with pytest.raises(SourceError, match=r"a\.txt cannot be read: permission denied; make it readable"):
        list(read_documents(tmp_path))


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("a.parquet", "pyarrow", "parquet"), ("a.txt.zst", "zstandard", "zstd")]
)
def test_missing_module_names_the_extra_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, extra: str
) -> None:
    if module == "zstandard" and unpacking.sys.version_info >= (3, 14):
        pytest.skip("Python reads .zst by itself")
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(unpacking.sys.modules, module, None)
    with pytest.raises(SourceError, match=rf"{name} needs {module} to be read; install anarcho-tokenize\[{extra}\]"):
        list(read_documents(tmp_path))


def test_empty_separator_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(SourceError, match="document_separator is empty"):
        list(read_documents(tmp_path, document_separator=""))
