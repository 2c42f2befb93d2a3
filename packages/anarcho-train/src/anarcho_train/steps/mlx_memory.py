"""Memory that runs out in MLX: what is put back afterwards.

Notable: arrays are computed when they are asked for, so an update that found no memory leaves weights that cannot be computed, and an error
of an Apple GPU comes with the first array that waits for it, perhaps a step later. So the weights are asked. On a CPU, MLX 0.32 does not
look whether its allocator has found anything: the process ends, and only what was decided before can help.
"""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx
import numpy as np

from anarcho_train.steps.mlx_state import generator_state, leaves, set_generator_state

WAITING_MIB = 200
"""Of arrays that the kernels of one submission read, after which it is handed to a CUDA GPU."""


def bound_waiting_buffers() -> None:
    """Tells MLX on CUDA to hand over its work in small submissions; only before its first operation, and unless the user has.

    What an operation has read is freed when its whole submission is done, and ten may be waiting. By MLX 0.32's own limit, 1,000 MB on an
    H100, the reference model's training takes 20 GB in place of 10, at no gain in speed; with 100 MB it takes 9, and a tenth longer.
    """
    os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", str(WAITING_MIB))


class RandomState:
    """MLX's random generator as it is at this moment."""

    def __init__(self) -> None:
        self._state = generator_state()  # Not read: that would wait for the update of the step before.

    def restore(self) -> None:
        """Sets the generator back."""
        set_generator_state(np.array(self._state))


def is_whole(*trees: Any) -> bool:
    """Whether all arrays of weights and state can be had."""
    try:
        mx.eval(*trees)
        mx.synchronize()
        for tree in trees:
            for _, container, key in leaves(tree):
                np.array(container[key].reshape(-1)[:1].astype(mx.float32))
    except RuntimeError:
        return False
    return True
