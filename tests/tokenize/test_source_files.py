"""Reading files: every kind, packed or not, in a fixed order and in constant memory, and strict reading that names what is wrong."""

import bz2
import gzip
import io
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from anarcho_tokenize import DataConfig, SourceError, embedded_documents, lines, read_documents, unpacking
from anarcho_tokenize.sources import BadRow, Example, Examples, check_source, is_remote
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
TEXT = "First line\r\nsecond – 日本 \x01\n\n"


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
    rows = [
        json.dumps({"text": "one", "n": 1}),
        "",
        json.dumps({"text": ""}),
        json.dumps({"text": TEXT}, ensure_ascii=False),
    ]
    file.write_bytes(PACKERS[suffix]("\n".join(rows).encode()))
    assert list(read_documents(file)) == ["one", TEXT]


def test_text_is_in_text_or_else_in_content(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "content": "x"}\n{"content": "b", "score": 1}')
    write_parquet(tmp_path / "b.parquet", {"content": ["c"], "score": [1.0]})
    assert list(read_documents(tmp_path)) == ["a", "b", "c"]
    assert list(read_documents(tmp_path / "a.jsonl", text_field="content")) == ["x", "b"]


def test_parquet_gives_the_column(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    texts = [f"document {number}" for number in range(3000)]
    write_parquet(file, {"body": [*texts, ""], "n": list(range(3001))})
    assert list(read_documents(file, text_field="body")) == texts


def test_parquet_of_conversations_gives_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    write_parquet(tmp_path / "a.parquet", {"messages": [messages], "image": [b"\xff"], "score": [0.5]})
    [example] = Examples(DataConfig(source=str(tmp_path), kind="chat", min_score=0.1))
    assert isinstance(example, Example)
    assert example.content == (("user", "Hi"), ("assistant", "Ho"))
    assert example.num_bytes == 4


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.text(alphabet="ab\n–漢<¶", min_size=1, max_size=8), min_size=1, max_size=8),
    chunk=st.integers(1, 9),
    limit=st.integers(1, 20),
)
def test_separator_splits_a_text_file_wherever_reads_end(documents: list[str], chunk: int, limit: int) -> None:
    data = "<¶>".join(documents).encode()
    expected = [part for part in data.split("<¶>".encode()) if part]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_CHUNK_BYTES", chunk)
        stream = io.BufferedReader(io.BytesIO(data))  # type: ignore[arg-type]
        rows = list(lines.read_separated(stream, name="f", row=0, offset=0, limit=limit, separator="<¶>".encode()))
    found = [row.value.encode() if isinstance(row.value, str) else None for row in rows]
    assert found == [part if len(part) <= limit else None for part in expected]


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="ab\n–漢", min_size=1, max_size=100), size=st.integers(4, 30), chunk=st.integers(1, 9))
def test_long_text_is_cut_into_parts_that_join_to_it(text: str, size: int, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "PART_BYTES", size)
        patch.setattr(lines, "_CHUNK_BYTES", chunk)
        stream = io.BufferedReader(io.BytesIO(text.encode()))  # type: ignore[arg-type]
        parts = [str(row.value) for row in lines.read_parts(stream, name="f", row=0, offset=0, limit=1000)]
    assert "".join(parts) == text
    assert all(0 < len(part.encode()) <= size for part in parts)
    for part in parts[:-1]:
        assert part.endswith("\n") or "\n" not in part, "a part ends with a line where it holds one"
        assert len(part.encode()) > size - 3 or part.endswith("\n")


