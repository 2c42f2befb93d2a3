"""Which framework computes, and on which device: an Apple GPU where there is one, else the CPU; a CUDA GPU only when asked for.

Notable: a device has one name, whichever framework computes on it, so that a run may change from one to the other. Of MLX,
one build knows the Apple GPU, one CUDA GPUs and one neither: who installed the one for CUDA has asked for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec


class DeviceError(ValueError):
    """A framework or a device that this machine does not have; the message is one sentence for the user."""


class Device(StrEnum):
    """What ``--device`` accepts."""

    auto = "auto"
    gpu = "gpu"
    mps = "mps"
    cpu = "cpu"
    cuda = "cuda"


class Backend(StrEnum):
    """What ``--backend`` accepts."""

    torch = "torch"
    mlx = "mlx"


FRAMEWORKS = {Backend.torch: "PyTorch", Backend.mlx: "MLX"}
"""Back-end -> its name in a sentence."""


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
    """`mps`, which is an Apple GPU, `cpu` or `cuda`."""
    note: str | None = None
    """A line for the user where the choice is not the obvious one."""


def resolve_backend(wanted: str | None, *, installed: Callable[[str], bool] | None = None) -> Backend:
    """The framework for a ``--backend`` value, PyTorch where there is none; loads neither.

    Raises DeviceError for another one, and where it is not installed.
    """
    try:
        backend = Backend(Backend.torch if wanted is None else wanted)
    except ValueError as error:
        raise DeviceError(f"backend is {wanted!r}; expected one of {', '.join(Backend)}") from error
    if not (installed or _installed)(backend.value):
        raise DeviceError(
            f"the back-end {backend.value} needs {FRAMEWORKS[backend]}, which is not installed; run "
            f"`pip install 'anarcho-cli[{backend.value}]'`, or choose another --backend"
        )
    return backend


def _installed(module: str) -> bool:
    # An installed MLX without its compiled half has a folder, but no `core`.
    try:
        return find_spec("mlx.core" if module == "mlx" else module) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def find_accelerators(backend: str = "torch") -> Accelerators:
    """The accelerators that the framework can use here; loads it."""
    if backend == Backend.mlx:
        import mlx.core as mx

        metal = mx.metal.is_available()
        cuda = not metal and mx.cuda.is_available()
        name = str(mx.device_info().get("device_name", "CUDA GPU")) if cuda else ""
        return Accelerators(mps=metal, cuda=(name,) if cuda else ())
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Accelerators(mps=torch.backends.mps.is_available(), cuda=tuple(names))


def resolve_device(
    wanted: str, *, backend: str = "torch", find: Callable[[], Accelerators] | None = None
) -> Resolution:
    """The device for a ``--device`` value; raises DeviceError where it is not there.

    ``find`` is called only where the answer depends on it, so that `cpu` needs no framework.
    """
    device = Device(wanted)
    if device is Device.cpu:
        return Resolution(device="cpu")
    found = find() if find is not None else find_accelerators(backend)
    if device is Device.auto:
        return _automatic(found, mlx=backend == Backend.mlx)
    there = {"mps": found.mps, "cuda": bool(found.cuda)}
    name = next((name for name, usable in there.items() if usable and device in ("gpu", name)), None)
    if name is None:
        missing = {"mps": "Apple GPU", "cuda": "CUDA GPU"}.get(device.value, "GPU")
        framework = FRAMEWORKS[Backend(backend)]
        raise DeviceError(
            f"--device {device.value}, but {framework} finds no {missing} here; use --device cpu, or auto"
        )
    return Resolution(device=name)


def _automatic(found: Accelerators, *, mlx: bool) -> Resolution:
    if found.mps:
        return Resolution(device="mps")
    if found.cuda and mlx:
        return Resolution(device="cuda", note=f"MLX is installed for CUDA here, so the {found.cuda[0]} does the work")
    note = "no Apple GPU here, so the CPU does the work"
    if found.cuda:
        note += f"; `--device cuda` would use the {found.cuda[0]}"
    return Resolution(device="cpu", note=note)
