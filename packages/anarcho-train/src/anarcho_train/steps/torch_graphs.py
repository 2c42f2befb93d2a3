"""Passes over micro-batches as CUDA graphs: a thousand kernels, recorded once for a shape, which the host then starts as one.

Notable:

* a small micro-batch takes the device less time than the host needs to start its kernels one by one; whether that is so is measured on
  the passes before, which also compile, tune and load whatever a recording must find ready;
* a recording holds addresses: batches are copied to where it reads them, gradients lie where it writes them, and it is given up when
  weights have moved;
* all recordings share one pool of memory, and none begins before another has ended: between them lives on what they were given and what
  they return.

Source: CUDA graphs in PyTorch, https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

WARM = 3
"""Passes of a shape before it is recorded: the first compiles, the second finds the allocator filled, the third is measured."""
HOST_BOUND = 0.7
"""Share of a pass' time that the host takes to start its kernels, above which the device waits for it."""
MAX_KINDS = 8
"""So many kinds of passes are recorded; further ones go on as before."""
MAX_GRADIENT_BYTES = 2**30
"""Every kind of training passes keeps its gradients; with so many, no further kind is recorded."""

Arrays = Mapping[str, np.ndarray]
Tensors = dict[str, Tensor]
Work = Callable[[Tensors], Any]
"""A pass over tensors that lie on the device, returning others; a backward pass leaves its gradients in the parameters."""

Record = Callable[[Callable[[], None]], Any]
"""Makes a graph of what a function gives the device to do; what it returns does that in `replay`."""

_abandoned: list[torch.cuda.CUDAGraph] = []
"""Kept, because PyTorch 2.11 goes on to ask them whether memory of the host is theirs."""


@dataclass(frozen=True)
class _Recording:
    replay: Callable[[], None]
    inputs: Tensors
    output: Any
    gradients: Sequence[tuple[Tensor, Tensor]]
    """The parameters to which it gives a gradient of its own, and these; not those whose gradient it only adds to, or leaves alone."""


