"""Which device a command runs on: an Apple GPU where there is one, else the CPU; a CUDA GPU only when asked for by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class DeviceError(ValueError):
    """A device that this machine does not have; the message is one sentence for the user."""


class Device(StrEnum):
    """What ``--device`` accepts."""

    auto = "auto"
    mps = "mps"
    cpu = "cpu"
    cuda = "cuda"


class Backend(StrEnum):
    """What ``--backend`` accepts."""

    torch = "torch"


@dataclass(frozen=True, kw_only=True)
class Accelerators:
    """The accelerators of a machine, as the framework sees them."""

    mps: bool = False
    """Whether an Apple GPU is usable."""
    cuda: tuple[str, ...] = ()
    """Names of the usable CUDA GPUs."""


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """The device that a request comes to."""

    device: str
    """`mps`, `cpu` or `cuda`."""
    note: str | None = None
    """A line for the user where the choice is not the obvious one."""


def find_accelerators() -> Accelerators:
    """The accelerators that PyTorch can use here; loads torch."""
    import torch

    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Accelerators(mps=torch.backends.mps.is_available(), cuda=tuple(cuda))


def resolve_device(wanted: str, *, find: Callable[[], Accelerators] = find_accelerators) -> Resolution:
    """The device for a ``--device`` value; raises DeviceError where it is not there.

    ``find`` is called only where the answer depends on it, so that `cpu` needs no framework.
    """
    device = Device(wanted)
    if device is Device.cpu:
        return Resolution(device="cpu")
    found = find()
    if device is Device.auto:
        if found.mps:
            return Resolution(device="mps")
        if found.cuda:
            note = f"no Apple GPU here, so the CPU does the work; `--device cuda` would use the {found.cuda[0]}"
            return Resolution(device="cpu", note=note)
        return Resolution(device="cpu", note="no Apple GPU here, so the CPU does the work")
    if device is Device.mps and not found.mps:
        raise DeviceError("--device mps, but PyTorch finds no Apple GPU here; use --device cpu, or auto")
    if device is Device.cuda and not found.cuda:
        raise DeviceError("--device cuda, but PyTorch finds no CUDA GPU here; use --device cpu, or auto")
    return Resolution(device=device.value)
