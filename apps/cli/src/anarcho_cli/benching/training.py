"""Training steps of a shape on random tokens: tokens a second, peak memory, and how near to the device's matrix products.

Notable: what is measured is the run's own step with its own optimizer, precision and compilation, put together as a run
does. The ceiling is measured after the memory is read, with matrix products alone, in the type that the step computes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from anarcho_cli.back_ends import back_end, precision_name
from anarcho_cli.benching.cases import Case
from anarcho_cli.benching.subject import ceiling, device_name, new_step, published_peak
from anarcho_cli.benching.timing import time_steps
from anarcho_cli.config import RunConfig
from anarcho_cli.fitting.budget import memory_budget
from anarcho_cli.fitting.decision import find, is_open


def measure_training(case: Case) -> dict[str, Any]:
    """The figures of a case's training step, for the run's own batch."""
    config, device = _settled(case), case.device
    framework = back_end(case.backend)
    step = new_step(framework, config, device=device)
    batch = random_batch(config)
    micro_batches = -(-config.batch_sequences // config.train.fixed_micro_batch)
    losses: list[float] = []
    times = time_steps(
        lambda count: losses.append(_train(step, [batch] * count)),
        repetitions=case.steps,
        accumulated=micro_batches > 1,
        warm=_warm_steps(case),
    )
    memory = peak_memory("mlx" if case.backend == "mlx" else device, own_memory=device == "cuda")
    precision, compiled = precision_name(step), step.compiled
    del step
    name = device_name(framework, device)
    seconds = times.step(micro_batches)
    return {
        "device_name": name,
        "precision": precision,
        "compiled": compiled,
        "tokens_per_second": micro_batches * config.train.fixed_micro_batch * config.sequence_length / seconds,
        "micro_batch": config.train.micro_batch,
        "gradient_checkpointing": config.train.gradient_checkpointing,
        "step_seconds": seconds,
        "micro_batch_seconds": times.micro_batch,
        "update_seconds": times.update if micro_batches > 1 else None,
        "first_step_seconds": times.first,
        "finite": bool(np.isfinite(losses).all()),
        "ceiling_flops": ceiling(case.backend, device=device, precision=precision),
        "peak_flops": published_peak(name, device=device, precision=precision),
        **memory,
    }


def _warm_steps(case: Case) -> int:
    """Steps of a kind before one that is like all that follow: PyTorch may record their passes as CUDA graphs, and is slow as it does."""
    if case.backend != "torch" or case.device != "cuda":
        return 1
    from anarcho_train.steps.torch_graphs import WARM

    return WARM + 1


def _settled(case: Case) -> RunConfig:
    """The configuration; where it leaves the micro-batch open, with what the forecast says."""
    if not is_open(case.config):
        return case.config
    budget = memory_budget(case.backend, case.device)
    fit = find(case.config, backend=case.backend, device=case.device, budget_bytes=budget, probe=None)
    return fit.applied(case.config)


def random_batch(config: RunConfig) -> Any:
    """One micro-batch of random tokens, all of them targets."""
    shape = (config.train.fixed_micro_batch, config.sequence_length + 1)
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
    isolated = config.data.isolate_documents
    rows = np.zeros_like(ids[:, 1:])
    return SimpleNamespace(
        tokens=ids[:, :-1],
        targets=ids[:, 1:],
        weights=np.ones(ids[:, 1:].shape, np.float32),
        positions=rows + np.arange(config.sequence_length, dtype=np.int32) if isolated else None,
        segments=rows if isolated else None,
    )


def peak_memory(name: str, *, own_memory: bool) -> dict[str, int | None]:
    """Peak bytes: of the device where it has memory of its own, else of this process, as the forecast counts them.

    ``name`` is the device's for `anarcho_monitor.read_memory`. What the framework's allocator says stands beside it.
    """
    from anarcho_monitor import read_memory

    reading, process = read_memory(name), read_memory("cpu")
    return {
        "peak_bytes": (reading if own_memory else process).peak_bytes,
        "allocator_peak_bytes": None if name == "cpu" else reading.peak_bytes,
        "allocator_reserved_bytes": None if name == "cpu" else reading.reserved_bytes,
    }


def _train(step: Any, micro_batches: Sequence[Any]) -> float:
    """The loss of one step; reading it waits for the device."""
    from anarcho_train.step import StepSchedule

    return step.train(micro_batches, schedule=StepSchedule(lr_scale=1.0)).loss
