"""A producer in a process of its own: it is started again where it was killed, tells why it failed, and never outlives its trainer."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from anarcho_tokenize import (
    DataConfig,
    NetworkError,
    PackedBatches,
    Producer,
    ShardError,
    SourceError,
    StreamedBatches,
    Tokenizer,
    TokenShards,
    background,
    prepare_shards,
)

TEXTS = [f"Paragraph {number} of the white whale. " * (number % 5 + 1) for number in range(400)]


@pytest.fixture
def tokenizer_directory(english: Tokenizer, tmp_path: Path) -> Path:
    english.save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return config_of(str(tmp_path / "a.jsonl"))


def config_of(source: str, **options: Any) -> DataConfig:
    return DataConfig(
        source=source,
        **{"shard_tokens": 500, "shuffle_tokens": 500, "validation_fraction": 0.0, "num_workers": 0, **options},
    )


@pytest.fixture
def start(tokenizer_directory: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[Producer, list[str]]]]:
    """Starts producers, with what they notify of, and stops them at the end."""
    producers = []

    def started(config: DataConfig) -> tuple[Producer, list[str]]:
        notices: list[str] = []
        producers.append(Producer(config, tokenizer_directory, tmp_path / "data", notify=notices.append))
        return producers[-1], notices

    yield started
    for producer in producers:
        producer.stop()


def wait_for(condition: Callable[[], object], *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.01)


def is_complete(directory: Path) -> bool:
    index = directory / "train" / "index.json"
    return index.exists() and json.loads(index.read_bytes())["complete"]


PF_EXITING = 0x4
"""Linux's mark of a process past its last instruction, whose files may be closed while it is still listed; see proc_pid_stat(5)."""


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is on its way out, or waits to be reaped, does not."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    status = Path(f"/proc/{pid}/stat")
    with suppress(OSError):
        if not Path("/proc/self/stat").exists():
            return True
        fields = status.read_text().rpartition(")")[2].split()
        return fields[0] != "Z" and not int(fields[6]) & PF_EXITING
    return False


def processes_of(session: int) -> list[int]:
    """All processes of a session that run, as `is_alive` has it; where there is no /proc, ``ps`` marks those that end with Z or E."""
    command = ["ps", "-A", "-o", "pid=,sess=,stat="]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    of_session = [(int(pid), status) for pid, number, status in rows if number == str(session)]
    return [pid for pid, status in of_session if not set(status) & set("ZE") and is_alive(pid)]


def fail_until(producer: Producer) -> Exception:
    """What `check` raises in the end."""
    caught: list[Exception] = []

    def failed() -> bool:
        try:
            producer.check()
        except Exception as error:
            caught.append(error)
        return bool(caught)

    wait_for(failed)
    return caught[0]


def test_producer_makes_what_preparing_makes(
    config: DataConfig, english: Tokenizer, start: Callable[..., Any], tmp_path: Path
) -> None:
    producer, notices = start(config)
    wait_for(lambda: producer.check() or is_complete(tmp_path / "data"))
    prepare_shards(config, english, tmp_path / "expected")
    made, expected = (TokenShards.open(tmp_path / name / "train") for name in ("data", "expected"))
    assert made.fingerprint == expected.fingerprint
    assert notices == []
    pid = producer.pid
    wait_for(lambda: not is_alive(pid))
    producer.check()
    assert producer.pid == pid, "a producer that is done is not started again"


def test_killed_producer_is_started_again_and_goes_on(
    config: DataConfig, english: Tokenizer, start: Callable[..., Any], tmp_path: Path
) -> None:
    producer, notices = start(config)
    wait_for((tmp_path / "data" / "production.json").exists)
    first = producer.pid
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: producer.check() or producer.pid != first or is_complete(tmp_path / "data"))
    wait_for(lambda: producer.check() or is_complete(tmp_path / "data"))
    assert notices == ["the process that prepares data ended with status -9; starting it again"]
    prepare_shards(config, english, tmp_path / "expected")
    made, expected = (TokenShards.open(tmp_path / name / "train") for name in ("data", "expected"))
    assert made.fingerprint == expected.fingerprint


