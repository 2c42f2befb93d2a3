"""Producer and trainer are killed at random, again and again: shards and consumed samples are those of an uninterrupted run.

ANARCHO_STREAM_KILLS sets the number of kills for each kind of source.
"""

import gzip
import hashlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from anarcho_tokenize import Tokenizer

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes of a session in /proc")
pyarrow = pytest.importorskip("pyarrow")

HERE = Path(__file__).parent
KILLS = int(os.environ.get("ANARCHO_STREAM_KILLS", "1"))
SEPARATOR = "<|doc|>"
OPTIONS = {
    "shard_tokens": 1000,
    "shuffle_tokens": 700,
    "validation_fraction": 0.05,
    "validation_tokens": 200,
    "streaming": True,
    "num_workers": 1,
    "max_bad_share": 0.2,
}


def load_server() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hub_server", HERE / "hub_server.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def texts(chapters: list[str]) -> list[str]:
    """Paragraphs, of which some are there several times."""
    paragraphs = [part for chapter in chapters[:20] for part in chapter.split("\n\n") if part.strip()]
    return paragraphs + paragraphs[::9]


def text_source(folder: Path, texts: list[str]) -> dict[str, Any]:
    (folder / "a.txt").write_text(SEPARATOR.join(texts))
    return {"source": str(folder), "document_separator": SEPARATOR}


def gzip_source(folder: Path, texts: list[str]) -> dict[str, Any]:
    lines = [json.dumps({"text": text}).encode() for text in texts]
    lines[::40] = [b"{broken"] * len(lines[::40])
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    return {"source": str(folder)}


def parquet_source(folder: Path, texts: list[str]) -> dict[str, Any]:
    from pyarrow import parquet

    half = len(texts) // 2
    for number, part in enumerate((texts[:half], texts[half:])):
        parquet.write_table(pyarrow.table({"text": part}), folder / f"{number}.parquet", row_group_size=50)
    return {"source": str(folder)}


def mixed_source(folder: Path, texts: list[str]) -> dict[str, Any]:
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    third = len(texts) // 3
    large = text_source(folder / "a", texts[third:]) | {"weight": 2.0}
    small = gzip_source(folder / "b", texts[: third + 30])
    return {"sources": [large, small], "deduplicate": True, "mixture_end": "repeat"}


def hub_source(folder: Path, texts: list[str]) -> dict[str, Any]:
    (folder / "org" / "whales").mkdir(parents=True)
    gzip_source(folder / "org" / "whales", texts)
    return {"source": "hf://org/whales", "network_retries": 50}


SOURCES = {
    "text": text_source,
    "jsonl.gz": gzip_source,
    "parquet": parquet_source,
    "mixture": mixed_source,
    "hub": hub_source,
}


class Run:
    """A run in a directory of its own, which is started as often as it ends before its end."""

    def __init__(self, directory: Path, config: dict[str, Any], tokenizer: Path, *, step_seconds: float) -> None:
        directory.mkdir()
        self.directory = directory
        request = {"config": config, "tokenizer": str(tokenizer), "directory": str(directory)}
        self.request = directory / "request.json"
        self.request.write_text(json.dumps(request | {"step_seconds": step_seconds}))

    def start(self, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
        with (self.directory / "errors.log").open("ab") as errors:
            return subprocess.Popen(
                [sys.executable, str(HERE / "stream_trainer.py"), str(self.request)], env=environment, stderr=errors
            )

    def result(self) -> dict[str, str]:
        """Names and hashes of all that was made."""
        names = [*(self.directory / "data").glob("*/*"), self.directory / "data" / "quarantine.jsonl"]
        names.append(self.directory / "consumed.log")
        return {str(file.relative_to(self.directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in names}

    def is_prepared(self) -> bool:
        index = self.directory / "data" / "train" / "index.json"
        return index.exists() and json.loads(index.read_bytes())["complete"]

    def producer(self) -> int | None:
        file = self.directory / "producer.pid"
        text = file.read_text() if file.exists() else ""
        return int(text) if text else None


def children_of(pid: int) -> list[int]:
    """Processes that tokenize, of a producer."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == pid and b"spawn_main" in command:
            found.append(int(folder.name))
    return found


def await_pids(run: Run, target: str) -> list[int]:
    """The run's producer or its tokenizing processes, once there are any; none where they do not come."""
    for _ in range(100):
        producer = run.producer()
        pids = [] if producer is None else [producer] if target == "producer" else children_of(producer)
        if pids:
            return pids
        time.sleep(0.01)
    return []


def kill(pid: int) -> bool:
    """Kill a process of the run; False where it is not there any more."""
    try:
        command = (Path("/proc") / str(pid) / "cmdline").read_bytes()
        if b"anarcho_tokenize" not in command and b"spawn_main" not in command and b"stream_trainer" not in command:
            return False
        os.kill(pid, signal.SIGKILL)
    except OSError:
        return False
    return True


def run_with_kills(run: Run, environment: dict[str, str], *, kills: int, seed: int) -> dict[str, int]:
    """Run to the end, through so many kills; returns how many hit what."""
    chance = random.Random(seed)
    hits = {"trainer": 0, "producer": 0, "worker": 0}
    trainer = run.start(environment)
    deadline = time.monotonic() + 300
    try:
        while sum(hits.values()) < kills:
            assert time.monotonic() < deadline, (hits, (run.directory / "errors.log").read_text())
            if trainer.poll() is not None:
                if trainer.returncode == 0:
                    break
                trainer = run.start(environment)
            choices = ["trainer"] if run.is_prepared() else ["trainer", "producer", "producer", "worker", "worker"]
            target = chance.choice(choices)
            pids = [trainer.pid] if target == "trainer" else await_pids(run, target)
            time.sleep(chance.uniform(0, 1.5 if target == "trainer" else 0.6))
            hits[target] += kill(chance.choice(pids)) if pids else 0
        while trainer.wait(120) != 0:
            assert time.monotonic() < deadline, (run.directory / "errors.log").read_text()
            trainer = run.start(environment)
    finally:
        trainer.kill()
        trainer.wait()
    return hits


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """With a hub of the tests in place of the real one, which drops connections."""
    (tmp_path / "source").mkdir()
    module = load_server()
    with module.serving(tmp_path / "source") as server:
        server.drop_every_bytes = 60_000
        offline = {"HF_HOME": str(tmp_path / "hub"), "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
        yield os.environ | offline | {"OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
def test_kills_change_neither_shards_nor_consumed_samples(
    tmp_path: Path, english: Tokenizer, texts: list[str], environment: dict[str, str], kind: str
) -> None:
    english.save(tmp_path / "tokenizer")
    config = OPTIONS | SOURCES[kind](tmp_path / "source", texts)
    whole = Run(tmp_path / "whole", config, tmp_path / "tokenizer", step_seconds=0)
    assert whole.start(environment).wait(200) == 0, (whole.directory / "errors.log").read_text()
    killed = Run(tmp_path / "killed", config, tmp_path / "tokenizer", step_seconds=0.005)
    hits = run_with_kills(killed, environment, kills=KILLS, seed=len(kind))
    assert killed.result() == whole.result(), hits
    print(kind, hits, len(whole.result()), "files")
    assert len(whole.result()) > 20
    assert sum(hits.values()) >= min(KILLS, 3)
    lines = (killed.directory / "consumed.log").read_text().splitlines()
    assert [int(line.split()[0]) for line in lines] == list(range(0, 4 * len(lines), 4))
