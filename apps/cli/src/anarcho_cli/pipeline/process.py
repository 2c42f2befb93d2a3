"""A stage as a process of its own, which gets the signals that the pipeline gets.

Notable: it has its own session, because a terminal would otherwise send Ctrl-C to it as well, and a second signal means to a
training run that it shall end at once.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, BinaryIO

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def anarcho(arguments: Sequence[str]) -> list[str]:
    """The command line of `anarcho`, in this interpreter."""
    return [sys.executable, "-m", "anarcho_cli", *arguments]


class Processes:
    """Context in which SIGINT, SIGTERM and SIGHUP go to the process that runs; ``number`` is the first that came."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Processes:
        for number in FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:  # As under nohup.
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str], *, output: BinaryIO | int, started: Callable[[int], None]) -> int:
        """Runs a command to its end and returns its exit status, 128 + the signal's number where a signal ended it.

        ``output`` takes its standard output; ``started`` is told the number of the process.
        """
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, start_new_session=True, restore_signals=True
        )
        try:
            if self.number is not None:  # It came before there was a process to pass it to.
                self._process.send_signal(self.number)
            started(self._process.pid)
            status = self._process.wait()
        except BaseException:
            self._process.terminate()
            self._process.wait()
            raise
        finally:
            self._process = None
        if self.number is not None and status != 0:
            return 128 + self.number
        return 128 - status if status < 0 else status

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if self._process is not None:
            self._process.send_signal(number)
