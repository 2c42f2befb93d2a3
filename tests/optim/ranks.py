"""Runs a test's function on several ranks, each a process of its own that talks to the others over gloo, or NCCL on GPUs."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A server that has imported torch forks ranks within milliseconds; system libraries of other platforms do not survive a fork.
START_METHOD = "forkserver" if sys.platform == "linux" else "spawn"
PRELOADED = [
    "pytest",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
    "torch._dynamo",
]


def run(
    world_size: int, function: Callable[..., None], *args: Any, device: str = "cpu", timeout_seconds: float = 120
) -> None:
    """Calls ``function(*args)``, a top-level function of a test's file, on every rank of a default group; ``cuda`` takes a GPU per rank.

    Raises AssertionError with the traceback of the rank that failed first, and TimeoutError after ``timeout_seconds``; both end all ranks.
    """
    mp.get_context("forkserver").set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as directory, one_thread():
        where = (function.__code__.co_filename, function.__name__)
        context = mp.start_processes(
            _rank,
            (world_size, directory, device, timeout_seconds, *where, args),
            nprocs=world_size,
            join=False,
            start_method=START_METHOD,
        )
        try:
            _join(context, timeout_seconds)
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            first = Path(directory, "failure")
            raise AssertionError(first.read_text() if first.exists() else str(error)) from None


@contextmanager
def one_thread() -> Iterator[None]:
    """Processes started meanwhile compute on one thread: with more, the ranks would wait for each other's threads."""
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads


def _join(context: mp.ProcessContext, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not context.join(timeout=max(0.0, deadline - time.monotonic()), grace_period=1):
        if time.monotonic() >= deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"the ranks did not finish within {timeout_seconds} seconds")


def _rank(
    rank: int,
    world_size: int,
    directory: str,
    device: str,
    timeout_seconds: float,
    file: str,
    name: str,
    args: tuple[Any, ...],
) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    try:
        getattr(_load(file), name)(*args)
    except BaseException:
        # Written while this rank still holds its connections: those that fail for want of them come later.
        with suppress(FileExistsError), Path(directory, "failure").open("x") as first:
            first.write(f"rank {rank} of {world_size} failed:\n{traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()


def _load(file: str) -> ModuleType:
    """The test's module, from its file: the name under which pytest imports it does not exist in this process."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
