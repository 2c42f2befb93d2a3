"""Runs of the whole command in processes that are forked from one that has loaded everything: a run for 0.3 s, not for 5.

This file is also the program of that process. It computes nothing and has no thread, so that a fork of it is as good as a process that
was started; each fork executes a command, is killed where its instruction says, and notes what it trains on:

* ``calls``: a list of [module, name, n, signal], the signal before the n-th call of a function or method;
* ``save`` with ``operation`` n: SIGKILL before the n-th file operation within the n-th writing of a checkpoint;
* ``save`` with ``bytes`` n: the system ends the process when a file of that checkpoint grows beyond n bytes, whoever writes it;
* ``after``: SIGKILL after so many seconds, whatever the process does then;
* ``after_begun``: the same, counted from where the training loop begins.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

CONSUMED = "consumed.jsonl"
"""What a run was trained on, beside its directory: a line for each step that was begun."""

PRELOADED = (
    *("anarcho_cli.main", "anarcho_cli.compose", "anarcho_cli.training_commands", "anarcho_cli.back_ends.torch"),
    *(
        "anarcho_train.steps.torch",
        "anarcho_train.losses.torch_preference",
        "anarcho_model.torch",
        "anarcho_model.weights",
    ),
    *(
        "torch._dynamo",
        "anarcho_model.generate.torch",
        "anarcho_model.lora.torch",
        "anarcho_model.lora.peft",
        "anarcho_optim.torch",
    ),
)
PRELOADED_MLX = (
    *("mlx.nn", "anarcho_cli.back_ends.mlx", "anarcho_train.steps.mlx", "anarcho_train.losses.mlx_preference"),
    *("anarcho_model.mlx", "anarcho_model.weights_mlx", "anarcho_model.generate.mlx", "anarcho_optim.mlx"),
)
SPAWNS = sys.platform == "darwin"
"""Where the frameworks do not survive a fork, each command is a process that begins anew."""
WRITING = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended."""

    status: int
    """Its exit status, or minus the number of the signal that ended it."""
    seconds: float
    """How long it ran."""
    loop_seconds: float
    """How long its training loop ran, and what came after it."""
    saves: list[dict[str, int]]
    """Of each checkpoint that it wrote to the end: ``operations``, and the size of its largest file."""
    log: str
    """What it has written."""


