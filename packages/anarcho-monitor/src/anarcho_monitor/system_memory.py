"""What the machine, or the container around this process, has in memory, and what this process holds of it.

Sources: psutil for machine and process; control groups version 2 (`memory.max`, `memory.current`, `memory.stat`) and version 1
(`memory.limit_in_bytes`, ...) for containers, where the limit of every enclosing group holds; on macOS `proc_pid_rusage`
(sys/resource.h) for the physical footprint. The footprint counts Metal buffers and compressed pages, which the resident set
does not, and it is what the system judges a process by.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil


@dataclass(frozen=True, kw_only=True)
class SystemMemory:
    """Bytes of memory outside any accelerator."""

    total_bytes: int
    """Installed memory, or the container's limit where that is lower."""
    available_bytes: int
    """What can still be allocated without swapping and within the container's limit."""
    process_bytes: int
    """What this process holds: the physical footprint on macOS, the resident set elsewhere."""
    process_peak_bytes: int | None
    """The most it ever held; None where the system keeps no such counter."""


def read_system_memory(root: Path = Path("/")) -> SystemMemory:
    """Reads machine, container and process; `root` is where /proc and /sys are looked for."""
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for group in _groups(root):
        total = min(total, group.limit_bytes)
        available = min(available, max(0, group.limit_bytes - group.used_bytes))
    resident = psutil.Process().memory_info().rss
    footprint, footprint_peak = (_footprint() if sys.platform == "darwin" else None) or (resident, _peak_resident(root))
    return SystemMemory(
        total_bytes=total,
        available_bytes=available,
        process_bytes=footprint,
        process_peak_bytes=footprint_peak,
    )


class _Group(NamedTuple):
    limit_bytes: int
    used_bytes: int


def _groups(root: Path) -> Iterator[_Group]:
    """Every control group around this process that limits memory."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux, or /proc is not mounted
        return
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # A container may see the host's path above a mount that starts at its own group, so a folder may be missing.
        relative = Path(path.lstrip("/"))
        for folder in (relative, *relative.parents):
            group = _read_group(mount / folder, *names)
            if group is not None:
                yield group


def _read_group(folder: Path, limit_name: str, used_name: str, reclaimable_name: str) -> _Group | None:
    try:
        limit = int((folder / limit_name).read_text())
        used = int((folder / used_name).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None
    # Clean file cache counts as used but is given up under pressure, exactly as "available" memory of the machine is.
    return _Group(limit, max(0, used - int(statistics.get(reclaimable_name, 0))))


def _peak_resident(root: Path) -> int | None:
    """VmHWM. getrusage's ru_maxrss will not do: it survives exec, so it may be the peak of a parent process."""
    try:
        lines = (root / "proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


# `struct rusage_info_v4` as 64-bit words: a UUID of two, then the counters. The buffer has room to spare.
_RUSAGE_INFO_V4 = 4
_PHYS_FOOTPRINT, _LIFETIME_MAX_PHYS_FOOTPRINT = 9, 30


def _footprint(proc_pid_rusage: Callable[..., int] | None = None) -> tuple[int, int] | None:
    """The physical footprint of this process on macOS now and at most; None where the system does not say."""
    words = (ctypes.c_uint64 * 64)()
    try:
        call = proc_pid_rusage or ctypes.CDLL("/usr/lib/libproc.dylib").proc_pid_rusage
    except OSError:
        return None
    if call(os.getpid(), _RUSAGE_INFO_V4, ctypes.byref(words)) != 0:
        return None
    return words[_PHYS_FOOTPRINT], words[_LIFETIME_MAX_PHYS_FOOTPRINT]