class Recordings:
    """The recorded passes of a model on one CUDA device. ``choice`` True records whatever comes often, `auto` what the host slows down.

    ``notify`` receives a sentence where recording fails; everything then goes on without. ``lend`` is given what makes a graph that
    runs between passes, in their memory, and None when that is given up. It is given anew after each recording: graphs that were made
    before may write where the new gradients lie, and are not to run again.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        choice: bool | Literal["auto"],
        notify: Callable[[str], None],
        lend: Callable[[Record | None], None] = lambda record: None,
    ) -> None:
        self._parameters = list(model.parameters())
        self._device = self._parameters[0].device
        self._wanted, self._measures, self._notify = bool(choice), choice == "auto", notify
        self._lend = lend
        self._recorded: dict[Hashable, _Recording] = {}
        self._kinds: set[Hashable] = set()
        self._seen: dict[Hashable, int] = {}
        self._host_bound: dict[Hashable, bool] = {}
        self._measured: dict[Hashable, tuple[float, Any, Any]] = {}
        self._addresses: list[int] = []
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._recorded)

    @property
    def wanted(self) -> bool:
        """Whether anything may be recorded."""
        return self._wanted

    def wants(self, kind: Hashable) -> bool:
        """Whether passes of this kind are to be recorded, as far as those before have shown."""
        if not self._wanted or self._seen.get(kind, 0) < WARM:
            return False
        if self._recorded and self._addresses != self._where():
            self.forget()
        self._read_times()
        more = len(self._kinds) < MAX_KINDS and self._gradient_bytes() < MAX_GRADIENT_BYTES
        if more and (self._host_bound.get(kind, False) or not self._measures):
            self._kinds.add(kind)
        return kind in self._kinds

    @contextmanager
    def watched(self, kind: Hashable) -> Iterator[None]:
        """Within the block, a pass that is not recorded; how long host and device take for it is measured."""
        number = self._seen[kind] = self._seen.get(kind, 0) + 1
        if not (self._wanted and self._measures and number == WARM):
            yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self._device)
        begin.record(stream)
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        end.record(stream)
        self._measured[kind] = seconds, begin, end

    def run(self, key: Hashable, arrays: Arrays, work: Work) -> Any:
        """What ``work`` returns for these arrays; None, with nothing done, where it could not be recorded.

        The parameters then have the gradients that it leaves. Where it adds to those before, these must lie where they did when it was
        recorded. The result is overwritten by the next run of the same key.
        """
        recording = self._recorded.get(key) or self._record(key, arrays, work)
        if recording is None:
            return None
        for name, array in arrays.items():
            recording.inputs[name].copy_(host_tensor(array, self._device), non_blocking=True)
        recording.replay()
        for parameter, gradient in recording.gradients:
            parameter.grad = gradient
        return recording.output

    def forget(self) -> None:
        """Gives up all recordings and their memory; what comes again is recorded again."""
        self._recorded.clear()
        if self._pool is not None:
            self._pool = None
            self._lend(None)
            _free_workspaces()

    def stop(self) -> None:
        """Nothing is recorded from now on."""
        self._wanted = False
        self.forget()

    def _record(self, key: Hashable, arrays: Arrays, work: Work) -> _Recording | None:
        inputs = {name: host_tensor(array, self._device).to(self._device) for name, array in arrays.items()}
        before = [parameter.grad for parameter in self._parameters]
        try:
            replay, output = self._captured(work, dict(inputs))
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            error.__traceback__ = None  # Its frames hold what was computed.
            self.stop()
            for parameter, gradient in zip(self._parameters, before, strict=True):
                parameter.grad = gradient
            self._notify(f"a pass could not be recorded as a CUDA graph ({reason}); training goes on without")
            return None
        self._addresses = self._where()
        pool = self._pool
        self._lend(lambda other: _capture(other, device=self._device, pool=pool)[0])
        gradients = [
            (parameter, parameter.grad)
            for parameter, old in zip(self._parameters, before, strict=True)
            if parameter.grad is not None and parameter.grad is not old
        ]
        self._recorded[key] = _Recording(replay, inputs, output, gradients)
        return self._recorded[key]

    def _captured(self, work: Work, inputs: Tensors) -> tuple[Callable[[], None], Any]:
        """What does the work again, and the result that it then overwrites; nothing has been computed yet."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            _free_workspaces()
        # The pool of the recordings has no use for what other memory is free, but the device has only that.
        gc.collect()
        graph, output = _capture(lambda: work(inputs), device=self._device, pool=self._pool)
        return graph.replay, output

    def _gradient_bytes(self) -> int:
        return sum(g.numel() * g.element_size() for one in self._recorded.values() for _, g in one.gradients)

    def _where(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self._parameters]

    def _read_times(self) -> None:
        for kind, (seconds, begin, end) in list(self._measured.items()):
            if end.query():
                del self._measured[kind]
                self._host_bound[kind] = seconds > HOST_BOUND * begin.elapsed_time(end) / 1000


def obstacle(device: torch.device, *, processes: int, scaled: bool, in_backward: bool) -> str | None:
    """Why a step's passes cannot be recorded, as the end of a sentence; None if they can."""
    reasons = {
        f"the device is {device.type}; expected cuda": device.type != "cuda",
        f"there are {processes} processes; expected one": processes > 1,
        "products are in float16, with a scaled loss; expected bfloat16 or float32": scaled,
        "train.update_in_backward is true; expected false": in_backward,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _capture(work: Callable[[], Any], *, device: torch.device, pool: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """What the work gives the device to do, as a graph, and its result, which is not computed yet.

    Where that fails, what it raised first is raised, and the stream, the allocator and the generator are as before.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device), torch.cuda.stream(_capture_stream(device)):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            # Other threads, which prepare batches or write files, may use the device meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = work()
            except BaseException:
                with suppress(RuntimeError):  # It only says that something failed before.
                    graph.capture_end()
                raise
            graph.capture_end()
    except BaseException:
        _abandon(graph, device=device, pool=pool)
        raise
    return graph, result


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One of the device for all graphs: what one leaves free in a pool that they share serves only those of the same stream."""
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


def _free_workspaces() -> None:
    """Frees what cuBLAS works in, which it gets anew in the pool where the recorded work runs."""
    free = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # It is not public.
    if free is not None:
        free()


def host_tensor(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor of the host; for a CUDA device pinned, because a copy of other memory would wait for the update before."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def shape_of(arrays: Arrays) -> Hashable:
    """What passes over these arrays have in common with those that one recording serves."""
    return tuple((name, array.shape, array.dtype.str) for name, array in arrays.items())
