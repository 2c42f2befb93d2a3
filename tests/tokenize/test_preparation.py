"""Preparation: its result follows from the sources and the plan alone, however often it was interrupted, and bad rows are recorded."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
from anarcho_tokenize import (
    DataConfig,
    Message,
    PreparationReport,
    ShardError,
    SourceConfig,
    SourceError,
    Tokenizer,
    TokenShards,
    preparation,
    prepare_shards,
    production,
    release,
    write_shards,
)
from anarcho_tokenize.chunks import is_validation
from anarcho_tokenize.rows import digest_of
from anarcho_tokenize.sources import Examples
from hypothesis import given, settings
from hypothesis import strategies as st

SEPARATOR = "<|doc|>"
WORDS = "whale ship sea captain harpoon mast sail wave island boat Queequeg Ahab white ocean storm".split()  # noqa: SIM905


class Interrupted(BaseException):
    """Stands for whatever ends an attempt."""


def sentences(count: int, *, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [f"{number}: {' '.join(chance.choices(WORDS, k=chance.randrange(3, 30)))}." for number in range(count)]


def write_rows(file: Path, rows: list[Any]) -> str:
    """JSON lines; bytes are written as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    file.write_bytes(b"\n".join(lines))
    return str(file)


def talk(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Say {text[:9]}"}, {"role": "assistant", "content": text}]


def plain(folder: Path) -> DataConfig:
    (folder / "a.txt").write_text(SEPARATOR.join(sentences(90)))
    (folder / "b.txt").write_text(SEPARATOR.join(sentences(30, seed=1)))
    return DataConfig(source=str(folder), document_separator=SEPARATOR)


def deduplicated(folder: Path) -> DataConfig:
    texts = sentences(100)
    rows = [{"text": random.Random(number).choice(texts)} for number in range(200)]
    return DataConfig(source=write_rows(folder / "a.jsonl", rows), deduplicate=True)


def filtered(folder: Path) -> DataConfig:
    rows: list[Any] = [
        {"text": text, "score": number % 5, "language": "en" if number % 7 else "fr"}
        for number, text in enumerate(sentences(150))
    ]
    rows[20:20] = [b"{broken", b"\xff", {"text": 3, "score": 3, "language": "en"}]
    rows[90:90] = [b"[1]", {"text": "", "score": 3, "language": "en"}]
    source = write_rows(folder / "a.jsonl", rows)
    return DataConfig(source=source, min_score=1, languages=("en",), min_chars=30)


def mixed_sources(folder: Path) -> DataConfig:
    large = write_rows(folder / "a.jsonl", [{"text": text} for text in sentences(100)])
    small = write_rows(folder / "b.jsonl", [{"text": text} for text in sentences(12, seed=1)])
    sources = (SourceConfig(source=large, weight=2), SourceConfig(source=small))
    return DataConfig(sources=sources, mixture_end="repeat", deduplicate=True)


def chat(folder: Path) -> DataConfig:
    rows = [{"messages": talk(text)} for text in sentences(80)]
    return DataConfig(source=write_rows(folder / "a.jsonl", rows), kind="chat")


def preference(folder: Path) -> DataConfig:
    rows = [{"prompt": "Say", "chosen": text, "rejected": text[::-1]} for text in sentences(60)]
    return DataConfig(source=write_rows(folder / "a.jsonl", rows), kind="preference")


def bounded(folder: Path) -> DataConfig:
    return with_options(plain(folder), max_tokens=1500, validation_tokens=100)


FORMS = (plain, deduplicated, filtered, mixed_sources, chat, preference, bounded)


def with_options(config: DataConfig, **options: Any) -> DataConfig:
    return DataConfig(**({key: getattr(config, key) for key in DataConfig.__dataclass_fields__} | options))


@pytest.fixture(autouse=True)
def without_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill loses nothing that was written, flushed or not; the tests of the order of writing are about kills."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(params=FORMS, ids=lambda form: form.__name__)
def config(request: pytest.FixtureRequest, tmp_path: Path) -> DataConfig:
    """A source of each form, which makes about ten shards."""
    (tmp_path / "source").mkdir()
    options = {"shard_tokens": 300, "validation_fraction": 0.2, "num_workers": 0}
    return with_options(request.param(tmp_path / "source"), **options)


def files_of(directory: Path) -> dict[str, bytes]:
    """All that a preparation has made but its seconds, and the set of seen rows, which differs in what was read ahead."""
    found = {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}
    state = json.loads(found["production.json"])
    found["production.json"] = json.dumps({**state, "seconds": 0}).encode()
    return {name: data for name, data in found.items() if not name.startswith(("seen.sqlite", ".lock"))}


def prepare(config: DataConfig, tokenizer: Tokenizer, directory: Path, **options: Any) -> dict[str, bytes]:
    prepare_shards(config, tokenizer, directory, **options)
    return files_of(directory)


def texts_in(part: Path, tokenizer: Tokenizer) -> list[str]:
    shards = TokenShards.open(part)
    return [tokenizer.decode(shards.tokens(a, b).tolist()) for a, b in pairwise(shards.document_starts().tolist())]


def quarantine_of(directory: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (directory / "quarantine.jsonl").read_text().splitlines()]


def interrupt_after(calls: int) -> Callable[[PreparationReport], None]:
    left = iter(range(calls - 1))

    def on_progress(_: PreparationReport) -> None:
        if next(left, None) is None:
            raise Interrupted

    return on_progress


def test_shards_hold_the_documents_of_the_source_in_order(tmp_path: Path, english: Tokenizer) -> None:
    texts = sentences(200)
    source = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    config = DataConfig(source=source, validation_fraction=0.2, shard_tokens=400, num_workers=0)
    report = prepare_shards(config, english, tmp_path / "data")
    held_out = [text for text in texts if is_validation(digest_of(text), fraction=0.2)]
    assert texts_in(tmp_path / "data" / "validation", english) == held_out
    assert texts_in(tmp_path / "data" / "train", english) == [text for text in texts if text not in held_out]
    assert 15 < len(held_out) < 70
    parts = [TokenShards.open(tmp_path / "data" / part) for part in ("train", "validation")]
    assert report.documents == report.rows == len(texts)
    assert report.tokens == sum(part.num_tokens for part in parts)
    assert report.bytes == sum(part.num_bytes for part in parts) == sum(len(text.encode()) for text in texts)
    assert report.validation_tokens == parts[1].num_tokens
    assert report.source_bytes == report.source_total_bytes == Path(source).stat().st_size
    for part in parts:
        part.verify()


def test_processes_make_the_same_shards(config: DataConfig, english: Tokenizer, tmp_path: Path) -> None:
    alone = prepare(config, english, tmp_path / "0")
    num_workers = 2 if config.min_score else 1
    assert prepare(with_options(config, num_workers=num_workers), english, tmp_path / "1") == alone


def test_interrupted_at_any_chunk_it_goes_on_to_the_same_files(
    config: DataConfig, english: Tokenizer, tmp_path: Path
) -> None:
    chunks: list[PreparationReport] = []
    expected = prepare(config, english, tmp_path / "whole", on_progress=chunks.append)
    assert len(chunks) >= 5
    for count in range(1, len(chunks) + 1):
        directory = tmp_path / f"after-{count}"
        with pytest.raises(Interrupted):
            prepare_shards(config, english, directory, on_progress=interrupt_after(count))
        assert prepare(config, english, directory) == expected, count


def test_interrupted_at_rows_by_chance_again_and_again_it_makes_the_same_files(
    config: DataConfig, english: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = prepare(config, english, tmp_path / "whole")
    chance, attempts = random.Random(0), 1

    class Failing(Examples):
        def __iter__(self) -> Iterator[Any]:
            left = chance.randrange(1, 15 + 5 * attempts)
            for item in super().__iter__():
                yield item
                left -= 1
                if not left:
                    raise Interrupted

    monkeypatch.setattr(preparation, "Examples", Failing)
    while True:
        try:
            result = prepare(config, english, tmp_path / "data")
        except Interrupted:
            attempts += 1
        else:
            break
    assert attempts > 2
    assert result == expected


def test_finished_preparation_is_left_as_it_is(config: DataConfig, english: Tokenizer, tmp_path: Path) -> None:
    first = prepare(config, english, tmp_path / "data")
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "data").rglob("*.*") if "lock" not in file.name}
    assert prepare(config, english, tmp_path / "data") == first
    assert times == {file: file.stat().st_mtime_ns for file in times}


