"""Memory readings: real for CPU and MLX's CPU back-end, injected for what this machine may lack."""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from anarcho_monitor import MonitorError, SystemMemory, read_memory, read_system_memory
from anarcho_monitor.system_memory import _footprint

SYSTEM = SystemMemory(total_bytes=1000, available_bytes=400, process_bytes=100, process_peak_bytes=150)


def test_cpu_reads_process_and_system() -> None:
    reading = read_memory("cpu", system=SYSTEM)
    assert (reading.allocated_bytes, reading.peak_bytes, reading.process_bytes) == (100, 150, 100)
    assert (reading.limit_bytes, reading.system_total_bytes, reading.system_available_bytes) == (1000, 1000, 400)


def test_a_real_reading_sees_a_large_allocation() -> None:
    before = read_memory("cpu").process_bytes
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    reading = read_memory("cpu")
    assert reading.process_bytes - before > 48 * 2**20
    assert reading.peak_bytes is None or reading.peak_bytes >= reading.process_bytes * 0.9
    assert reading.system_available_bytes <= reading.system_total_bytes <= psutil.virtual_memory().total


def test_cuda_limit_is_what_is_free_and_what_is_held() -> None:
    asked = []

    def answer(value):
        return lambda device: asked.append(device) or value

    cuda = SimpleNamespace(
        mem_get_info=answer((300, 900)),
        memory_reserved=answer(200),
        memory_allocated=answer(120),
        max_memory_allocated=answer(180),
    )
    reading = read_memory("cuda:1", framework=SimpleNamespace(cuda=cuda), system=SYSTEM)
    assert set(asked) == {"cuda:1"}
    assert (reading.allocated_bytes, reading.reserved_bytes, reading.peak_bytes) == (120, 200, 180)
    assert reading.limit_bytes == 500


def test_mps_reads_tensors_driver_and_recommended_limit_and_has_no_peak() -> None:
    mps = SimpleNamespace(
        current_allocated_memory=lambda: 10, driver_allocated_memory=lambda: 70, recommended_max_memory=lambda: 90
    )
    reading = read_memory("mps", framework=SimpleNamespace(mps=mps), system=SYSTEM)
    assert (reading.allocated_bytes, reading.reserved_bytes, reading.limit_bytes) == (10, 70, 90)
    assert reading.peak_bytes is None
    assert "peak_bytes" not in reading.metrics()


@pytest.mark.parametrize(
    ("information", "limit"),
    [
        ({"max_recommended_working_set_size": 700, "memory_size": 900}, 700),
        ({"total_memory": 800}, 800),
        ({"device_name": "cpu"}, 1000),
    ],
)
def test_mlx_reserve_includes_its_cache(information: dict, limit: int) -> None:
    mlx = SimpleNamespace(
        get_active_memory=lambda: 40,
        get_cache_memory=lambda: 30,
        get_peak_memory=lambda: 60,
        device_info=lambda: information,
    )
    reading = read_memory("mlx", framework=mlx, system=SYSTEM)
    assert (reading.allocated_bytes, reading.reserved_bytes, reading.peak_bytes, reading.limit_bytes) == (
        40,
        70,
        60,
        limit,
    )


def test_mlx_reading_sees_a_live_array() -> None:
    mx = pytest.importorskip("mlx.core")
    before = read_memory("mlx").allocated_bytes
    block = mx.zeros((1 << 20,), dtype=mx.float32)
    mx.eval(block)
    reading = read_memory("mlx")
    assert reading.allocated_bytes - before >= 4 * 2**20
    assert reading.reserved_bytes >= reading.allocated_bytes
    assert reading.limit_bytes > 0
    del block


@pytest.mark.apple
@pytest.mark.skipif(
    not (sys.platform == "darwin" and platform.machine() == "arm64"), reason="needs the GPU of an Apple Silicon Mac"
)
def test_mps_reading_sees_a_live_tensor() -> None:
    torch = pytest.importorskip("torch")
    before = read_memory("mps").allocated_bytes
    block = torch.zeros(1 << 20, device="mps")
    reading = read_memory("mps")
    assert reading.allocated_bytes - before >= 4 * 2**20
    assert reading.reserved_bytes >= reading.allocated_bytes
    assert reading.limit_bytes > 0
    assert reading.process_bytes > 0
    del block


def test_an_unknown_device_and_a_missing_framework_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MonitorError, match="device 'tpu'"):
        read_memory("tpu", system=SYSTEM)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MonitorError, match=r"anarcho-monitor\[torch\]"):
        read_memory("mps", system=SYSTEM)


def write_group(folder: Path, files: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")


def make_root(root: Path, cgroup: str) -> Path:
    write_group(root / "proc/self", {"cgroup": cgroup, "status": "Name:\tx\nVmHWM:\t    2048 kB"})
    return root


MIB = 2**20


def test_a_container_of_version_two_limits_total_and_available(tmp_path: Path) -> None:
    root = make_root(tmp_path, "0::/pod/box")
    write_group(
        root / "sys/fs/cgroup/pod/box",
        {"memory.max": 64 * MIB, "memory.current": 40 * MIB, "memory.stat": f"anon 1\ninactive_file {8 * MIB}"},
    )
    memory = read_system_memory(root)
    assert memory.total_bytes == 64 * MIB
    assert memory.available_bytes == 32 * MIB  # clean file cache is given up under pressure
    assert memory.process_peak_bytes is None or sys.platform == "darwin" or memory.process_peak_bytes == 2 * MIB


def test_the_tightest_enclosing_group_counts(tmp_path: Path) -> None:
    root = make_root(tmp_path, "0::/pod/box")
    group = {"memory.current": 10 * MIB, "memory.stat": "inactive_file 0"}
    write_group(root / "sys/fs/cgroup/pod/box", {"memory.max": "max", **group})
    write_group(root / "sys/fs/cgroup/pod", {"memory.max": 32 * MIB, **group})
    assert read_system_memory(root).total_bytes == 32 * MIB


def test_a_container_of_version_one_is_found_although_its_path_is_the_hosts(tmp_path: Path) -> None:
    root = make_root(tmp_path, "5:cpu:/x\n4:memory:/docker/abc")
    write_group(
        root / "sys/fs/cgroup/memory",
        {
            "memory.limit_in_bytes": 48 * MIB,
            "memory.usage_in_bytes": 50 * MIB,
            "memory.stat": "inactive_file 5\ntotal_inactive_file 0",
        },
    )
    memory = read_system_memory(root)
    assert memory.total_bytes == 48 * MIB
    assert memory.available_bytes == 0


def test_without_control_groups_the_machine_counts(tmp_path: Path) -> None:
    assert read_system_memory(tmp_path).total_bytes == psutil.virtual_memory().total


def test_the_macos_footprint_is_read_from_the_documented_words() -> None:
    def proc_pid_rusage(pid: int, flavor: int, buffer) -> int:
        assert flavor == 4
        words = ctypes.cast(buffer, ctypes.POINTER(ctypes.c_uint64))
        words[9], words[30] = 123, 456
        return 0

    assert _footprint(proc_pid_rusage) == (123, 456)
    assert _footprint(lambda *_: -1) is None


@pytest.mark.skipif(sys.platform != "darwin", reason="libproc is part of macOS")
def test_the_macos_footprint_is_plausible_for_this_process() -> None:
    footprint = _footprint()
    assert footprint is not None
    assert 2**20 < footprint[0] <= footprint[1] < psutil.virtual_memory().total
