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
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Literal

from anarcho_tokenize.config import DataConfig, data_config_of
from anarcho_tokenize.errors import ShardError, SourceError, TokenizerError
from anarcho_tokenize.loading import load_tokenizer
from anarcho_tokenize.packing import Batch, PackedBatches
from anarcho_tokenize.preparation import prepare_shards, release
from anarcho_tokenize.sources import NetworkError
from anarcho_tokenize.workers import KilledError

_ERRORS: dict[str, type[Exception]] = {
    error.__name__: error
    for error in (FileNotFoundError, NetworkError, OSError, PermissionError, ShardError, SourceError, TokenizerError)
}
_MESSAGE = b"anarcho-tokenize: "
_MOST_RESTARTS = 5
_NICENESS = 5
_STOP_SECONDS = 10


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
        """Start it; `notify` is told, in a line, of network failures and of restarts, when `attend` or `check` is called."""
        work = {
            "config": asdict(config),
            "tokenizer": os.fspath(tokenizer_directory),
            "directory": os.fspath(directory),
        }
        self.directory = Path(directory)
        self._work = (json.dumps(work) + "\n").encode()
        self._notify = notify
        self._restarts = 0
        self._most_tokens = 0
        self._done = False
        self.failure: Exception | None = None
        """What the process has failed with for good, as `attend` has seen it."""
        self._start()

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def check(self) -> None:
        """Do what `attend` does, and raise what the process has failed with for good."""
        self.attend()
        if self.failure is not None:
            raise self.failure

    def attend(self) -> None:
        """Pass messages on; start the process again where it was killed."""
        ended = self._process.poll() is not None
        if ended:
            self._listener.join()
        while not self._messages.empty():
            self._receive(self._messages.get())
        if not ended or self._done or self.failure is not None:
            return
        status = self._process.returncode
        if self._restarts == _MOST_RESTARTS:
            self.failure = ShardError(
                f"The process that prepares {self.directory} ended {self._restarts + 1} times by itself without getting further, the last "
                f"time with status {status}; see its messages above, and run the command again to go on."
            )
            return
        self._restarts += 1
        _close(self._process.stdin)
        self._notify(f"the process that prepares data ended with status {status}; starting it again")
        self._start()

    def stop(self) -> None:
        """End the process and those that it has started; what it has not committed is made again by the next."""
        _close(self._process.stdin)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join()  # until the last process that holds the other end of the pipe has ended

    def _start(self) -> None:
        self._messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        # A session of its own, so that Ctrl-C reaches the trainer alone, which then decides; -P, so that modules are not looked for here.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "anarcho_tokenize.background"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._listener = threading.Thread(target=_listen, args=(self._process, self._messages), daemon=True)
        self._listener.start()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead already, which is seen next time
            self._process.stdin.write(self._work)
            self._process.stdin.flush()

    def _receive(self, message: dict[str, Any]) -> None:
        match message["event"]:
            case "notice":
                self._notify(message["message"])
            case "progress":
                # Only what was never reached before: one that always fails at the same place is not started for ever.
                if message["tokens"] > self._most_tokens:
                    self._most_tokens, self._restarts = message["tokens"], 0
            case "done":
                self._done = True
            case "failed":
                self.failure = _ERRORS.get(message["error"], ShardError)(message["message"])


def _listen(process: "subprocess.Popen[bytes]", messages: "queue.SimpleQueue[dict[str, Any]]") -> None:
    """Take messages until the pipe is closed; other lines are what a library prints."""
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            if not line.startswith(_MESSAGE):
                sys.stderr.write(line.decode(errors="replace"))
            elif line.endswith(b"\n"):  # else the process was killed within it
                messages.put(json.loads(line.removeprefix(_MESSAGE)))


def _close(stream: IO[bytes] | None) -> None:
    """Close the standard input of a process that may be dead."""
    assert stream is not None
    with suppress(BrokenPipeError):
        stream.close()


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
        self._producer.attend()  # first: what it failed with then came after all that the shards hold
        failure = self._producer.failure
        state = self._batches.state(first_sample, count)
        if state == "waiting" and failure is not None:
            raise failure
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
    config = data_config_of(work["config"])
    try:
        prepare_shards(
            config,
            load_tokenizer(work["tokenizer"]),
            work["directory"],
            on_progress=lambda report: _tell(event="progress", tokens=report.tokens),
            notify=lambda message: _tell(event="notice", message=message),
            budget=config.disk_budget,
        )
    except KilledError as error:
        _tell(event="notice", message=str(error))
        sys.exit(1)
    except (ValueError, OSError) as error:
        _tell(event="failed", error=type(error).__name__, message=str(error))
    else:
        _tell(event="done")


def _tell(**message: Any) -> None:
    sys.stdout.buffer.write(_MESSAGE + json.dumps(message).encode() + b"\n")
    sys.stdout.buffer.flush()


def _end_with_parent() -> None:
    # Not through sys.stdin, whose lock a waiting thread would hold when the interpreter ends.
    while os.read(0, 1):
        pass
    os._exit(0)


if __name__ == "__main__":
    _main()
