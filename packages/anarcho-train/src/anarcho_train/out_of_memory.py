"""Memory that ran out, whichever framework and device says so, as one exception.

Notable: PyTorch raises a type of its own for CUDA alone. On Apple GPUs and on the CPU, and in MLX, it is a plain RuntimeError that only
its text tells apart, so the texts stand here as the frameworks spell them (PyTorch 2.4 to 2.15, MLX 0.22 to 0.32). An error's frames hold
what was computed until then; they are cleared before anything is done again, or it would still be in memory.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar

from anarcho_train.config import TrainConfig

Result = TypeVar("Result")

TEXTS = (
    # PyTorch: CUDA's allocator, the driver and its libraries.
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "HIP out of memory",
    # PyTorch: Apple's GPUs, where a tensor may also be larger than any buffer of the device.
    "MPS backend out of memory (",
    "Invalid buffer size: ",
    # PyTorch: the CPU's allocator, on POSIX systems and on Windows.
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    # MLX: its allocators, its limit of buffers, and Metal's.
    "[malloc] Unable to allocate",
    "[malloc_or_wait] Unable to allocate",
    "[metal::malloc] ",
    "Command buffer execution failed: Insufficient Memory",
    "kIOGPUCommandBufferCallbackErrorOutOfMemory",
    # MLX: CUDA, as "cudaMallocAsync(...) failed: out of memory".
    " failed: out of memory",
)
"""What is in the messages of RuntimeErrors where memory ran out."""


class OutOfMemory(ValueError):
    """A step or an evaluation found no memory. What it had begun is dropped and its caches are empty: it may be tried again with less."""

    def __init__(self, message: str, *, torn: bool = False) -> None:
        super().__init__(message)
        self.torn = torn
        """Whether the update had begun, so that model and optimizer may be neither before nor after it and must be restored."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there is no memory for a tensor, on whichever device."""
    if isinstance(error, OutOfMemory | MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS)


def reason(error: BaseException) -> str:
    """What the framework says, in one line of bounded length; the frames of the error are cleared."""
    traceback.clear_frames(error.__traceback__)
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def advice(config: TrainConfig) -> str:
    """What a run can do that has found no memory for a single sequence."""
    checkpointing = "" if config.gradient_checkpointing is True else "train.gradient_checkpointing = true, "
    return f"try {checkpointing}a shorter train.sequence_length or a smaller model; the state is saved where there was one to save"


def guarded(work: Callable[[], Result], *, recover: Callable[[], bool]) -> Result:
    """The result of ``work``, or `OutOfMemory` where memory ran out in it.

    ``recover`` is called before that is raised, when nothing of what was computed is referred to any more. It puts everything back but
    the weights and the optimizer's state, and returns whether an update had begun.
    """
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        what = reason(error)
    # Only here is the error gone, and with it what its frames held.
    raise OutOfMemory(what, torn=recover())
