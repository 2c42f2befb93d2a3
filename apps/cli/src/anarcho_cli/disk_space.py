"""What a run's checkpoints take on the disk: forecast in closed form, and compared with what is free before anything begins."""

from __future__ import annotations

from pathlib import Path

from anarcho_model.footprint import training_memory
from anarcho_train import free_bytes

from anarcho_cli.config import RunConfig
from anarcho_cli.output import bytes_text

TOKEN_BYTES = 160
"""Of a piece of the vocabulary in the tokenizer's three files, about."""
OTHER_BYTES = 64 * 2**10
"""Configuration, state, manifest and headers, about."""


class DiskSpaceError(OSError):
    """The disk has no room for what the run is going to write."""


def checkpoint_bytes(config: RunConfig) -> int:
    """The size of one checkpoint: weights, the optimizer's state and the tokenizer."""
    forecast = training_memory(config.model, micro_batch=1, length=1, adapter=config.lora)
    return forecast.weights + forecast.optimizer + TOKEN_BYTES * config.tokenizer.vocab_size + OTHER_BYTES


def checkpoints_at_once(config: RunConfig) -> int:
    """How many checkpoints there can be: the newest, the best one, one that is due by the clock, and one that is being written."""
    return min(config.train.keep_last + 2 + (config.train.checkpoint_minutes > 0), config.train.steps + 1)


def require_disk_space(directory: Path, config: RunConfig) -> None:
    """Raises DiskSpaceError where the disk of ``directory`` has no room for the checkpoints that are to come there."""
    size, count = checkpoint_bytes(config), checkpoints_at_once(config)
    there = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) if directory.is_dir() else 0
    needed, free = max(size, count * size - there), free_bytes(directory)
    if free < needed:
        raise DiskSpaceError(
            f"the disk of {directory} has {bytes_text(free)} free, but up to {count} checkpoints of {bytes_text(size)} are to be there at "
            f"once (train.keep_last = {config.train.keep_last}, the best one, and one being written), which takes "
            f"{bytes_text(needed)} more; free space, lower train.keep_last, or choose another --runs-dir"
        )
