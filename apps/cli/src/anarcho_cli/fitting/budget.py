"""How much memory a run may take on a device, what it is forecast to take, and how many tokens at once are of use."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from typing import Any

from anarcho_monitor import MemoryReading, read_memory

from anarcho_cli.config import RunConfig
from anarcho_cli.plan import Processes, plan_run

USED_SHARE = 0.85
"""How much of the budget a run may be expected to take; the rest is for what neither forecast nor probe has seen."""

GIB = 2**30

USEFUL_TOKENS = {"cpu": 4096, "mps": 8192, "cuda": 32768}
"""So many tokens at once keep a device busy; with more, a step hardly gets faster."""
LEAST_TOKENS = {"cpu": 256, "mps": 1024, "cuda": 4096}
"""With fewer at once a device is idle for so long that computing activations again, a third more work, is the lesser evil."""


def memory_budget(backend: str, device: str) -> int:
    """Bytes that this process may come to hold where the model is: the device's own memory, else the machine's or the container's."""
    if backend == "mlx":
        import mlx.core as mx

        return mlx_budget(read_memory("mlx"), mx.device_info(), own_memory=device == "cuda")
    return torch_budget(read_memory(device), own_memory=device == "cuda")


def torch_budget(reading: MemoryReading, *, own_memory: bool) -> int:
    """As `memory_budget`: on CUDA what is free or this process's, on an Apple GPU what Metal recommends, if the machine has that free."""
    return reading.limit_bytes if own_memory else min(reading.limit_bytes, _reachable(reading))


def mlx_budget(reading: MemoryReading, device: Mapping[str, Any], *, own_memory: bool) -> int:
    """As `memory_budget`, within the limit that MLX is given."""
    from anarcho_cli.back_ends.mlx import memory_limit

    limit = memory_limit(device, total=reading.system_total_bytes)
    if not own_memory:
        return min(limit, _reachable(reading))
    free = device.get("free_memory")
    return limit if free is None else min(limit, int(free) + reading.reserved_bytes)


def _reachable(reading: MemoryReading) -> int:
    """What this process holds already, and what is left for it without swapping."""
    return reading.process_bytes + reading.system_available_bytes


def planning_budget(device: str) -> int:
    """What a run may probably hold on a device (`auto`, `gpu`, `mps`, `cpu` or `cuda`), without a framework to ask.

    Of an Apple GPU it is what Metal usually recommends, elsewhere the machine's memory: a CUDA GPU's is not known here.
    """
    total = read_memory("cpu").system_total_bytes
    apple = platform.system() == "Darwin" and device != "cpu"
    return working_set_bytes(round(total / GIB)) if apple else total


def working_set_bytes(memory_gb: int) -> int:
    """What macOS recommends as the most that the GPU works on at once: two thirds, above 36 GB three quarters.

    Seen on Macs of 16 and 32 GB and on one of 64 GB (10,922 MB: llama-cpp-python issue 687; 21,845 MB: ollama issue 434; 49 GB:
    llama.cpp issue 1870).
    """
    return memory_gb * GIB * 2 // 3 if memory_gb <= 36 else memory_gb * GIB * 3 // 4


def with_size(config: RunConfig, *, micro_batch: int, checkpointing: bool, **settings: Any) -> RunConfig:
    """The configuration with a micro-batch and gradient checkpointing as they are found, and further settings of `train`."""
    train = dataclasses.replace(config.train, micro_batch=micro_batch, gradient_checkpointing=checkpointing, **settings)
    return dataclasses.replace(config, train=train)


def forecast_bytes(
    config: RunConfig,
    *,
    micro_batch: int,
    checkpointing: bool,
    backend: str,
    device: str,
    processes: Processes | None = None,
) -> int:
    """The forecast of the peak, of each of several processes; two answers to one prompt are always together."""
    rows = max(2, micro_batch) if config.data.kind == "preference" else micro_batch
    return plan_run(
        with_size(config, micro_batch=micro_batch, checkpointing=checkpointing),
        backend=backend,
        device=device,
        rows=rows,
        processes=processes,
    ).total_bytes
