"""What becomes of memory that a training process frees: on Linux, it goes back to the system at once, or stays for compiled steps.

Notable: glibc keeps freed blocks of up to 32 MiB, and its aligned allocation, which PyTorch uses for every tensor, asks for more room than
a freed tensor of the same size leaves (sourceware's bug 14581), so that its place stays empty until something smaller comes. Training
steps on a CPU, run op by op, held 110 to 1070 MB more than their tensors and the libraries, and other amounts in each run. Blocks of a
huge page and more are therefore mapped for themselves.

Pages of such blocks are faulted in anew each time. With pages of 4 KiB that cost up to a third of a step's time; with huge ones, which
PyTorch asks the kernel for if it is told to, steps took 0.7 to 1.15 times as long as before. So this is done only where the kernel has
them to give.

Compiled steps ask for the same blocks in the same order each time, so that a heap which keeps everything grows no larger than their
tensors: peaks were 0.97 to 1.06 times those of returned memory, in three shapes of models. And no page is faulted in anew, where tensors
on huge pages have small ones at both of their ends, 27,000 to 300,000 a step: steps took 0.92, 0.9, 0.87 and, with gradient checkpointing,
0.72 times as long. On huge pages as well, the kept heap was no faster; their alignment made it 200 MB larger.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from pathlib import Path

HUGE_PAGE_BYTES = 2 * 2**20
"""From this size on PyTorch puts a tensor on huge pages."""
TRIM_BYTES = 64 * 2**20
"""Of free small blocks at the end of the heap, before they are given back; glibc comes to the same by itself, where nothing is set."""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

OWN_SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
"""Variables by which a user has decided."""

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def _is_ours_to_set() -> bool:
    """Whether this is glibc, without settings of the user's own."""
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    return not any(name in os.environ for name in OWN_SETTINGS)


def returns_freed_memory() -> bool:
    """Whether `return_freed_memory` does anything here: glibc without thresholds of the user's own, and a kernel with huge pages."""
    if not _is_ours_to_set():
        return False
    if os.environ.get("THP_MEM_ALLOC_ENABLE", "1") != "1":
        return False
    try:
        return "[never]" not in HUGE_PAGES.read_text()
    except OSError:
        return False


def return_freed_memory(*, mallopt: Callable[[int, int], int] | None = None) -> bool:
    """Makes large freed blocks go back to the system from now on, where that is of use; returns whether it is done.

    Call it before the first tensor is made: PyTorch looks only once whether it shall use huge pages.
    """
    if not returns_freed_memory():
        return False
    call = mallopt or ctypes.CDLL(None).mallopt
    if not (call(_M_MMAP_THRESHOLD, HUGE_PAGE_BYTES) and call(_M_TRIM_THRESHOLD, TRIM_BYTES)):
        return False
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
    return True


def keep_freed_memory(*, mallopt: Callable[[int, int], int] | None = None) -> bool:
    """Makes all that is freed stay with the process from now on, for steps that are compiled; returns whether it is done.

    It takes the place of `return_freed_memory`, before or after it. Call it before the first tensor is made: PyTorch is let look for its
    answer to huge pages here, which then is no for as long as the process lives.
    """
    if not _is_ours_to_set():
        return False
    call = mallopt or ctypes.CDLL(None).mallopt
    if not (call(_M_MMAP_MAX, 0) and call(_M_TRIM_THRESHOLD, -1)):
        return False
    import torch

    before = os.environ.get("THP_MEM_ALLOC_ENABLE")
    os.environ["THP_MEM_ALLOC_ENABLE"] = "0"
    torch.empty(1)
    if before is None:
        del os.environ["THP_MEM_ALLOC_ENABLE"]
    else:
        os.environ["THP_MEM_ALLOC_ENABLE"] = before
    return True