KILLED_AT_EVERY_STEP = """
import json, os, pathlib, shutil, signal, sqlite3, sys
from anarcho_tokenize import DataConfig, Tokenizer, TokenShards, prepare_shards

tokenizer, target = Tokenizer.load(sys.argv[1]), pathlib.Path(sys.argv[2])
config = DataConfig(
    source=sys.argv[3], deduplicate=True, max_bad_share=0.2, validation_fraction=0.3, validation_tokens=60, shard_tokens=80, num_workers=0
)


class Unflushed(sqlite3.Connection):
    def executescript(self, script):
        return super().executescript(script.replace("synchronous = FULL", "synchronous = OFF"))


connect = sqlite3.connect
sqlite3.connect = lambda file, **options: connect(file, factory=Unflushed, **options)
os.fsync = lambda descriptor: None  # a kill loses nothing that was written


def die_at(step):
    count = 0

    def counted(function):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for owner, names in ((os, ("fsync",)), (pathlib.Path, ("replace", "rename", "unlink", "open", "mkdir"))):
        for name in names:
            setattr(owner, name, counted(getattr(owner, name)))


def attempt(step):
    child = os.fork()
    if child == 0:
        die_at(step)
        prepare_shards(config, tokenizer, target)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def files():
    found = {str(file.relative_to(target)): file.read_bytes() for file in target.rglob("*") if file.is_file()}
    state = json.loads(found["production.json"])
    found["production.json"] = {**state, "seconds": 0}
    return {name: data for name, data in found.items() if not name.startswith(("seen.sqlite", ".lock"))}


assert attempt(10**9) == 0
expected = files()
shutil.rmtree(target)
steps = states = 0
while True:
    steps += 1
    status = attempt(steps)
    if status == 0:
        break
    assert status == signal.SIGKILL, status
    for part in ("train", "validation"):
        if (target / part / "index.json").exists():
            TokenShards.open(target / part, growing=True).verify()
    states += (target / "production.json").exists()
    if steps % 3 == 0:
        assert attempt(steps // 2 + 1) in (0, signal.SIGKILL)
    assert attempt(10**9) == 0
    assert files() == expected, steps
    shutil.rmtree(target)
print(steps - 1, states, len(expected))
"""


