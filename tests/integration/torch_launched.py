"""Processes of one run as torchrun starts them, forked from a server that has loaded what they need: a process for 0.2 s, not 5.

A rank that is given a fault has it in its n-th step; what each rank trains on is noted, row by row.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

_RANK = "__rank__"
_SERVER = multiprocessing.get_context("forkserver")
_PREPARED = Path(__file__).stem
_PRELOADED = (
    *("anarcho_cli.compose", "anarcho_cli.launching", "anarcho_cli.commands.pretrain", "anarcho_cli.commands.tune"),
    *("anarcho_cli.back_ends.torch", "anarcho_train.steps.torch", "anarcho_train.losses.torch_preference"),
    *("anarcho_train.steps.torch_shards", "torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo"),
    *("torch.distributed.algorithms.ddp_comm_hooks.default_hooks", "anarcho_model.torch", "anarcho_model.weights"),
    *("anarcho_model.generate.torch", "anarcho_model.lora.torch", "anarcho_model.lora.peft", "anarcho_optim.torch"),
)
_SERVER.set_forkserver_preload([_PREPARED])


def _start_server() -> None:
    """The server imports this very file, by its name, and prepares the command."""
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([path] if path else [])])
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if path is not None:
            os.environ["PYTHONPATH"] = path


class Launched:
    """Processes with the same arguments, or each with its own, in a directory that they share."""

    def __init__(
        self,
        directory: Path,
        arguments: Sequence[Sequence[object]],
        *,
        faults: Mapping[int, tuple[str, int]] | None = None,
        machines: int = 1,
    ) -> None:
        """``faults`` is {rank: (what, in which of its steps)}: a signal that it sends to itself, or where it finds no memory.

        As far as they know, they run on so many ``machines``.
        """
        self.directory = directory
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.processes = []
        for rank, own in enumerate(arguments):
            fault = (faults or {}).get(rank)
            told = (rank, [str(part) for part in own], str(directory), len(arguments), machines, port, fault)
            # By its path: pytest alone knows this module by a name.
            process = _SERVER.Process(target=runpy.run_path, args=(__file__, {"RANK": told}, _RANK))
            self.processes.append(process)
        _start_server()
        for process in self.processes:
            process.start()

    def exit_codes(self, *, timeout: float = 25) -> list[int]:
        """How they ended; a fault's signal is negative. Those that have not ended after the timeout are killed, which is seen here."""
        for process in self.processes:
            process.join(timeout)
        return [self._end(process) for process in self.processes]

    def errors(self, rank: int | None = None) -> str:
        """What a rank has written to standard error, or all of them."""
        ranks = range(len(self.processes)) if rank is None else [rank]
        return "".join((self.directory / f"stderr-{rank}.txt").read_text() for rank in ranks)

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


def _run(
    rank: int,
    arguments: list[str],
    directory: str,
    size: int,
    machines: int,
    port: int,
    fault: tuple[str, int] | None,
) -> None:
    """A rank: the command with the environment of torchrun, its streams in files."""
    os.chdir(directory)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{name}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        setattr(sys, name, os.fdopen(number, "w", buffering=1, closefd=False))
    if size > 1:
        here = size // machines
        numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % here, "LOCAL_WORLD_SIZE": here}
        numbers |= {"GROUP_RANK": rank // here, "MASTER_PORT": port}
        os.environ |= {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
    import torch

    torch.set_num_threads(1)
    _watch_steps(Path(f"rows-{rank}.jsonl"), fault)
    sys.argv = ["anarcho", *arguments]
    prepared = getattr(sys.modules.get(_PREPARED), "COMMAND", None)
    (prepared or _command())()


def _command() -> Any:
    """What `anarcho_cli.main.run` calls; what it needs is loaded, and the schema of the configuration made."""
    for name in _PRELOADED:
        importlib.import_module(name)
    from anarcho_cli import config
    from anarcho_cli.main import app
    from typer.main import get_command

    config.dumps(config.resolve(preset="quickstart"))
    return get_command(app)


def _watch_steps(file: Path, fault: tuple[str, int] | None) -> None:
    from anarcho_train.steps.torch import TorchStep

    file.unlink(missing_ok=True)
    train, calls = TorchStep.train, [0]

    def watched(self: Any, micro_batches: Any, **settings: Any) -> Any:
        calls[0] += 1
        if fault and calls[0] == fault[1]:
            if fault[0].startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, fault[0]))
            else:
                _find_no_memory(self, fault[0])
        rows = [hashlib.sha256(row.tobytes()).hexdigest()[:8] for batch in micro_batches for row in batch.tokens]
        with file.open("a") as notes:
            notes.write(json.dumps(rows) + "\n")
        return train(self, micro_batches, **settings)

    TorchStep.train = watched  # type: ignore[method-assign]


def _find_no_memory(step: Any, where: str) -> None:
    """The last block's forward pass, or the next update, fails once."""

    def fail(*_: Any) -> None:
        handle.remove()
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    if where == "update":
        handle = step.optimizer.register_step_pre_hook(fail)
    else:
        handle = step.model.model.layers[-1].mlp.register_forward_pre_hook(fail)


if __name__ == _RANK:
    _run(*globals()["RANK"])
elif __name__ == _PREPARED:
    COMMAND = _command()
