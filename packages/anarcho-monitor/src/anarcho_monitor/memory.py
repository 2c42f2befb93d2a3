"""One reading of memory for every device: accelerator, process and system together.

What the fields hold, by device (documented functions alone):

===============  ============================  ===========================  ========================================
field            cuda                          mps                          mlx
===============  ============================  ===========================  ========================================
allocated_bytes  cuda.memory_allocated         current_allocated_memory     get_active_memory
reserved_bytes   cuda.memory_reserved          driver_allocated_memory      get_active_memory + get_cache_memory
peak_bytes       cuda.max_memory_allocated     None: MPS has no counter     get_peak_memory (without the cache)
limit_bytes      free (mem_get_info)+reserved  recommended_max_memory       device_info: max_recommended_working_set_size
===============  ============================  ===========================  ========================================

On the CPU the first two are the process itself, the peak its largest resident set and the limit the system's total. `limit_bytes`
on MPS is far below what its allocator would try (1.7 times as much), because swapping comes before any error.
"""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from typing import Any

from anarcho_monitor.errors import MonitorError
from anarcho_monitor.system_memory import SystemMemory, read_system_memory


@dataclass(frozen=True, kw_only=True)
class MemoryReading:
    """Bytes in use at one moment."""

    device: str
    """The device as it was asked for, such as "mps" or "cuda:0"."""
    allocated_bytes: int
    """Held by live tensors."""
    reserved_bytes: int
    """Held by the allocator, its cache included."""
    peak_bytes: int | None
    """The most that live tensors ever held; None where the device keeps no such counter."""
    process_bytes: int
    """Held by this process in the system's memory: footprint on macOS, resident set elsewhere."""
    limit_bytes: int
    """The most that this process may hold on the device."""
    system_available_bytes: int
    """What the system, or the container, still has without swapping."""
    system_total_bytes: int
    """The system's memory, or the container's limit where that is lower."""

    def metrics(self) -> dict[str, int]:
        """The counters that are known, by the names under which a training loop logs them."""
        return {name: value for name, value in asdict(self).items() if isinstance(value, int)}


def read_memory(device: str, *, framework: Any = None, system: SystemMemory | None = None) -> MemoryReading:
    """Reads the memory of `device`: "cpu", "mps", "cuda" or "mlx", with an index where there are several ("cuda:1").

    `framework` is the torch or mlx.core module, imported by this function where it is not given and the device needs it.
    Raises `MonitorError` for another device and where the framework is not installed.
    """
    system = system or read_system_memory()
    family = device.partition(":")[0]
    if family == "cpu":
        values = _read_cpu(system)
    elif family == "cuda":
        values = _read_cuda(framework or _load("torch", device), device)
    elif family == "mps":
        values = _read_mps(framework or _load("torch", device))
    elif family == "mlx":
        values = _read_mlx(framework or _load("mlx.core", device), system)
    else:
        raise MonitorError(f"The memory of device {device!r} cannot be read: give cpu, mps, cuda, cuda:<index> or mlx.")
    return MemoryReading(
        device=device,
        process_bytes=system.process_bytes,
        system_available_bytes=system.available_bytes,
        system_total_bytes=system.total_bytes,
        **values,
    )


def _load(name: str, device: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = name.partition(".")[0]
        raise MonitorError(
            f"The memory of device {device!r} cannot be read without {extra}: install anarcho-monitor[{extra}]."
        ) from error


def _read_cpu(system: SystemMemory) -> dict[str, Any]:
    return {
        "allocated_bytes": system.process_bytes,
        "reserved_bytes": system.process_bytes,
        "peak_bytes": system.process_peak_bytes,
        "limit_bytes": system.total_bytes,
    }


def _read_cuda(torch: Any, device: str) -> dict[str, Any]:
    free, _ = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    return {
        "allocated_bytes": torch.cuda.memory_allocated(device),
        "reserved_bytes": reserved,
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "limit_bytes": free + reserved,
    }


def _read_mps(torch: Any) -> dict[str, Any]:
    return {
        "allocated_bytes": torch.mps.current_allocated_memory(),
        "reserved_bytes": torch.mps.driver_allocated_memory(),
        "peak_bytes": None,
        "limit_bytes": torch.mps.recommended_max_memory(),
    }


def _read_mlx(mlx: Any, system: SystemMemory) -> dict[str, Any]:
    active = mlx.get_active_memory()
    information = mlx.device_info()
    # The Metal back-end names its working set, the CUDA one its memory; on the CPU neither is there.
    limit = information.get("max_recommended_working_set_size") or information.get("total_memory") or system.total_bytes
    return {
        "allocated_bytes": active,
        "reserved_bytes": active + mlx.get_cache_memory(),
        "peak_bytes": mlx.get_peak_memory(),
        "limit_bytes": int(limit),
    }
