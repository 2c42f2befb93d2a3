"""Sources on the network: a server stands in for the hub, drops connections, fails and refuses; the rows stay exactly the same."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from anarcho_tokenize import DataConfig, SourceError
from anarcho_tokenize.hub import HubName
from anarcho_tokenize.sources import BadRow, Example, Examples, NetworkError, check_source
from anarcho_tokenize.transport import RemoteFile, Retries
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")

HERE = Path(__file__).parent
CARD = """---
configs:
- config_name: lines
  default: true
  data_files:
  - split: train
    path: "lines/train-*"
  - split: test
    path: lines/test.jsonl
- config_name: table
  data_files: "table/*.parquet"
---
"""


def load_server() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hub_server", HERE / "hub_server.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(prefix: str, count: int) -> list[dict[str, Any]]:
    return [{"text": f"{prefix} {number} " + "x" * (number % 50), "score": number / count} for number in range(count)]


def as_lines(values: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(value) for value in values).encode()


def write_table(file: Path, values: list[dict[str, Any]], *, row_group_size: int = 20) -> None:
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(values), file, row_group_size=row_group_size)


def write_files(directory: Path) -> None:
    """A data set with a card, one with folders as its splits, and single files."""
    cards, folders = directory / "org" / "cards", directory / "org" / "folders"
    for folder in (cards / "lines", cards / "table", cards / "csv", folders / "train", folders / "test"):
        folder.mkdir(parents=True)
    (cards / "README.md").write_text(CARD)
    for number in range(2):
        (cards / "lines" / f"train-{number}.jsonl.gz").write_bytes(gzip.compress(as_lines(rows(f"t{number}", 40))))
        write_table(cards / "table" / f"{number}.parquet", rows(f"p{number}", 50))
        (cards / "csv" / f"{number}.csv").write_text("text,score\n" + f"c{number},1\n" * 5)
    (cards / "broken").mkdir()
    (cards / "broken" / "0.csv").write_text("text,score\n" + "a,1\n" * 5 + "b,2,3,4\n")
    (cards / "broken" / "1.csv").write_text("text,score\nfine,1\n")
    (cards / "lines" / "train-2.jsonl.gz").write_bytes(gzip.compress(as_lines(rows("cut", 400)))[:-200])
    (cards / "lines" / "train-3.jsonl").write_bytes(as_lines(rows("t3", 40)))
    (cards / "lines" / "test.jsonl").write_bytes(b'{"text": "one"}\n{broken\n{"text": "two"}')
    (cards / "array.json").write_text(json.dumps(rows("a", 4)))
    (folders / "train" / "a.json").write_bytes(as_lines([{"body": "from a folder"}]))
    (folders / "test" / "a.json").write_bytes(as_lines([{"body": "for a test"}]))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    directory = tmp_path_factory.mktemp("hub")
    write_files(directory)
    with load_server().serving(directory) as running:
        yield running


@pytest.fixture(autouse=True)
def healthy(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # It is true where a test of another file has had the library loaded offline before.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server.drop_every_bytes, server.retry_after, server.has_ranges = None, None, True
    for failures in (server.failures, server.metadata_failures, server.gated, server.log):
        failures.clear()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def read(server: Any, home: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """Reads a source in the process whose hub is the server."""
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_TOKEN": "", "HF_HUB_OFFLINE": "0"}
    errors = home / "stderr"
    with errors.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, HERE / "hub_reader.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            env=environment,
            cwd=home,
        )

    def request(source: str, *, position: Any = None, take: int | None = None, **options: Any) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(
            json.dumps({"config": {"source": source, **options}, "position": position, "take": take}) + "\n"
        )
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, errors.read_text()
        return json.loads(answer)

    yield request
    process.communicate()
    assert errors.read_text() == ""


def texts(answer: dict[str, Any]) -> list[str]:
    assert answer["error"] is None, answer["error"]
    return [item["content"] for item in answer["items"] if item["type"] == "Example"]


def test_card_names_configurations_and_splits(read: Callable[..., dict[str, Any]]) -> None:
    answer = read("hf://org/cards?split=test")
    assert texts(answer) == ["one", "two"]
    assert [item["place"] for item in answer["items"]] == [f"hf://org/cards/lines/test.jsonl:{n}" for n in (1, 2, 3)]
    assert answer["items"][1]["reason"].startswith("is not JSON")
    table = texts(read("hf://org/cards?config=table"))
    assert table == [row["text"] for prefix in ("p0", "p1") for row in rows(prefix, 50)]


def test_folders_name_splits_and_the_source_names_the_field(read: Callable[..., dict[str, Any]]) -> None:
    assert texts(read("hf://org/folders?field=body")) == ["from a folder"]
    assert texts(read("hf://org/folders?field=body&split=test")) == ["for a test"]
    assert texts(read("hf://datasets/org/folders", text_field="body")) == ["from a folder"]


def test_files_of_a_data_set_are_read_by_their_names(read: Callable[..., dict[str, Any]]) -> None:
    assert texts(read("hf://org/cards?files=lines/test.jsonl")) == ["one", "two"]
    expected = [row["text"] for prefix in ("p0", "p1") for row in rows(prefix, 50)]
    assert texts(read("hf://org/cards?files=table/0.parquet,table/1.parquet")) == expected


def test_damaged_file_costs_its_rest_and_the_next_file_is_read(read: Callable[..., dict[str, Any]]) -> None:
    answer = read("hf://org/cards")
    found = texts(answer)
    assert found[:80] == [row["text"] for prefix in ("t0", "t1") for row in rows(prefix, 40)]
    assert found[-40:] == [row["text"] for row in rows("t3", 40)]
    [bad] = [item for item in answer["items"] if item["type"] == "BadRow"]
    assert bad["place"] == "hf://org/cards/lines/train-2.jsonl.gz"
    assert answer["progress"][0] > 1000
    assert answer["progress"][1] is None


@pytest.mark.parametrize("source", ["hf://org/cards", "hf://org/cards?config=table", "hf://org/cards?files=csv/*.csv"])
def test_reading_goes_on_at_the_exact_row(read: Callable[..., dict[str, Any]], source: str) -> None:
    whole = read(source, min_score=0.2)
    count = len(whole["items"])
    assert count >= 10
    for place in (0, count // 3, count - 2):
        rest = read(source, position=whole["positions"][place], min_score=0.2)
        assert rest["items"] == whole["items"][place + 1 :]


def test_other_kinds_of_file_are_read_by_the_library(read: Callable[..., dict[str, Any]]) -> None:
    assert texts(read("hf://org/cards?files=csv/*.csv")) == ["c0"] * 5 + ["c1"] * 5
    assert texts(read("hf://org/cards?files=array.json")) == [row["text"] for row in rows("a", 4)]
    answer = read("hf://org/cards?files=broken/*.csv")
    assert texts(answer)[-1] == "fine"
    assert [item["place"] for item in answer["items"] if item["type"] == "BadRow"] == ["hf://org/cards, shard 0"]


@pytest.mark.parametrize("source", ["hf://org/cards", "hf://org/cards?config=table"])
@pytest.mark.parametrize("size", [97, 700])
def test_dropped_connections_change_nothing(
    read: Callable[..., dict[str, Any]], server: Any, source: str, size: int
) -> None:
    whole = read(source)
    server.drop_every_bytes = size
    server.failures.extend([500, 0, 429, 503])
    answer = read(source)
    assert answer["items"] == whole["items"]
    assert len(answer["notes"]) == len(answer["pauses"]) > 5
    assert all("\n" not in note for note in answer["notes"])
    assert answer["notes"][0].startswith("hf://org/cards/")
    assert "attempt 1 of 8 follows in 1 s" in answer["notes"][0]


def test_hub_that_fails_while_names_are_resolved_is_asked_again(
    read: Callable[..., dict[str, Any]], server: Any
) -> None:
    server.metadata_failures.extend([500, 0, 429])
    answer = read("hf://org/cards?split=test")
    assert texts(answer) == ["one", "two"]
    assert [note.partition(";")[0] for note in answer["notes"]][::2] == [
        "hf://org/cards: the server answers 500",
        "hf://org/cards: the server answers 429",
    ]


def test_pauses_double_up_to_a_minute_and_the_last_failure_names_everything(
    read: Callable[..., dict[str, Any]], server: Any
) -> None:
    server.failures.extend([503] * 10)
    answer = read("hf://org/cards?split=test", network_retries=9)
    for pause, expected in zip(answer["pauses"], (1, 2, 4, 8, 16, 32, 60, 60, 60), strict=True):
        assert 0.75 * expected <= pause <= expected
    assert answer["error"] == [
        "NetworkError",
        "hf://org/cards/lines/test.jsonl cannot be reached: the server answers 503, after 10 attempts; "
        "see to the network, and go on from here.",
    ]


def test_reading_goes_on_after_a_network_that_was_given_up(read: Callable[..., dict[str, Any]], server: Any) -> None:
    whole = read("hf://org/cards?config=table")
    server.failures.extend([200, 200, 200, 0, 503])
    first = read("hf://org/cards?config=table", network_retries=1)
    assert first["error"][0] == "NetworkError"
    assert len(first["items"]) == 50
    rest = read("hf://org/cards?config=table", position=first["position"])
    assert first["items"] + rest["items"] == whole["items"]


def test_revision_stays_the_one_that_reading_began_with(
    read: Callable[..., dict[str, Any]], server: Any, tmp_path: Path
) -> None:
    answer = read("hf://org/cards?split=test", take=1)
    commit = answer["position"]["sources"][0]["identity"]["revision"]
    server.log.clear()
    rest = read("hf://org/cards?split=test", position=answer["position"])
    assert texts(rest) == ["two"]
    assert any(path == f"/api/datasets/org/cards/revision/{commit}" for _, path, _ in server.log)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (
            "hf://org/none",
            "hf://org/none does not exist (HTTP 404); check the name, and set HF_TOKEN if it is private.",
        ),
        ("hf://org/cards?split=dev", "hf://org/cards has no split 'dev'; expected split= one of test, train."),
        ("hf://org/cards?config=big", "BuilderConfig 'big' not found"),
        ("hf://org/cards?revision=old", "hf://org/cards has no such revision; expected revision= a branch"),
        ("hf://org/cards?files=none.jsonl", "hf://org/cards cannot be resolved ("),
    ],
)
def test_what_the_hub_does_not_have_is_named_at_once(
    read: Callable[..., dict[str, Any]], source: str, problem: str
) -> None:
    answer = read(source)
    assert answer["error"][0] == "SourceError"
    assert problem in answer["error"][1]
    assert not answer["notes"]


def test_gated_data_set_asks_for_a_token(read: Callable[..., dict[str, Any]], server: Any) -> None:
    server.gated.add("org/cards")
    [kind, problem] = read("hf://org/cards")["error"]
    assert kind == "SourceError"
    assert problem == (
        "hf://org/cards may not be read (HTTP 401); ask for access on its page where it is gated, and set HF_TOKEN."
    )


def test_folder_of_the_same_name_is_not_taken_for_the_data_set(read: Callable[..., dict[str, Any]], home: Path) -> None:
    (home / "org" / "folders").mkdir(parents=True)
    (home / "org" / "folders" / "a.jsonl").write_text('{"body": "local"}')
    assert texts(read("hf://org/folders?field=body")) == ["from a folder"]


def test_cache_does_not_hold_data(read: Callable[..., dict[str, Any]], home: Path) -> None:
    read("hf://org/cards")
    read("hf://org/cards?config=table")
    files = [file for folder in ("hub", "datasets") for file in (home / folder).rglob("*") if file.is_file()]
    assert {file.read_text() for file in files if file.suffix != ".lock" and file.name != "CACHEDIR.TAG"} == {CARD}


def test_mixture_of_hub_and_files(read: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n' * 2)
    sources = [{"source": "hf://org/cards?split=test"}, {"source": str(tmp_path)}]
    assert texts(read("embedded", sources=sources)) == ["one", "abc", "two", "abc"]


# Single files behind https need no hub, so they are read here.


def remote(server: Any, path: str) -> str:
    return f"{server.url}/files/org/cards/{path}"


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("path", ["lines/train-0.jsonl.gz", "lines/train-3.jsonl", "table/0.parquet"])
def test_file_behind_https_gives_the_rows_of_the_file(server: Any, path: str, has_ranges: bool) -> None:
    file = server.directory / "org" / "cards" / path
    expected = [item.content for item in Examples(DataConfig(source=str(file))) if isinstance(item, Example)]
    server.has_ranges = has_ranges
    examples = Examples(DataConfig(source=remote(server, path)))
    items, positions = [], []
    for item in examples:
        assert isinstance(item, Example)
        items.append(item.content)
        positions.append(examples.position)
    assert items == expected
    assert len(items) >= 40
    assert examples.progress == (file.stat().st_size, file.stat().st_size)
    rest = Examples(DataConfig(source=remote(server, path)), position=positions[20])
    assert [item.content for item in rest if isinstance(item, Example)] == expected[21:]


def test_unpacked_file_is_asked_for_from_the_position_on(server: Any) -> None:
    config = DataConfig(source=remote(server, "lines/train-3.jsonl"))
    examples = Examples(config)
    for _, _item in zip(range(20), examples, strict=False):
        pass
    offset = examples.position["sources"][0]["place"]["offset"]
    server.log.clear()
    assert len(list(Examples(config, position=examples.position))) == 20
    assert server.log[-1][2] == f"bytes={offset}-"


def test_file_that_changes_while_it_is_read_is_refused(server: Any) -> None:
    file = server.directory / "org" / "cards" / "changing.jsonl"
    file.write_bytes(b"before")
    server.drop_every_bytes = 3
    retries = Retries("it", retries=3, sleep=lambda _: None)
    stream = RemoteFile(remote(server, "changing.jsonl"), name="changing.jsonl", retries=retries)
    assert stream.read(3) == b"bef"
    file.write_bytes(b"behind")
    with pytest.raises(SourceError, match=r"changing\.jsonl has changed while it was read; expected it to stay"):
        stream.read(3)
    file.unlink()


def test_file_of_another_size_is_refused_when_reading_goes_on(server: Any) -> None:
    file = server.directory / "org" / "cards" / "growing.jsonl"
    file.write_bytes(as_lines(rows("a", 10)))
    config = DataConfig(source=remote(server, "growing.jsonl"))
    examples = Examples(config)
    next(iter(examples))
    file.write_bytes(as_lines(rows("a", 11)))
    with pytest.raises(SourceError, match=r"has changed since its reading began: it had 1 file of .*, now 1 file of"):
        list(Examples(config, position=examples.position))
    file.unlink()


def test_server_that_is_not_there_is_given_up_after_the_last_attempt() -> None:
    notes: list[str] = []
    config = DataConfig(source="http://127.0.0.1:9/a.jsonl", network_retries=3)
    with pytest.raises(NetworkError, match=r"http://127\.0\.0\.1:9/a\.jsonl cannot be reached: .*, after 4 attempts"):
        list(Examples(config, on_retry=notes.append, sleep=lambda _: None))
    assert len(notes) == 3


def test_server_that_asks_for_more_time_gets_it(server: Any) -> None:
    pauses: list[float] = []
    server.retry_after = 7
    server.failures.extend([429, 503])
    items = list(Examples(DataConfig(source=remote(server, "lines/test.jsonl")), sleep=pauses.append))
    assert pauses == [7.0, 7.0]
    assert [type(item) for item in items] == [Example, BadRow, Example]


@pytest.mark.parametrize(
    ("status", "problem"), [(403, "may not be read"), (404, "does not exist"), (400, "answers 400")]
)
def test_refusals_are_named_at_once(server: Any, status: int, problem: str) -> None:
    server.failures.append(status)
    with pytest.raises(SourceError, match=problem) as raised:
        list(Examples(DataConfig(source=remote(server, "lines/test.jsonl"))))
    assert not isinstance(raised.value, NetworkError)


def test_password_of_an_address_is_in_no_message(server: Any) -> None:
    source = remote(server, "none.jsonl").replace("http://", "http://me:secret@") + "?token=secret"
    with pytest.raises(SourceError, match="does not exist") as raised:
        list(Examples(DataConfig(source=source)))
    assert "secret" not in str(raised.value)


def test_forbidden_network_is_named(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"needs the network, but HF_HUB_OFFLINE is set"):
        list(Examples(DataConfig(source=remote(server, "lines/test.jsonl"))))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_remote_file_reads_what_the_file_holds_wherever_it_is_sought(server: Any, data: st.DataObject) -> None:
    file = server.directory / "org" / "cards" / "lines" / "train-3.jsonl"
    content = file.read_bytes()
    server.has_ranges = data.draw(st.booleans())
    server.drop_every_bytes = data.draw(st.sampled_from([None, 1500 if server.has_ranges else None]))
    retries = Retries("f", retries=2, sleep=lambda _: None)
    with RemoteFile(remote(server, "lines/train-3.jsonl"), name="f", retries=retries) as remote_file:
        for _ in range(data.draw(st.integers(1, 5))):
            place = data.draw(st.integers(0, len(content) + 5))
            whence = data.draw(st.sampled_from([0, 2]))
            count = data.draw(st.integers(0, 500))
            start = remote_file.seek(place if whence == 0 else -min(place, len(content)), whence)
            expected = content[start : start + count]
            found = b""
            while len(found) < len(expected) and (part := remote_file.read(count - len(found))):
                found += part
            assert found == expected
            assert remote_file.tell() == start + len(expected)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("hf://squad", HubName(name="squad")),
        ("hf://a/b?config=c+d&split=test", HubName(name="a/b", config="c+d", split="test")),
        ("hf://datasets/a/b?files=x/*.gz,y&files=z%3F", HubName(name="a/b", files=("x/*.gz", "y", "z?"))),
        ("hf://a/b?field=body&revision=v1.0", HubName(name="a/b", field="body", revision="v1.0")),
    ],
)
def test_hub_names(spec: str, expected: HubName) -> None:
    assert HubName.parse(spec) == expected
    check_source(DataConfig(source=spec))


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("hf://", "names no data set; expected hf://name"),
        ("hf://a/b/c", "names no data set"),
        ("hf://../b", "names no data set"),
        ("hf://a/b?name=c", "has 'name=c'; expected a value for one of config, split, field"),
        ("hf://a/b?config=", "has 'config='; expected a value"),
        ("https://host/file.csv", "https://host/file.csv has an unknown kind; expected a name that ends in .txt"),
    ],
)
def test_malformed_names_are_refused_without_the_network(spec: str, problem: str) -> None:
    with pytest.raises(SourceError) as raised:
        check_source(DataConfig(source=spec))
    assert problem in str(raised.value)


def test_server_is_a_program_that_prints_its_address(server: Any) -> None:
    command = [sys.executable, str(HERE / "hub_server.py"), str(server.directory), "--drop-every-bytes", "10"]
    with subprocess.Popen([*command, "--fail-share", "0.3"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        retries = Retries("it", retries=50, sleep=lambda _: None)
        stream = RemoteFile(f"{url}/files/org/cards/lines/test.jsonl", name="it", retries=retries)
        assert stream.readall() == (server.directory / "org/cards/lines/test.jsonl").read_bytes()
        process.terminate()


def test_missing_library_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceError, match=r"hf://a/b needs datasets to be read; install anarcho-tokenize\[datasets\]"):
        check_source(DataConfig(source="hf://a/b"))
