"""Peaks of memory measured in a process of their own: it cannot spoil the run's state, and the run survives its end by the system.

What is measured are whole steps, their update included, and an evaluation, on random tokens. The line of each size is written as soon as
it is known, the smallest size first, so a process that dies of the larger one has told of the smaller.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from anarcho_cli.config import RunConfig, dumps, loads
from anarcho_cli.fitting.budget import with_size
from anarcho_cli.fitting.decision import Probed
from anarcho_cli.plan import library_bytes

COMMAND = (sys.executable, "-m", "anarcho_cli.fitting")

TIMEOUT_SECONDS = 600.0
"""Longer than that nobody waits for a run to begin; the forecast decides then."""


def probe(
    config: RunConfig,
    sizes: Sequence[int],
    *,
    backend: str,
    device: str,
    command: Sequence[str] = COMMAND,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Probed:
    """The peaks of steps of this configuration with micro-batches of ``sizes``, ascending."""
    order = {"config": dumps(config), "sizes": list(sizes), "backend": backend, "device": device}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    failure, killed = "", False
    try:
        output, errors = process.communicate(json.dumps(order), timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        failure = f"it took longer than {timeout_seconds:g} s"
    except BaseException:
        process.kill()
        process.wait()
        raise
    # What the system kills for want of memory ends by SIGKILL; MLX on a CPU, which does not look what it was given, by SIGSEGV.
    killed = not failure and process.returncode in (-9, -11)
    peaks: dict[int, int] = {}
    found: dict[str, Any] = {}
    for line in output.splitlines():
        found = json.loads(line) if line.startswith("{") else {}
        if "peak_bytes" in found:
            peaks[int(found["size"])] = int(found["peak_bytes"])
    if not failure and process.returncode:
        last = errors.strip().splitlines()[-1:] or ["no message"]
        failure = "the system ended it" if killed else last[0][:200]
    failure = failure or str(found.get("error", ""))
    return Probed(peaks=peaks, failure=failure, out_of_memory=killed or bool(found.get("out_of_memory")))


def measure(order: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """In the process itself: the peak of each size, or why there is none."""
    from anarcho_train.out_of_memory import is_out_of_memory, reason

    from anarcho_cli.back_ends import back_end
    from anarcho_cli.benching.subject import new_step
    from anarcho_cli.benching.training import peak_memory

    config = loads(order["config"], origin="the configuration to be probed")
    backend, device = order["backend"], order["device"]
    checkpointing = config.train.gradient_checkpointing is True
    measured = library_bytes("off", device, backend, loads_compiler=checkpointing)
    compiler = library_bytes(config.train.compile, device, backend) - measured
    size = order["sizes"][0]
    first = with_size(config, micro_batch=size, checkpointing=checkpointing, compile="off", float8=False)
    try:
        step = new_step(back_end(backend), first, device=device)
        for size in order["sizes"]:
            _run(step, config, size, steps=1 if backend == "mlx" else 2)
            memory = peak_memory("mlx" if backend == "mlx" else device, own_memory=device == "cuda")
            known = [memory["peak_bytes"] or 0]
            if device != "cpu":  # What its allocator keeps, it does not give to anybody else.
                known.append(memory["allocator_reserved_bytes"] or 0)
            yield {"size": size, "peak_bytes": max(known) + compiler}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        yield {"error": f"micro-batch {size} found no memory ({reason(error)})", "out_of_memory": True}


def _run(step: Any, config: RunConfig, size: int, *, steps: int) -> None:
    """An evaluation after so many steps: PyTorch's allocators keep what the first leaves behind, and the second needs more."""
    from anarcho_train.step import StepSchedule

    batch = random_rows(config, size)
    count = 2 if config.batch_sequences > size else 1
    for number in range(steps):
        step.train([batch] * count, schedule=StepSchedule(lr_scale=1.0, number=number))
    step.evaluate(batch)


def random_rows(config: RunConfig, size: int) -> Any:
    """A micro-batch of random tokens, all of them targets; pairs of answers with the reference that their loss may need."""
    from anarcho_cli.benching.training import random_batch

    pairs = config.data.kind == "preference"
    rows = max(2, size - size % 2) if pairs else size
    train = dataclasses.replace(config.train, micro_batch=rows, batch_tokens=rows * config.sequence_length)
    batch = random_batch(dataclasses.replace(config, train=train))
    if pairs:
        batch.reference = np.zeros(rows, np.float32)
    return batch


def prober(backend: str, device: str, *, notify: Callable[[str], None]) -> Callable[[RunConfig, Sequence[int]], Probed]:
    """`probe` on a device, announced to a person who waits for it."""

    def run(config: RunConfig, sizes: Sequence[int]) -> Probed:
        named = " and ".join(map(str, sizes))
        notify(f"measuring the memory of steps with micro-batches of {named} sequences")
        return probe(config, sizes, backend=backend, device=device)

    return run