class Forks:
    """The prepared process, which forks one command at a time."""

    def __init__(self) -> None:
        # One thread: sums depend on the number, and several would wait for each other.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def run(self, *arguments: object, cwd: Path, **instruction: Any) -> Ended:
        """Runs ``anarcho`` with the arguments in a folder, to its end or to the one that the instruction gives it."""
        request = {"arguments": [str(part) for part in arguments], "cwd": str(cwd), **instruction}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()), log=(cwd / "log").read_text(errors="replace"))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _serve() -> None:
    """Forks a command for each line of standard input, and answers with how it ended."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    command = None if SPAWNS else _prepared_command()
    gc.freeze()  # A collection in a fork would copy every page.
    for line in sys.stdin:
        answer, modules = _fork(json.loads(line), command)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if not SPAWNS:
            _load(modules)  # What only the first of a kind has to load.
            gc.freeze()
    os._exit(0)  # Nothing is left to do, and libraries take their time for it.


def _load(modules: Sequence[str]) -> None:
    for name in modules:
        if name not in sys.modules:
            importlib.import_module(name)
    tasks = Path("/proc/self/task")
    assert not tasks.is_dir() or len(list(tasks.iterdir())) == 1, "a fork has none of the threads that it begins with"


def _prepared_command() -> Callable[[], Any]:
    """What `anarcho_cli.main.run` calls, and the schema of the configuration, which are the same for all forks."""
    _load(PRELOADED)
    with suppress(ImportError):
        _load(PRELOADED_MLX)

    from anarcho_cli import config
    from anarcho_cli.main import app
    from typer.main import get_command

    config.dumps(config.resolve(preset="quickstart"))
    return get_command(app)


def _fork(request: dict[str, Any], command: Callable[[], Any] | None) -> tuple[dict[str, Any], list[str]]:
    reader, writer = os.pipe()
    if SPAWNS:
        spawned = subprocess.Popen([sys.executable, __file__, json.dumps(request), str(writer)], pass_fds=[writer])
        process = spawned.pid
    elif not (process := os.fork()):
        os.close(reader)
        _execute(request, command, writer)
    os.close(writer)
    started = begun = time.monotonic()
    moment, told = started + request["after"] if "after" in request else None, b""
    while True:
        remaining = None if moment is None else max(0.0, moment - time.monotonic())
        if not select.select([reader], [], [], remaining)[0]:
            os.kill(process, signal.SIGKILL)
            moment = None
        elif not (part := os.read(reader, 1 << 16)):
            break  # It has ended.
        else:
            told += part
            if begun == started:
                begun = time.monotonic()
                moment = begun + request["after_begun"] if "after_begun" in request else moment
    os.close(reader)
    ended = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    # A process that was killed, or has left at once, reports nothing.
    report = json.loads(told) if status >= 0 and told.strip() else {"saves": [], "modules": []}
    seconds = {"seconds": ended - started, "loop_seconds": ended - begun}
    return {"status": status, "saves": report["saves"], **seconds}, report["modules"]


def _execute(request: dict[str, Any], command: Callable[[], Any] | None, report: int) -> None:
    """Executes the command in this fork, which ends with it."""
    os.chdir(request["cwd"])
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(log, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    before, saves, status = set(sys.modules), list[dict[str, int]](), 1
    try:
        _note_steps()
        _watch_saves(saves, **{key: request[key] for key in ("save", "operation", "bytes") if key in request})
        _call_before("anarcho_train.loop", "Loop.run", lambda: os.write(report, b"\n"))
        for module, name, when, number in request.get("calls", ()):
            _call_before(module, name, partial(os.kill, os.getpid(), signal.Signals[number]), when=when)
        sys.argv = ["anarcho", *request["arguments"]]
        (command or _prepared_command())()
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        loaded = [
            name
            for name, module in sys.modules.items()
            if name not in before and getattr(module, "__spec__", None) is not None and name != "__main__"
        ]
        with os.fdopen(report, "w") as pipe:
            json.dump({"saves": saves, "modules": loaded}, pipe)
        os._exit(status)


def _note_steps() -> None:
    """Notes for each step, before it is made, what it is made of."""
    for module, name in (("anarcho_train.steps.torch", "TorchStep"), ("anarcho_train.steps.mlx", "MlxStep")):
        if module in sys.modules:
            step = getattr(sys.modules[module], name)
            step.train = _noting(step.train)


def _noting(train: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(train)
    def noted(self: Any, micro_batches: Sequence[Any], *, schedule: Any) -> Any:
        digest = hashlib.sha256()
        for batch in micro_batches:
            for part in (batch.tokens, batch.targets, batch.weights):
                digest.update(part.tobytes())
        line = json.dumps({"step": schedule.number, "samples": digest.hexdigest()}) + "\n"
        file = os.open(CONSUMED, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, line.encode())
        os.close(file)
        return train(self, micro_batches, schedule=schedule)

    return noted


def _watch_saves(saves: list[dict[str, int]], *, save: int = 0, operation: int = 0, bytes: int = 0) -> None:  # noqa: A002
    """Counts the file operations of each checkpoint that is written, and ends the process in one of them."""
    from anarcho_train import CheckpointStore

    write, begun, count, writing = CheckpointStore.save, 0, 0, False

    def counted() -> None:
        nonlocal count
        if writing:
            count += 1
            if (begun, count) == (save, operation):
                os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if opens or event in WRITING:
            counted()

    @wraps(write)
    def watched(*arguments: Any, **keywords: Any) -> Path:
        nonlocal begun, count, writing
        begun, count, writing = begun + 1, 0, True
        if begun == save and bytes:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, bytes))
        path = write(*arguments, **keywords)
        writing = False
        largest = max(file.stat().st_size for file in path.rglob("*") if file.is_file())
        saves.append({"operations": count, "largest": largest})
        return path

    CheckpointStore.save = watched
    fsync = os.fsync

    def counted_fsync(file: int) -> None:
        counted()
        fsync(file)

    os.fsync = counted_fsync
    sys.addaudithook(audit)


def _call_before(module: str, name: str, action: Callable[[], Any], *, when: int = 1) -> None:
    """Lets an action come before the ``when``-th call of a function, or of a method."""
    owner = importlib.import_module(module)
    *outer, last = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), 0

    @wraps(original)
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == when:
            action()
        return original(*arguments, **keywords)

    setattr(owner, last, wrapper)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _execute(json.loads(sys.argv[1]), _prepared_command(), int(sys.argv[2]))
    _serve()
