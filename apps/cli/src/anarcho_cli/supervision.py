"""`--supervise`: a process that does nothing but train again where the system has killed the training.

Notable: the training is a child in a session of its own, so a Ctrl-C reaches it once, through this process. It is started again, with
``--resume``, only where a signal ended it that the system sends (a kernel short of memory sends SIGKILL); an error that the program
reports itself would come again. Progress is the step of the newest checkpoint: without any, so many restarts end it, each after a longer
pause. Pauses are measured by a monotonic clock.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import typer
from anarcho_monitor import MetricsLog, read_metrics
from anarcho_train import CheckpointStore

from anarcho_cli import config as configuration
from anarcho_cli.config import RunConfig
from anarcho_cli.launching import transport
from anarcho_cli.models import CHECKPOINTS
from anarcho_cli.output import note
from anarcho_cli.run_directory import CONFIG_FILE, METRICS_FILE
from anarcho_cli.runs import RunError, existing_run, new_run_directory

LONGEST_PAUSE = 60.0
"""Seconds before a restart."""

RESTARTED = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
"""Signals after which the training is started again."""

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def child_arguments(arguments: Sequence[str], *, name: str | None) -> list[str]:
    """The command line of the training: the supervisor's own, with the name of the run where it is none of its own."""
    kept = [argument for argument in arguments if argument != "--supervise"]
    return kept if name is None else [*kept, "--name", name]


def resuming(arguments: Sequence[str], run: Path) -> list[str]:
    """The command line that goes on with a run: the command itself, where it computes, and nothing that was decided once."""
    command = next(word for word in arguments if not word.startswith("-"))
    place = arguments.index(command) + 1
    kept, rest = list(arguments[:place]), iter(arguments[place:])
    for word in rest:
        option = word.partition("=")[0]
        if option in ("--device", "--backend"):
            kept += [word] if "=" in word else [word, next(rest, "")]
        elif option == "--json":
            kept.append(word)
    return [*kept, "--resume", str(run)]


class Supervisor:
    """Starts a training, and again where it was killed."""

    def __init__(
        self,
        run: Path,
        *,
        max_restarts: int,
        program: Sequence[str] = (sys.executable, "-m", "anarcho_cli"),
        wait: Callable[[threading.Event, float], Any] = threading.Event.wait,
    ) -> None:
        """``wait`` passes the time before a restart, or less where the event is set."""
        self.restarts = 0
        """In a row, without progress."""
        self._run = run
        self._max_restarts = max_restarts
        self._program = list(program)
        self._wait = wait
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()
        self._signal: int | None = None

    def supervise(self, first: Sequence[str]) -> int:
        """Runs ``anarcho`` with the arguments ``first``, and again as long as need be; returns the exit status for this process."""
        previous = {number: signal.signal(number, self._pass_on) for number in _PASSED_ON}
        try:
            return self._supervise(list(first))
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _supervise(self, arguments: list[str]) -> int:
        reached = self._reached()
        while True:
            status = self._train(arguments)
            if status >= 0 or -status not in RESTARTED:
                return status if status >= 0 else 128 - status
            if self._signal is not None:  # Somebody wanted it to end, and it did.
                return 128 + self._signal
            before, reached = reached, self._reached()
            self.restarts = self.restarts + 1 if reached == before else 1
            name = signal.Signals(-status).name
            if self.restarts > self._max_restarts:
                self._journal(
                    f"the training was killed by {name}{_reason(-status)}, and {self._max_restarts} restarts got no further than step "
                    f"{reached}; it is not started again",
                    signal=name,
                )
                return 128 - status
            pause = min(LONGEST_PAUSE, 2.0 ** (self.restarts - 1))
            self._journal(
                f"the training was killed by {name}{_reason(-status)}; it goes on from step {reached} in {pause:.0f} s "
                f"(restart {self.restarts} of {self._max_restarts} without progress)",
                signal=name,
                restarts=self.restarts,
                pause_seconds=pause,
            )
            self._wait(self._stopped, pause)
            if self._signal is not None:
                return 128 + self._signal
            if (self._run / CONFIG_FILE).is_file():
                arguments = resuming(arguments, self._run)

    def _train(self, arguments: Sequence[str]) -> int:
        self._child = subprocess.Popen([*self._program, *arguments], start_new_session=True)
        if self._signal is not None:  # It came while the process was being made.
            self._child.send_signal(self._signal)
        return self._child.wait()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self._stopped.set()
        if self._child is not None and self._child.returncode is None:
            self._child.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    def _reached(self) -> int:
        """The step that the training would go on from."""
        paths = CheckpointStore(self._run / CHECKPOINTS).list(check_hashes=False)
        return max((info.step for info in paths if info.valid), default=0)

    def _journal(self, message: str, **values: Any) -> None:
        """A note for people, and a line of the metrics file where there is one; it belongs to the attempt that has ended."""
        note(message)
        file = self._run / METRICS_FILE
        try:
            records = read_metrics(file)
            log = MetricsLog(file, run=self._run.name, attempt=max(record["attempt"] for record in records))
        except (OSError, ValueError):
            return
        reached = self._reached()
        tokens = max((record["tokens"] for record in records if record["step"] <= reached), default=0)
        try:
            log.write("event", step=reached, tokens=tokens, message=message, fault="killed", **values)
        except OSError:
            note("that could not be written to the metrics file")
        finally:
            log.close()


def _reason(number: int) -> str:
    return " (perhaps by the system, for want of memory)" if number == signal.SIGKILL else ""


def supervise_new(config: RunConfig, *, runs_dir: Path, name: str | None, preset: str) -> NoReturn:
    """Supervises the training that this very command line begins; ends with its exit status."""
    _require_alone()
    run = new_run_directory(runs_dir, name, preset=preset)
    arguments = child_arguments(sys.argv[1:], name=None if name is not None else run.name)
    raise typer.Exit(Supervisor(run, max_restarts=config.recovery.max_restarts).supervise(arguments))


def supervise_resumed(path: Path, *, overrides: Sequence[str]) -> NoReturn:
    """Supervises the training that this very command line goes on with; ends with its exit status."""
    _require_alone()
    run = existing_run(path)
    config = configuration.resolve(preset=None, file=run / CONFIG_FILE, overrides=overrides)
    arguments = child_arguments(sys.argv[1:], name=None)
    raise typer.Exit(Supervisor(run, max_restarts=config.recovery.max_restarts).supervise(arguments))


def _require_alone() -> None:
    if transport(os.environ) is not None:
        raise RunError(
            "--supervise was given to each of several processes, which their launcher starts and ends together; start them again without it"
        )
