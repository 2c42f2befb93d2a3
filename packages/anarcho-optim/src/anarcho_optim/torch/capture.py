"""CUDA graphs whose capture may fail, after which everything goes on as if it had not been tried.

Notable: where CUDA invalidates a capture, for example because something in it waits for the device, PyTorch 2.11 stays on the capture's
stream, takes the capture as under way for good, and draws no random number outside of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

_abandoned: list[torch.cuda.CUDAGraph] = []
"""Kept, because PyTorch 2.11 goes on to ask them whether memory of the host is theirs."""


def capture(work: Callable[[], None], *, device: torch.device, pool: Any) -> torch.cuda.CUDAGraph:
    """What the work gives the device to do, as a graph.

    Where that fails, what it raised first is raised, and the stream, the allocator and the generator are as before.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device), torch.cuda.stream(_capture_stream(device)):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            # Other threads, which prepare data or write files, may use the device meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # It only says that something failed before.
                    graph.capture_end()
                raise
            graph.capture_end()
    except BaseException:
        _abandon(graph, device=device, pool=pool)
        raise
    return graph


def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One of the device for all graphs: what one leaves free in a pool that they share serves only those of the same stream.

    It is the one that PyTorch has for all, if that is of this device, because so others who record in the pool choose theirs, too.
    """
    if torch.cuda.graph.default_capture_stream is None:
        torch.cuda.graph.default_capture_stream = torch.cuda.Stream(device)
    default = torch.cuda.graph.default_capture_stream
    return default if default.device == device else _own_stream(device)


@functools.cache
def _own_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _abandon(graph: torch.cuda.CUDAGraph, *, device: torch.device, pool: Any) -> None:
    """Does what PyTorch 2.11, unlike 2.15, leaves undone after a capture that CUDA has invalidated."""
    graph.reset()
    # They are not public.
    end, release = (getattr(torch._C, name, None) for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"))
    if end is None or release is None:
        return
    try:
        end(device.index, pool)
    except RuntimeError:  # Nothing is allocated for the capture any more: PyTorch has released the pool as well.
        return
    release(device.index, pool)
    # Its state would refuse to draw numbers outside of a capture.
    generator = torch.cuda.default_generators[device.index]
    generator.graphsafe_set_state(generator.clone_state())
    _abandoned.append(graph)
