"""Which preset a Mac of so much memory trains, by the forecast: the table of docs/apple-silicon.md.

Notable: macOS lets the GPU work on a part of the unified memory, and as of any budget the table keeps a part of that free.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from anarcho_cli.config import RunConfig, resolve
from anarcho_cli.fitting.budget import GIB, USED_SHARE, forecast_bytes, working_set_bytes

PRESETS = ("quickstart", "small-15m", "medium-45m", "reference-137m")
"""The presets that train a model from text, the smallest first."""
SIZES_GB = (8, 16, 24, 32, 64, 128)
"""Sizes of unified memory."""


def forecast(config: RunConfig, *, micro_batch: int, checkpointing: bool) -> int:
    """Peak bytes of a training step on an Apple GPU in half precision."""
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision="bfloat16"))
    return forecast_bytes(config, micro_batch=micro_batch, checkpointing=checkpointing, backend="torch", device="mps")


def largest_micro_batch(config: RunConfig, *, budget_bytes: int, checkpointing: bool) -> int | None:
    """The largest divisor of the step's sequences that the budget holds; None where not even one sequence fits."""
    count = config.batch_sequences
    fitting = (
        size
        for size in range(count, 0, -1)
        if count % size == 0 and forecast(config, micro_batch=size, checkpointing=checkpointing) <= budget_bytes
    )
    return next(fitting, None)


def choice(config: RunConfig, *, memory_gb: int) -> str:
    """The cell of a preset and a size of memory: the largest micro-batch with its forecast."""
    budget = int(working_set_bytes(memory_gb) * USED_SHARE)
    for checkpointing in (False, True):
        size = largest_micro_batch(config, budget_bytes=budget, checkpointing=checkpointing)
        if size is not None:
            needed = forecast(config, micro_batch=size, checkpointing=checkpointing) / GIB
            return f"{size}{' with checkpointing' if checkpointing else ''} ({needed:.1f} GiB)"
    return "does not fit"


def memory_table(presets: Sequence[str] = PRESETS, sizes_gb: Sequence[int] = SIZES_GB) -> str:
    """Two Markdown tables: what a preset needs as it is, and the largest micro-batch for each size of memory."""
    configs = {name: resolve(preset=name) for name in presets}
    needs = [
        ["preset", "parameters", "context", "sequences a step", "micro-batch 1", "the same with checkpointing"],
        *(
            [
                name,
                f"{config.model.num_parameters / 1e6:.1f} M",
                f"{config.sequence_length:,}",
                str(config.batch_sequences),
                f"{forecast(config, micro_batch=1, checkpointing=False) / GIB:.1f} GiB",
                f"{forecast(config, micro_batch=1, checkpointing=True) / GIB:.1f} GiB",
            ]
            for name, config in configs.items()
        ),
    ]
    largest = [
        ["preset", *(f"{size} GB" for size in sizes_gb)],
        *([name, *(choice(config, memory_gb=size) for size in sizes_gb)] for name, config in configs.items()),
    ]
    return f"{markdown(needs)}\n{markdown(largest)}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first row is the header."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"