def test_killed_at_any_step_it_goes_on_to_the_same_files(english: Tokenizer, tmp_path: Path) -> None:
    english.save(tmp_path / "tokenizer")
    rows: list[Any] = [{"text": text} for text in sentences(7)]
    rows[3:3] = [rows[0], b"{broken"]
    source = write_rows(tmp_path / "a.jsonl", rows)
    options = [str(tmp_path / "tokenizer"), str(tmp_path / "work" / "data"), source]
    (tmp_path / "work").mkdir()
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            KILLED_AT_EVERY_STEP,
            *options,
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    kills, with_state, num_files = map(int, run.stdout.split())
    assert kills > 40
    assert with_state > 20
    assert num_files >= 10


DISK_FULL = """
import os, pathlib, resource, signal, sys
from anarcho_tokenize import DataConfig, Tokenizer, prepare_shards

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
tokenizer, work = Tokenizer.load(sys.argv[1]), pathlib.Path(sys.argv[2])
deduplicate = sys.argv[4] == "True"
config = DataConfig(
    source=sys.argv[3], deduplicate=deduplicate, validation_fraction=0.2, shard_tokens=2000, num_workers=0
)
for limit in map(int, sys.argv[5:]):
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            prepare_shards(config, tokenizer, work / str(limit))
        except OSError as error:
            print(limit, type(error).__name__, error, flush=True)
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize("deduplicate", [False, True])
def test_full_disk_is_reported_and_left_behind(english: Tokenizer, tmp_path: Path, deduplicate: bool) -> None:
    english.save(tmp_path / "tokenizer")
    source = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in sentences(400)])
    limits = ["0", "100", "900", "1500", "2500", "3000"]
    options = [str(tmp_path / "tokenizer"), str(tmp_path), source, str(deduplicate), *limits]
    run = subprocess.run([sys.executable, "-c", DISK_FULL, *options], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    assert len(run.stdout.splitlines()) == len(limits), run.stdout
    assert ("seen.sqlite cannot be written" if deduplicate else "File too large") in run.stdout
    config = DataConfig(
        source=source, deduplicate=deduplicate, validation_fraction=0.2, shard_tokens=2000, num_workers=0
    )
    expected = prepare(config, english, tmp_path / "whole")
    for limit in limits:
        assert prepare(config, english, tmp_path / limit) == expected, limit


def test_full_disk_at_any_write_leaves_a_state_to_go_on_from(
    english: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also between the shards and production.json, and between that and the indexes."""
    (tmp_path / "source").mkdir()
    config = with_options(filtered(tmp_path / "source"), shard_tokens=600, num_workers=0)
    expected = prepare(config, english, tmp_path / "whole")
    fsync, left = os.fsync, iter(range(0))

    def failing(descriptor: int) -> None:
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    errors = set()
    for step in range(100):
        left = iter(range(step))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing)
            try:
                prepare_shards(config, english, tmp_path / str(step))
            except OSError as error:
                errors.add(error.errno)
            else:
                break
        assert prepare(config, english, tmp_path / str(step)) == expected, step
    assert 15 < step < 99
    assert errors == {28}


