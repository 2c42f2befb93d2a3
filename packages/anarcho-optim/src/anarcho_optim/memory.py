"""What an update needs besides parameters, gradients and state; free of any framework, for forecasts before a run."""

from __future__ import annotations

BATCH_BYTES = 32 * 2**20
"""Largest float32 stack of same-shape matrices that one batched iteration works on (a larger single matrix is a stack by itself)."""

CPU_BATCH_BYTES = 16 * 2**20
"""The same on a CPU, where a stack that stays in the caches is faster."""

SCRATCH_BYTES = 4 * BATCH_BYTES
"""Upper bound of Muon's temporary memory on CPU and MPS while no matrix exceeds `BATCH_BYTES`: the update, its normalised copy, the iterate
before and after a step, and the result."""

CUDA_SCRATCH_BYTES = 2**30
"""Upper bound of Muon's temporary memory on CUDA's fused path, unless one matrix needs more, or the optimizer is given another."""

LEAST_CUDA_SCRATCH_BYTES = 128 * 2**20
"""The same where memory is dear: batches that are smaller still make products that do not fill a GPU."""


def scratch_bytes(device_type: str, parameters: int, *, room: int | None = None) -> int:
    """Upper bound of Muon's temporary memory for a model of so many parameters on a device of this type (`cpu`, `mps`, `cuda`).

    ``room`` is what a training step leaves free at its update: on CUDA, where a bound can be given to the optimizer, no more is planned.
    """
    if device_type != "cuda":
        return SCRATCH_BYTES
    # The half-precision iterate before and after a segment, and square stacks that are at most as large.
    most = min(CUDA_SCRATCH_BYTES, 6 * parameters)
    return most if room is None else min(most, max(LEAST_CUDA_SCRATCH_BYTES, room))


MLX_BATCHES = 14
"""Stacks of matrices' worth of temporary memory that an update in MLX takes; 13.5 were measured."""
MLX_WEIGHTS = 10
"""The same in the memory of all matrices, where these fit into a stack for each shape; 9.5 were measured."""


def mlx_scratch_bytes(device_type: str, parameters: int) -> int:
    """Upper bound of Muon's temporary memory in MLX, new weights and momenta included, while no matrix exceeds `mlx_batch_bytes`."""
    return min(MLX_BATCHES * mlx_batch_bytes(device_type), MLX_WEIGHTS * 4 * parameters)


def mlx_batch_bytes(device_type: str) -> int:
    """The cap of a float32 stack in MLX, where a CUDA GPU has no update that is fused for it, and needs the larger products."""
    return 4 * BATCH_BYTES if device_type == "cuda" else batch_bytes(device_type)


def batch_bytes(device_type: str) -> int:
    """The cap of a float32 stack on a device of this type (``cpu``, ``mps``, ``cuda``)."""
    return CPU_BATCH_BYTES if device_type == "cpu" else BATCH_BYTES
