"""Processes of one run as `mlx.launch` starts them, forked from a server that has loaded what they need: a process for 0.1 s, not 2.

A rank that is given a fault has it in its n-th step; what each rank trains on is noted, row by row.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_RANK = "__rank__"
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        *("anarcho_cli.compose", "anarcho_cli.launching", "anarcho_cli.commands.pretrain", "anarcho_cli.commands.tune"),
        *("anarcho_cli.back_ends.mlx", "anarcho_train.steps.mlx", "anarcho_train.losses.mlx_preference", "mlx.nn"),
        *("anarcho_model.mlx", "anarcho_model.weights_mlx", "anarcho_model.generate.mlx", "anarcho_optim.mlx"),
    ]
)


class Launched:
    """Processes with the same arguments, or each with its own, in a directory that they share."""

    def __init__(
        self,
        directory: Path,
        arguments: Sequence[Sequence[object]],
        *,
        faults: Mapping[int, tuple[str, int]] | None = None,
    ) -> None:
        """``faults`` is {rank: (signal that it sends to itself, before which of its steps)}."""
        self.directory = directory
        hosts = directory / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(len(arguments))]))
        self.processes = [
            _SERVER.Process(
                # By its path: pytest alone knows this module by a name.
                target=runpy.run_path,
                args=(
                    __file__,
                    {
                        "RANK": (
                            *(rank, [str(part) for part in own], str(directory)),
                            *(len(arguments), (faults or {}).get(rank)),
                        )
                    },
                    _RANK,
                ),
            )
            for rank, own in enumerate(arguments)
        ]
        for process in self.processes:
            process.start()

    def exit_codes(self, *, timeout: float = 60) -> list[int]:
        """How they ended; a fault's signal is negative. Those that have not ended after the timeout are killed, which is seen here."""
        for process in self.processes:
            process.join(timeout)
        return [self._end(process) for process in self.processes]

    def errors(self, rank: int) -> str:
        """What a rank has written to standard error."""
        return (self.directory / f"stderr-{rank}.txt").read_text()

    def output(self, rank: int) -> str:
        """What a rank has written to standard output."""
        return (self.directory / f"stdout-{rank}.txt").read_text()

    def rows(self) -> list[list[str]]:
        """The rows of each step that all ranks have made, in the order of the ranks."""
        files = [self.directory / f"rows-{rank}.jsonl" for rank in range(len(self.processes))]
        by_rank = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        return [[row for share in step for row in share] for step in zip(*by_rank, strict=False)]

    @staticmethod
    def _end(process: Any) -> int:
        if process.is_alive():
            process.kill()
            process.join()
        return int(process.exitcode)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _run(rank: int, arguments: list[str], directory: str, size: int, fault: tuple[str, int] | None) -> None:
    """A rank: the command with the environment of `mlx.launch`, its streams in files."""
    os.chdir(directory)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{name}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        setattr(sys, name, os.fdopen(number, "w", buffering=1, closefd=False))
    if size > 1:
        os.environ |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": "hosts.json"}
    _watch_steps(Path(f"rows-{rank}.jsonl"), fault)
    from anarcho_cli.main import run

    sys.argv = ["anarcho", *arguments]
    run()


def _watch_steps(file: Path, fault: tuple[str, int] | None) -> None:
    from anarcho_train.steps.mlx import MlxStep

    file.unlink(missing_ok=True)
    train, calls = MlxStep.train, [0]

    def watched(self: Any, micro_batches: Any, **settings: Any) -> Any:
        calls[0] += 1
        if fault and calls[0] == fault[1]:
            os.kill(os.getpid(), getattr(signal, fault[0]))
        rows = [hashlib.sha256(row.tobytes()).hexdigest()[:8] for batch in micro_batches for row in batch.tokens]
        with file.open("a") as notes:
            notes.write(json.dumps(rows) + "\n")
        return train(self, micro_batches, **settings)

    MlxStep.train = watched  # type: ignore[method-assign]


if __name__ == _RANK:
    _run(*globals()["RANK"])