def test_killed_process_gives_a_sentence_and_the_directory_goes_on(english: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    config = with_options(plain(tmp_path / "source"), shard_tokens=50, num_workers=1)
    expected = prepare(with_options(config, num_workers=0), english, tmp_path / "whole")

    def kill(_: PreparationReport) -> None:
        for child in active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            child.join()

    with pytest.raises(ShardError, match=r"A process that tokenizes was killed, .* run the command again"):
        prepare_shards(config, english, tmp_path / "data", on_progress=kill)
    assert not active_children()
    assert prepare(config, english, tmp_path / "data") == expected


def test_directory_is_prepared_by_one_process_at_a_time(
    english: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(production, "_LOCK_SECONDS", 0)
    (tmp_path / "source").mkdir()
    config = with_options(plain(tmp_path / "source"), num_workers=0)
    refusals = []

    def second(_: PreparationReport) -> None:
        with pytest.raises(ShardError, match=r"is being prepared by another process; wait for it") as caught:
            prepare_shards(config, english, tmp_path / "data")
        refusals.append(caught)

    first = prepare(config, english, tmp_path / "data", on_progress=second)
    assert refusals
    assert prepare(config, english, tmp_path / "data") == first


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"shard_tokens": 301}, "shard_tokens"),
        ({"validation_fraction": 0.3, "deduplicate": True}, "deduplicate, validation_fraction"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"document_separator": "\n"}, "sources"),
    ],
)
def test_other_plan_is_refused_by_what_differs(
    english: Tokenizer, mixed: Tokenizer, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    (tmp_path / "source").mkdir()
    config = with_options(plain(tmp_path / "source"), shard_tokens=300, validation_fraction=0.2, num_workers=0)
    with pytest.raises(Interrupted):
        prepare_shards(config, english, tmp_path / "data", on_progress=interrupt_after(5))
    before = files_of(tmp_path / "data")
    with pytest.raises(ShardError, match=f"was begun with other values of {named}; go on with those"):
        prepare_shards(with_options(config, **change), english, tmp_path / "data")
    with pytest.raises(ShardError, match="other values of tokenizer_sha256"):
        prepare_shards(config, mixed, tmp_path / "data")
    assert files_of(tmp_path / "data") == before
    same = with_options(config, num_workers=1, max_bad_share=0.5, network_retries=1)
    assert prepare(same, english, tmp_path / "data") == prepare(config, english, tmp_path / "whole")


def test_changed_source_is_refused(english: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    config = with_options(plain(tmp_path / "source"), shard_tokens=300, num_workers=0)
    with pytest.raises(Interrupted):
        prepare_shards(config, english, tmp_path / "data", on_progress=interrupt_after(5))
    (tmp_path / "source" / "c.txt").write_text("One more.")
    with pytest.raises(SourceError, match=r"has changed since its reading began"):
        prepare_shards(config, english, tmp_path / "data")


@pytest.mark.parametrize("damage", [b"{", b"[]", b"{}", b'{"version": 2, "plan": 3}', b"\xff"])
def test_damaged_state_is_refused(english: Tokenizer, tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "source").mkdir()
    config = with_options(plain(tmp_path / "source"), num_workers=0)
    prepare_shards(config, english, tmp_path / "data")
    (tmp_path / "data" / "production.json").write_bytes(damage)
    with pytest.raises(ShardError, match=r"production\.json is damaged"):
        prepare_shards(config, english, tmp_path / "data")


@pytest.mark.parametrize(
    ("name", "damage", "sentence"),
    [
        ("seen.sqlite", None, r"seen\.sqlite is missing, by which duplicates"),
        ("seen.sqlite", b"no database" * 100, r"seen\.sqlite is damaged \(file is not a database\)"),
        ("quarantine.jsonl", b"", r"quarantine\.jsonl has 0 bytes; expected \d+ by production\.json"),
    ],
)
def test_lost_or_damaged_records_are_named(
    english: Tokenizer, tmp_path: Path, name: str, damage: bytes | None, sentence: str
) -> None:
    (tmp_path / "source").mkdir()
    config = with_options(filtered(tmp_path / "source"), deduplicate=True, shard_tokens=300, num_workers=0)
    with pytest.raises(Interrupted):
        prepare_shards(config, english, tmp_path / "data", on_progress=interrupt_after(5))
    for file in (tmp_path / "data").glob(f"{name}*"):
        file.unlink()
    if damage is not None:
        (tmp_path / "data" / name).write_bytes(damage)
    with pytest.raises(ShardError, match=sentence):
        prepare_shards(config, english, tmp_path / "data")


@pytest.mark.parametrize("occupant", ["data/notes.md", "data"])
def test_other_directory_is_never_written_to(english: Tokenizer, tmp_path: Path, occupant: str) -> None:
    (tmp_path / occupant).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / occupant).write_text("precious")
    (tmp_path / "source").mkdir()
    with pytest.raises(ShardError, match="exists already and holds no prepared data"):
        prepare_shards(plain(tmp_path / "source"), english, tmp_path / "data")
    with pytest.raises(ShardError, match="already exists and is not an empty directory"):
        write_shards(["text"], english, tmp_path / "data")
    assert (tmp_path / occupant).read_text() == "precious"
    assert len(list((tmp_path / occupant).parent.iterdir())) == (1 if "/" in occupant else 2)


BAD_ROWS = {
    "not JSON": (b'{"text": "half', "is not JSON", '{"text": "half'),
    "bad UTF-8": (b'{"text": "\xff"}', "is not UTF-8: byte 0xFF at offset", '{"text": "\ufffd"}'),
    "no object": (b"[1, 2]", "holds a list; expected an object", "[1, 2]"),
    "missing field": ({"body": "whale"}, "text", "whale"),
    "wrong type": ({"text": 7}, "text", "7"),
    "null": ({"text": None}, "text", "None"),
    "empty": ({"text": ""}, "holds no text; expected at least one character", ""),
    "NUL": ({"text": "a\0b"}, "holds a NUL character at character 1", "a\0b"),
    "lone surrogate": (b'{"text": "a\\ud800"}', "lone surrogate U+D800", "a"),
    "too large": ({"text": "x" * 3000}, "expected at most data.max_document_bytes, 2,000", "xxx"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_put_into_quarantine_with_its_place(english: Tokenizer, tmp_path: Path, case: str) -> None:
    bad, reason, excerpt = BAD_ROWS[case]
    rows: list[Any] = [{"text": text} for text in sentences(40)]
    good = [row["text"] for row in rows]
    rows[5:5] = [bad]
    source = write_rows(tmp_path / "a.jsonl", rows)
    config = DataConfig(source=source, max_document_bytes=2000, validation_fraction=0, num_workers=0)
    report = prepare_shards(config, english, tmp_path / "data")
    (entry,) = quarantine_of(tmp_path / "data")
    assert entry["place"] == f"{source}:6"
    assert reason in entry["reason"]
    assert excerpt in entry["excerpt"]
    assert len(entry["excerpt"]) <= 200
    assert (report.rows, report.quarantined, report.documents) == (41, 1, 40)
    assert texts_in(tmp_path / "data" / "train", english) == good


def test_broken_table_is_put_into_quarantine_and_the_next_one_is_read(english: Tokenizer, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = sentences(50)
    (tmp_path / "source").mkdir()
    for number in range(2):
        parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "source" / f"{number}.parquet")
    broken = tmp_path / "source" / "0.parquet"
    broken.write_bytes(broken.read_bytes()[:-20])
    config = DataConfig(source=str(tmp_path / "source"), validation_fraction=0, num_workers=0)
    prepare_shards(config, english, tmp_path / "data")
    (entry,) = quarantine_of(tmp_path / "data")
    assert entry["place"] == str(broken)
    assert "expected a whole, valid" in entry["reason"]
    assert texts_in(tmp_path / "data" / "train", english) == texts


def test_small_source_with_too_many_bad_rows_is_refused_at_its_end(english: Tokenizer, tmp_path: Path) -> None:
    rows = [{"text": text} for text in sentences(18)] + [b"{", b"["]
    config = DataConfig(source=write_rows(tmp_path / "a.jsonl", rows), validation_fraction=0, num_workers=0)
    sentence = (
        r"2 of 20 rows of .*a\.jsonl cannot be used, more than the share of 0\.05 that data\.max_bad_share allows; "
        r"the first: .*a\.jsonl:19 is not JSON"
    )
    for _ in range(2):
        with pytest.raises(SourceError, match=sentence):
            prepare_shards(config, english, tmp_path / "data")
    report = prepare_shards(with_options(config, max_bad_share=0.1), english, tmp_path / "data")
    assert (report.quarantined, len(quarantine_of(tmp_path / "data"))) == (2, 2)


def test_large_source_with_too_many_bad_rows_is_not_read_to_its_end(
    english: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(production, "_LEAST_ROWS", 100)
    rows: list[Any] = [{"text": text} for text in sentences(1000)]
    rows[10:12] = [b"{"] * 20
    rows[300:300] = [b"{"] * 20
    source = write_rows(tmp_path / "a.jsonl", rows)
    config = DataConfig(source=source, shard_tokens=300, max_bad_share=0.1, validation_fraction=0, num_workers=0)
    with pytest.raises(SourceError, match=r"(\d+) of 1?\d\d rows of") as caught:
        prepare_shards(config, english, tmp_path / "data")
    assert 100 <= int(str(caught.value).split()[2]) < 200, "not before a hundred rows, and not long after them"
    report = prepare_shards(with_options(config, max_bad_share=0.25), english, tmp_path / "data")
    assert report.quarantined == 40


def test_no_text_is_in_both_parts(config: DataConfig, english: Tokenizer, tmp_path: Path) -> None:
    prepare_shards(config, english, tmp_path / "data")
    train, validation = (set(texts_in(tmp_path / "data" / part, english)) for part in ("train", "validation"))
    assert train
    assert validation
    assert not train & validation


def test_repeated_passes_add_nothing_to_validation(english: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    config = with_options(mixed_sources(tmp_path / "source"), validation_fraction=0.2, num_workers=0)
    prepare_shards(config, english, tmp_path / "data")
    validation = texts_in(tmp_path / "data" / "validation", english)
    assert len(validation) == len(set(validation))
    assert len(texts_in(tmp_path / "data" / "train", english)) > 112 - len(validation), "some are trained on twice"


def test_larger_fraction_keeps_the_smaller_ones_documents() -> None:
    digests = [digest_of(text) for text in sentences(100)]
    few, many = ({digest for digest in digests if is_validation(digest, fraction=share)} for share in (0.1, 0.5))
    assert few < many


def test_validation_ends_with_the_document_that_reaches_its_bound(english: Tokenizer, tmp_path: Path) -> None:
    texts = sentences(300)
    source = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    config = DataConfig(source=source, validation_fraction=0.3, validation_tokens=500, shard_tokens=200, num_workers=0)
    complete_at = []

    def on_progress(report: PreparationReport) -> None:
        if json.loads((tmp_path / "data" / "validation" / "index.json").read_bytes())["complete"]:
            complete_at.append(report.rows)

    prepare_shards(config, english, tmp_path / "data", on_progress=on_progress)
    validation = TokenShards.open(tmp_path / "data" / "validation")
    held_out = [text for text in texts if is_validation(digest_of(text), fraction=0.3)]
    kept = texts_in(tmp_path / "data" / "validation", english)
    assert kept == held_out[: len(kept)]
    assert validation.document_starts()[-2] < 500 <= validation.num_tokens
    train = texts_in(tmp_path / "data" / "train", english)
    assert train == [text for text in texts if text not in held_out], "what is beyond the bound is not trained on"
    assert complete_at[0] < 150, "readers may begin with it as soon as it is full"


def test_reading_stops_after_max_tokens(english: Tokenizer, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in sentences(400)])
    config = DataConfig(source=source, max_tokens=2000, shard_tokens=300, validation_fraction=0.1, num_workers=0)
    report = prepare_shards(config, english, tmp_path / "data")
    train = TokenShards.open(tmp_path / "data" / "train")
    assert 2000 <= train.num_tokens < 2700
    assert report.rows < 200
    assert report.source_total_bytes is not None
    assert report.source_bytes < report.source_total_bytes


def test_the_end_of_a_single_document_is_kept_from_training(english: Tokenizer, tmp_path: Path) -> None:
    text = "".join(f"This is line number {number} of one long text.\n" for number in range(200))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("")
    for name, source in (("one", "a.txt"), ("two", "*.txt")):
        config = DataConfig(source=str(tmp_path / source), validation_fraction=0.1, max_bad_share=1, num_workers=0)
        prepare_shards(config, english, tmp_path / name)
        parts = [texts_in(tmp_path / name / part, english) for part in ("train", "validation")]
        train, validation = ("".join(part) for part in parts)
        assert train + validation == text
        assert train.endswith("\n")
        assert 0.08 < len(validation) / len(text) < 0.12


def test_the_end_of_a_text_that_is_trained_on_elsewhere_is_no_validation(english: Tokenizer, tmp_path: Path) -> None:
    texts = [f"{name} {' '.join(WORDS)}" for name in "abcdefgh"]
    trained = [text for text in texts if not is_validation(digest_of(text), fraction=0.1)]
    source = write_rows(tmp_path / "a.jsonl", [{"text": trained[0]}] * 2)
    config = DataConfig(source=source, validation_fraction=0.1, num_workers=0)
    with pytest.raises(ShardError, match="None of the 2 documents fell into validation"):
        prepare_shards(config, english, tmp_path / "data")
    first, second, small = ({"text": text} for text in trained[:3])
    large = SourceConfig(source=write_rows(tmp_path / "b.jsonl", [first, second]))
    repeated = SourceConfig(source=write_rows(tmp_path / "c.jsonl", [small]))
    config = DataConfig(
        sources=(large, repeated), mixture_end="repeat", deduplicate=True, validation_fraction=0.1, num_workers=0
    )
    prepare_shards(config, english, tmp_path / "repeated")
    (tail,) = texts_in(tmp_path / "repeated" / "validation", english)
    head = second["text"].removesuffix(tail)
    expected = [first["text"], small["text"], head, small["text"]]
    assert texts_in(tmp_path / "repeated" / "train", english) == expected


def size_of(part: Path) -> int:
    """Of the tokens that its index lists."""
    shards = json.loads((part / "index.json").read_bytes())["shards"]
    return sum(2 * shard["tokens"] for shard in shards if not shard["evicted"])


def test_disk_budget_is_kept_by_deleting_what_the_reader_has_released(english: Tokenizer, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in sentences(600)])
    config = DataConfig(
        source=source,
        shard_tokens=300,
        shuffle_tokens=300,
        validation_fraction=0.1,
        validation_tokens=100,
        num_workers=0,
    )
    whole = prepare(config, english, tmp_path / "whole")
    directory, budget = tmp_path / "data", 6000
    failures: list[BaseException] = []

    def produce() -> None:
        try:
            prepare_shards(config, english, directory, budget=budget)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    while not (directory / "train" / "index.json").exists():
        time.sleep(0.01)
    train = TokenShards.open(directory / "train", growing=True)
    read, sizes, ids = 0, [], []
    while not train.complete or read < train.num_tokens:
        stop = min(read + 100, train.num_tokens)
        ids += train.tokens(read, stop).tolist()
        read = stop
        release(directory, read)
        sizes.append(size_of(directory / "train"))
        train.refresh()
    thread.join()
    assert not failures
    assert ids == TokenShards.open(tmp_path / "whole" / "train").tokens(0, read).tolist()
    assert 2 * read > 2 * budget, "else nothing would be proven"
    assert max(sizes) <= budget + 1200, "at most one shard more, of one chunk more than shard_tokens"
    result = files_of(directory)
    kept = {name for name in result if name.endswith(".bin")}
    assert {f"train/shard-{number:05d}.bin" for number in range(3)}.isdisjoint(kept)
    for name in result.keys() & {name for name in whole if "shard" in name}:
        assert result[name] == whole[name]
    assert (
        TokenShards.open(directory / "train").fingerprint == TokenShards.open(tmp_path / "whole" / "train").fingerprint
    )


def test_producer_waits_for_its_reader_without_writing(
    english: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in sentences(600)])
    config = DataConfig(source=source, shard_tokens=300, shuffle_tokens=300, validation_fraction=0, num_workers=0)
    directory = tmp_path / "data"
    pauses = []

    def sleep(seconds: float) -> None:
        pauses.append((directory / "production.json").stat().st_mtime_ns)
        if len(pauses) == 3:
            raise Interrupted

    monkeypatch.setattr(production.time, "sleep", sleep)
    with pytest.raises(Interrupted):
        prepare_shards(config, english, directory, budget=6000)
    assert len(set(pauses)) == 1
    written = TokenShards.open(directory / "train", growing=True).num_tokens
    assert 2 * written <= 6000 + 1200
    pauses.clear()
    with pytest.raises(Interrupted):  # an attempt that goes on does not wait before its next commit
        prepare_shards(config, english, directory, budget=6000)
    release(directory, 10**9)
    prepare_shards(config, english, directory, budget=6000)
    assert size_of(directory / "train") <= 6000 + 1200


def test_budget_never_starves_a_reader_of_the_stretch_that_it_shuffles(english: Tokenizer, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in sentences(300)])
    config = DataConfig(source=source, shard_tokens=300, shuffle_tokens=10**6, validation_fraction=0.1, num_workers=0)
    prepare_shards(config, english, tmp_path / "data", budget=10)
    TokenShards.open(tmp_path / "data" / "train").verify()


def test_what_was_evicted_stays_so_after_a_kill_before_the_deletion(
    english: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anarcho_tokenize.shard_writer import ShardWriter

    source = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in sentences(300)])
    config = DataConfig(source=source, shard_tokens=300, shuffle_tokens=300, validation_fraction=0, num_workers=0)
    directory = tmp_path / "data"
    write_index = ShardWriter.write_index

    def failing(self: ShardWriter, *, complete: bool) -> None:
        if any(shard["evicted"] for shard in self.shards):
            raise Interrupted
        write_index(self, complete=complete)

    directory.mkdir()
    release(directory, 900)
    monkeypatch.setattr(ShardWriter, "write_index", failing)
    with pytest.raises(Interrupted):
        prepare_shards(config, english, directory, budget=3000)
    monkeypatch.undo()
    before = TokenShards.open(directory / "train", growing=True)
    assert not before.is_evicted(0)
    release(directory, 10**9)
    prepare_shards(config, english, directory, budget=3000)
    before.refresh()
    assert before.is_evicted(0)
    assert before.complete


