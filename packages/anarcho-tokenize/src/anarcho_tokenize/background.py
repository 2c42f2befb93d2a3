"""Preparation in a process of its own, beside a trainer that already reads what is there.

The process shares nothing with the trainer but the directory and two pipes. Its standard input brings the work and is its lifeline: when it
is closed, because the trainer ends in whatever way, the process ends, too. Its standard output brings messages, one JSON object a line.
Killed, it is started again and goes on where its last commit was; what failed for good is raised in the trainer when that has to wait.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from anarcho_tokenize.bpe import Tokenizer
from anarcho_tokenize.config import DataConfig, SourceConfig
from anarcho_tokenize.errors import ShardError, SourceError, TokenizerError
from anarcho_tokenize.packing import Batch, PackedBatches
from anarcho_tokenize.preparation import prepare_shards, release
from anarcho_tokenize.sources import NetworkError

_ERRORS: dict[str, type[Exception]] = {
    error.__name__: error
    for error in (FileNotFoundError, NetworkError, OSError, PermissionError, ShardError, SourceError, TokenizerError)
}
_MOST_RESTARTS = 5
_NICENESS = 5


class Producer:
    """A process that runs `prepare_shards`."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer_directory: str | os.PathLike[str],
        directory: str | os.PathLike[str],
        *,
        notify: Callable[[str], None],
    ) -> None:
        """Start it; `notify` is told, in a line, of network failures and of restarts, when `check` is called."""
        work = {"config": asdict(config), "tokenizer": os.fspath(tokenizer_directory), "directory": os.fspath(directory)}
        self.directory = Path(directory)
        self._work = (json.dumps(work) + "\n").encode()
        self._notify = notify
        self._restarts = 0
        self._done = False
        self._failure: Exception | None = None
        self._start()

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def check(self) -> None:
        """Pass messages on; start the process again where it was killed; raise what it failed with."""
        ended = self._process.poll() is not None
        if ended:
            self._listener.join()
        while not self._messages.empty():
            self._receive(self._messages.get())
        if self._failure is not None:
            raise self._failure
        if ended and not self._done:
            if self._restarts >= _MOST_RESTARTS:
                raise ShardError(
                    f"The process that prepares {self.directory} ended {self._restarts + 1} times by itself, the last time with status "
                    f"{self._process.returncode}; see its messages above, and run the command again to go on."
                )
            self._restarts += 1
            self._notify(f"the process that prepares data ended with status {self._process.returncode}; starting it again")
            self._start()

    def stop(self) -> None:
        """End the process; what it has not committed is made again by the next."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._listener.join()

    def _start(self) -> None:
        self._messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        # A session of its own, so that Ctrl-C reaches the trainer alone, which then decides.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "anarcho_tokenize.background"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, args=(self._process, self._messages), daemon=True)
        self._listener.start()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(self._work)
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it is dead already, which the next check sees

    @staticmethod
    def _listen(process: "subprocess.Popen[bytes]", messages: "queue.SimpleQueue[dict[str, Any]]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith(b"\n"):
                messages.put(json.loads(line))

    def _receive(self, message: dict[str, Any]) -> None:
        match message["event"]:
            case "notice":
                self._notify(message["message"])
            case "progress":
                self._restarts = 0
            case "done":
                self._done = True
            case "failed":
                self._failure = _ERRORS.get(message["error"], ShardError)(message["message"])


class StreamedBatches:
    """Training batches of shards that a producer still appends to; see `PackedBatches`, which they are otherwise."""

    def __init__(self, batches: PackedBatches, producer: Producer) -> None:
        self._batches = batches
        self._producer = producer

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples `first_sample` to `first_sample + count - 1`, which must be there."""
        return self._batches.batch(first_sample, count)

    def position(self, sample: int) -> dict[str, int]:
        """Where in which epoch a sample is."""
        return self._batches.position(sample)

    def state(self, first_sample: int, count: int) -> Literal["ready", "waiting", "ended"]:
        """Whether these samples are there; raises what the producer failed with where they never will be."""
        state = self._batches.state(first_sample, count)
        if state == "waiting":
            self._producer.check()
        return state

    def release(self, sample: int) -> None:
        """Samples before this one are not needed any more."""
        release(self._producer.directory, self._batches.first_token(sample))


def _main() -> None:
    """The process."""
    work = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(_NICENESS)  # where both compute on the same cores, the trainer goes first
    values = work["config"]
    sources = tuple(SourceConfig(**_with_tuples(source)) for source in values.pop("sources"))
    config = DataConfig(**_with_tuples(values), sources=sources)
    try:
        prepare_shards(
            config,
            Tokenizer.load(work["tokenizer"]),
            work["directory"],
            on_progress=lambda _: _tell(event="progress"),
            notify=lambda message: _tell(event="notice", message=message),
            budget=config.disk_budget,
        )
    except (ValueError, OSError) as error:
        _tell(event="failed", error=type(error).__name__, message=str(error))
    else:
        _tell(event="done")


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _tell(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    # Not through sys.stdin, whose lock a waiting thread would hold when the interpreter ends.
    while os.read(0, 1):
        pass
    os._exit(0)


if __name__ == "__main__":
    _main()