def test_producer_that_always_dies_is_given_up(
    config: DataConfig, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    popen = subprocess.Popen
    started = []

    def dying(_: list[str], **options: Any) -> "subprocess.Popen[bytes]":
        started.append(popen(program, **options))
        return started[-1]

    monkeypatch.setattr(background.subprocess, "Popen", dying)
    producer, notices = start(config)
    error = fail_until(producer)
    assert isinstance(error, ShardError)
    assert "ended 6 times by itself without getting further, the last time with status -9" in str(error)
    assert (len(started), len(notices)) == (6, 5)
    with pytest.raises(ShardError, match="ended 6 times"):
        producer.check()


def test_headway_alone_renews_the_attempts(
    config: DataConfig, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that dies at the same place again and again is given up, though it tells of progress each time."""
    program = (
        "import os, sys; tokens = min(300, 100 * len(os.listdir(sys.argv[1]))); open(f'{sys.argv[1]}/{os.getpid()}', 'w');"
        'print(\'noise\'); print(\'anarcho-tokenize: {"event": "progress", "tokens": %d}\' % tokens, flush=True);'
        "print('anarcho-tokenize: {\"event', end='', flush=True); os.kill(os.getpid(), 9)"
    )
    popen = subprocess.Popen
    folder = Path(config.source).parent / "starts"
    folder.mkdir()
    monkeypatch.setattr(
        background.subprocess,
        "Popen",
        lambda _, **options: popen([sys.executable, "-c", program, str(folder)], **options),
    )
    producer, notices = start(config)
    assert "ended 6 times" in str(fail_until(producer))
    assert len(list(folder.iterdir())) == 3 + 6, "it got further three times, and then no more"
    assert len(notices) == 8


def test_failures_come_with_their_type(start: Callable[..., Any], tmp_path: Path, config: DataConfig) -> None:
    (tmp_path / "bad.jsonl").write_text("{\n" * 5)
    bad = fail_until(start(config_of(str(tmp_path / "bad.jsonl")))[0])
    assert type(bad) is SourceError
    assert "5 of 5 rows of" in str(bad)
    missing = fail_until(start(config_of(str(tmp_path / "none.jsonl")))[0])
    assert type(missing) is FileNotFoundError
    assert "none.jsonl does not exist" in str(missing)
    short = fail_until(start(config_of(config.source, validation_fraction=1e-9))[0])
    assert type(short) is ShardError


class Refusing(BaseHTTPRequestHandler):
    """A server that is busy."""

    def do_GET(self) -> None:
        self.send_error(503)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        """Nothing is printed."""


def test_network_failures_are_told_and_then_raised(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}/a.jsonl"
        producer, notices = start(config_of(address, network_retries=1))
        error = fail_until(producer)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert type(error) is NetworkError
    assert "the server answers 503, after 2 attempts" in str(error)
    assert len(notices) == 1
    assert "attempt 1 of 1 follows" in notices[0]


def test_stop_ends_all_processes(config: DataConfig, start: Callable[..., Any], tmp_path: Path) -> None:
    producer, _ = start(config_of(config.source, num_workers=2))
    wait_for((tmp_path / "data" / "train" / "index.json").exists)
    wait_for(lambda: len(processes_of(producer.pid)) >= 3)
    producer.stop()
    assert processes_of(producer.pid) == []
    producer.stop()


def test_stop_is_harmless_after_a_kill(config: DataConfig, start: Callable[..., Any]) -> None:
    producer, _ = start(config)
    os.kill(producer.pid, signal.SIGKILL)
    producer.stop()
    assert not is_alive(producer.pid)


TRAINER = """
import sys, time
from anarcho_tokenize import DataConfig, Producer

if __name__ == "__main__":
    config = DataConfig(source=sys.argv[1], shard_tokens=500, shuffle_tokens=500, num_workers=1, disk_budget=3000)
    producer = Producer(config, sys.argv[2], sys.argv[3], notify=print)
    print(producer.pid, flush=True)
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        time.sleep(600)
"""


@pytest.fixture
def trainer(
    config: DataConfig, tokenizer_directory: Path, tmp_path: Path
) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """A process with a producer that waits for it, and the producer's number."""
    command = [sys.executable, "-c", TRAINER, config.source, str(tokenizer_directory), str(tmp_path / "data")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        producer = int(process.stdout.readline())
        wait_for(lambda: (tmp_path / "data" / "production.json").exists() and len(processes_of(producer)) >= 2)
        yield process, producer
        process.kill()


def test_killed_trainer_leaves_no_process(trainer: tuple["subprocess.Popen[str]", int]) -> None:
    process, producer = trainer
    everyone = processes_of(producer)
    process.kill()
    wait_for(lambda: not any(map(is_alive, everyone)))
    assert processes_of(producer) == []


def test_interrupt_reaches_the_trainer_alone(trainer: tuple["subprocess.Popen[str]", int]) -> None:
    process, producer = trainer
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "interrupted\n"
    assert is_alive(producer)
    assert len(processes_of(producer)) >= 2


class FailingProducer:
    """Fails after the shards were written, in the moment in which it is asked."""

    failure: Exception | None = None

    def __init__(self, directory: Path, then: Callable[[], object]) -> None:
        self.directory = directory
        self._then = then

    def attend(self) -> None:
        if self.failure is None:
            self._then()
            self.failure = NetworkError("the cable was pulled")


def test_failure_is_raised_only_where_samples_are_missing(
    config: DataConfig, english: Tokenizer, tmp_path: Path
) -> None:
    """Also where shards and failure come between two looks."""

    class Interrupted(Exception):
        pass

    def write_some() -> None:
        left = iter(range(4))

        def stop(_: object) -> None:
            if next(left, None) is None:
                raise Interrupted

        with suppress(Interrupted):
            prepare_shards(config, english, tmp_path / "data", on_progress=stop)

    (tmp_path / "data").mkdir()
    left = iter(range(0))
    with pytest.raises(StopIteration):
        prepare_shards(config, english, tmp_path / "data", on_progress=lambda _: next(left))
    shards = TokenShards.open(tmp_path / "data" / "train", growing=True)
    assert shards.num_tokens < 1000
    packed = PackedBatches(shards, length=100, seed=0, shuffle_tokens=500)
    batches = StreamedBatches(packed, FailingProducer(tmp_path / "data", write_some))  # type: ignore[arg-type]
    assert batches.state(10, 5) == "ready", "they came before the failure"
    assert batches.batch(10, 5).tokens.shape == (5, 100)
    with pytest.raises(NetworkError, match="the cable was pulled"):
        batches.state(10_000, 1)
    assert batches.state(0, 5) == "ready"


def test_released_tokens_are_noted_for_the_producer(config: DataConfig, english: Tokenizer, tmp_path: Path) -> None:
    prepare_shards(config, english, tmp_path / "data")
    shards = TokenShards.open(tmp_path / "data" / "train")
    packed = PackedBatches(shards, length=100, seed=0, shuffle_tokens=500, single_epoch=True)
    batches = StreamedBatches(packed, FailingProducer(tmp_path / "data", lambda: None))  # type: ignore[arg-type]
    batches.release(23)
    noted = json.loads((tmp_path / "data" / "consumed.json").read_bytes())["tokens"]
    assert noted == packed.first_token(23)
    assert 1000 <= noted <= 2300