def test_given_documents_are_written_whole_or_not_at_all(english: Tokenizer, tmp_path: Path) -> None:
    def failing() -> Iterator[str]:
        yield from sentences(50)
        raise OSError("the cable was pulled")

    with pytest.raises(OSError, match="the cable was pulled"):
        write_shards(failing(), english, tmp_path / "data", shard_tokens=10)
    with pytest.raises(ValueError, match=r"Document 2 holds"):
        write_shards(["a", "b\ud800"], english, tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_remains_of_a_killed_attempt_are_removed_by_the_next(english: Tokenizer, tmp_path: Path) -> None:
    remains = tmp_path / ".data.partial-1" / "train"
    remains.mkdir(parents=True)
    (remains / "shard-00000.bin").write_bytes(b"half")
    other = tmp_path / ".data2.partial-1"
    other.mkdir()
    (tmp_path / "data").mkdir()
    write_shards(sentences(9), english, tmp_path / "data", validation_fraction=0)
    TokenShards.open(tmp_path / "data" / "train").verify()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [other.name, "data"]


def test_attempts_at_the_same_time_do_not_disturb_each_other(english: Tokenizer, tmp_path: Path) -> None:
    english.save(tmp_path / "tokenizer")
    program = (
        "import sys; from anarcho_tokenize import Tokenizer, write_shards; "
        "write_shards(['other'], Tokenizer.load(sys.argv[1]), sys.argv[2], validation_fraction=0)"
    )

    def slow() -> Iterator[str]:
        yield "first"
        command = [sys.executable, "-c", program, str(tmp_path / "tokenizer"), str(tmp_path / "data")]
        subprocess.run(command, check=True)
        yield "second"

    with pytest.raises(ShardError, match="already exists and is not an empty directory"):
        write_shards(slow(), english, tmp_path / "data", validation_fraction=0)
    assert texts_in(tmp_path / "data" / "train", english) == ["other"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["data", "tokenizer"]


@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_documents_without_text_are_refused(english: Tokenizer, tmp_path: Path, documents: list[str]) -> None:
    with pytest.raises(ShardError, match="documents holds no document; expected at least one"):
        write_shards(documents, english, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_filters_that_leave_nothing_are_named(english: Tokenizer, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", [{"text": "short"}] * 3)
    config = DataConfig(source=source, min_chars=100, num_workers=0)
    with pytest.raises(ShardError, match=r"holds no document \(filters left out 3 rows\); expected at least one"):
        prepare_shards(config, english, tmp_path / "data")


@pytest.mark.parametrize(("fraction", "part"), [(0.0001, "validation"), (0.9999, "train")])
def test_part_without_documents_is_refused_with_a_way_out(
    english: Tokenizer, tmp_path: Path, fraction: float, part: str
) -> None:
    with pytest.raises(ShardError, match=rf"None of the 1 documents fell into {part} with .*data\.document_separator"):
        write_shards(["1"], english, tmp_path / "data", validation_fraction=fraction)


def test_what_is_reported_is_what_happened(english: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    config = with_options(filtered(tmp_path / "source"), deduplicate=True, validation_fraction=0.2, num_workers=0)
    rows = sentences(150)
    expected = {
        "language": sum(number % 5 >= 1 and not number % 7 for number in range(150)),
        "min_score": sum(not number % 5 for number in range(150)),
        "min_chars": sum(number % 5 >= 1 and number % 7 > 0 and len(rows[number]) < 30 for number in range(150)),
    }
    report = prepare_shards(config, english, tmp_path / "data")
    assert report.filtered == expected
    assert (report.quarantined, report.duplicates) == (5, 0)
    assert report.rows == 155 == report.documents + report.quarantined + sum(expected.values())
    assert report.bytes_per_token == report.bytes / report.tokens


def test_conversations_and_preferences_are_stored_with_their_masks(english: Tokenizer, tmp_path: Path) -> None:
    from anarcho_tokenize import Preference
    from anarcho_tokenize.chat import encode_conversation, encode_preference

    for form in (chat, preference):
        (tmp_path / form.__name__).mkdir()
        config = with_options(form(tmp_path / form.__name__), validation_fraction=0, shard_tokens=500, num_workers=0)
        report = prepare_shards(config, english, tmp_path / f"{form.__name__}-data")
        stored = TokenShards.open(tmp_path / f"{form.__name__}-data" / "train")
        expected = []
        for text in sentences(80 if form is chat else 60):
            if form is chat:
                expected.append(encode_conversation(english, [Message(**message) for message in talk(text)]))
            else:
                answers = ((Message("assistant", text),), (Message("assistant", text[::-1]),))
                expected += encode_preference(english, Preference((Message("user", "Say"),), *answers))
        starts = stored.document_starts().tolist()
        assert report.documents == len(expected) == len(starts) - 1
        for (start, stop), (ids, mask) in zip(pairwise(starts), expected, strict=True):
            assert stored.tokens(start, stop).tolist() == ids.tolist()
            assert stored.loss_mask(start, stop).tolist() == mask.tolist()


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(max_size=20), min_size=1, max_size=30),
    shard_tokens=st.integers(1, 60),
    stop=st.integers(1, 12),
    deduplicate=st.booleans(),
)
def test_any_texts_are_prepared_alike_with_and_without_an_interruption(
    english: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    shard_tokens: int,
    stop: int,
    deduplicate: bool,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    source = write_rows(folder / "a.jsonl", [{"text": text} for text in texts])
    config = DataConfig(
        source=source, shard_tokens=shard_tokens, deduplicate=deduplicate, max_bad_share=1, num_workers=0
    )

    def outcome(directory: Path, **options: Any) -> object:
        try:
            return prepare(config, english, directory, **options)
        except ShardError as error:
            return str(error)

    expected = outcome(folder / "whole")
    with suppress(Interrupted):
        outcome(folder / "data", on_progress=interrupt_after(stop))
    assert outcome(folder / "data") == expected
