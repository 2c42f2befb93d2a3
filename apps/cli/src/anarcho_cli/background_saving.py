"""Whether a run's checkpoints are written from a copy while the training goes on: what the configuration says, and what memory has."""

from __future__ import annotations

from anarcho_monitor.system_memory import read_system_memory

from anarcho_cli.config import RunConfig
from anarcho_cli.disk_space import checkpoint_bytes

RESERVE_SHARE = 0.1
"""Of the system's memory, that a copy leaves free: other programs, and the cache of what is being written."""


def copies_state(config: RunConfig, *, device: str) -> bool:
    """Whether the state is to be copied at all."""
    wanted = config.train.save_in_background
    return device != "cpu" if wanted == "auto" else wanted


def has_room_for_copy(config: RunConfig) -> bool:
    """Whether the host's memory, as it is now, has room for a copy of weights and optimizer state."""
    memory = read_system_memory()
    return memory.available_bytes - checkpoint_bytes(config) > RESERVE_SHARE * memory.total_bytes