@pytest.mark.parametrize("kind", ["line", "document", "part"])
def test_memory_is_bounded_whatever_the_size_of_a_row(tmp_path: Path, kind: str) -> None:
    limit, size = 2**20, 2**26
    file = tmp_path / ("a.jsonl" if kind == "line" else "a.txt")
    with file.open("wb") as stream:
        for _ in range(64):
            stream.write(b"x" * (size // 64))
        stream.write(b"\n{}" if kind == "line" else b"---")
    separator = "---" if kind == "document" else None
    config = DataConfig(source=str(file), document_separator=separator, max_document_bytes=limit)
    tracemalloc.start()
    count = sum(1 for _ in Examples(config))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == {"line": 2, "document": 1, "part": 65}[kind]
    assert peak < 8 * limit


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
def test_missing_source_is_named_before_anything_is_read(tmp_path: Path, spec: str) -> None:
    problem = r"does not exist; expected 'embedded', a file, a directory or a glob"
    with pytest.raises(FileNotFoundError, match=problem):
        list(read_documents(tmp_path / spec))
    with pytest.raises(FileNotFoundError, match=problem):
        Examples(DataConfig(source=str(tmp_path / spec)))
    with pytest.raises(FileNotFoundError, match=problem):
        check_source(DataConfig(source=str(tmp_path / spec)))


@pytest.mark.parametrize("name", ["notes.md", "data.csv", "plain", "rows.parquet.gz"])
def test_unknown_kind_of_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(SourceError, match=rf"{name} has an unknown kind; expected a name that ends in \.txt"):
        list(read_documents(tmp_path / name))


def test_directory_without_text_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(SourceError, match=r"holds no text file; expected \.txt"):
        check_source(DataConfig(source=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", b""), ("a.txt", b"\xef\xbb\xbf"), ("a.jsonl", b"\n \n"), ("a.jsonl", b'{"text": ""}')],
)
def test_source_without_any_text_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=r"holds no text; expected at least one document that is not empty"):
        list(read_documents(tmp_path / name))


def test_strict_reading_raises_at_the_first_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{broken\n{"text": "also fine"}')
    documents = read_documents(tmp_path)
    assert next(documents) == "fine"
    with pytest.raises(SourceError, match=r"a\.jsonl:2 is not JSON \(.*\); expected one object a line\.$"):
        next(documents)


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
    problem = rf"{name} needs {module} to be read; install anarcho-tokenize\[{extra}\]"
    with pytest.raises(SourceError, match=problem):
        check_source(DataConfig(source=str(tmp_path)))
    with pytest.raises(SourceError, match=problem):
        list(Examples(DataConfig(source=str(tmp_path))))


def test_plain_text_is_refused_for_rows_and_for_filters_of_keys(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(SourceError, match=r"a\.txt is plain text, but data\.kind is 'chat'; expected \.jsonl"):
        check_source(DataConfig(source=str(tmp_path), kind="chat"))
    with pytest.raises(SourceError, match=r"a\.txt is plain text without the key that a filter looks at"):
        check_source(DataConfig(source=str(tmp_path), min_score=0.5))
    with pytest.raises(SourceError, match=r"embedded is plain text without the key"):
        check_source(DataConfig(min_score=0.5))
    [bad] = Examples(DataConfig(source=str(tmp_path), kind="chat"))
    assert isinstance(bad, BadRow)


def test_sources_that_can_be_read_pass_the_check(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    write_parquet(tmp_path / "b.parquet", {"text": ["x"]})
    check_source(DataConfig())
    check_source(DataConfig(source=str(tmp_path), kind="chat"))


@pytest.mark.parametrize(("kind", "count"), [("chat", 4000), ("preference", 3000)])
def test_embedded_rows_are_of_the_kind_that_is_asked_for(kind: Literal["chat", "preference"], count: int) -> None:
    config = DataConfig(kind=kind)
    check_source(config)
    rows = list(Examples(config))
    assert len(rows) == count
    assert all(isinstance(row, Example) for row in rows)


@pytest.mark.parametrize(
    ("spec", "remote"),
    [("hf://a/b", True), ("https://h/a.txt", True), ("http://h/a.txt", True), ("https.txt", False), ("hf/a", False)],
)
def test_what_is_remote(spec: str, remote: bool) -> None:
    assert is_remote(spec) is remote


def test_file_that_vanishes_while_others_are_read_is_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    examples = iter(Examples(DataConfig(source=str(tmp_path))))
    next(examples)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.txt is no longer there"):
        next(examples)


def test_disk_that_fails_is_an_error_and_not_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    examples = Examples(DataConfig(source=str(tmp_path)))

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("anarcho_tokenize.files.read_lines", fail)
        with pytest.raises(SourceError, match=r"a\.jsonl cannot be read \(\[Errno 5\] Input/output error\)"):
            next(iter(examples))
    assert [example.content for example in examples if isinstance(example, Example)] == ["a", "b"]
