"""What is put back in PyTorch after memory ran out: random generators, the allocator's cache, and an optimizer before its first step."""

from __future__ import annotations

import copy
import gc
from typing import Any

import torch
from torch import Tensor, nn


class RandomState:
    """The random generators of the CPU and of a device, as they are at this moment."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._accelerator = None if device.type == "cpu" else _module(device).get_rng_state()

    def restore(self) -> None:
        """Sets the generators back."""
        torch.set_rng_state(self._cpu)
        if self._accelerator is not None:
            _module(self._device).set_rng_state(self._accelerator)


def empty_caches(device: torch.device) -> None:
    """Gives freed memory back to the device, so that what is tried next finds it in one piece."""
    gc.collect()
    if device.type != "cpu":
        _module(device).empty_cache()


def host_copy(model: nn.Module) -> nn.Module:
    """A module of the same structure, whose parameters and buffers are copies in the host's memory; gradients are left behind."""
    copies: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach().to("cpu", copy=True), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    copies |= {id(buffer): buffer.detach().to("cpu", copy=True) for buffer in model.buffers()}
    return copy.deepcopy(model, copies)


def forget_updates(optimizer: torch.optim.Optimizer, *, keeps_state: bool) -> None:
    """The optimizer's state as before its first step: zeros of one that ``keeps_state`` from the beginning, else none.

    Tensors stay where they are, because recorded graphs hold their addresses.
    """
    optimizer.zero_grad(set_to_none=True)
    if not keeps_state:
        optimizer.state.clear()
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()


def _module(device: torch.device) -> Any:
    return torch.mps if device.type == "mps" else torch.cuda
