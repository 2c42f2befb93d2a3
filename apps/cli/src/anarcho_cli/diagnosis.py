"""What this machine is and can do, for `anarcho doctor`: system, packages, processor, devices and compiler.

Everything is read from documented interfaces; what a system does not tell is left out or None, never guessed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "anarcho-cli",
    "anarcho-tokenize",
    "anarcho-model",
    "anarcho-optim",
    "anarcho-train",
    "anarcho-monitor",
    "torch",
    "mlx",
    "numpy",
    "safetensors",
    "sentencepiece",
    "tensorboard",
    "psutil",
    "pydantic",
    "typer",
)

CPU_FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX512-BF16",
    "avx512_fp16": "AVX512-FP16",
    "amx_tile": "AMX",
    "amx_bf16": "AMX-BF16",
    "amx_fp16": "AMX-FP16",
    "asimd": "NEON",
    "bf16": "ARM BF16",
    "asimdhp": "ARM FP16",
}
"""Flag in /proc/cpuinfo -> the name of the instruction set."""

APPLE_FEATURES = {"hw.optional.arm.FEAT_BF16": "ARM BF16", "hw.optional.arm.FEAT_FP16": "ARM FP16"}
"""Key of sysctl on macOS -> the name of the instruction set."""

BFLOAT16 = ("AVX512-BF16", "AMX-BF16", "ARM BF16")
FLOAT16 = ("AVX512-FP16", "AMX-FP16", "ARM FP16")


def system_facts() -> dict[str, Any]:
    """Operating system, Python, and the versions of the packages that matter (None where one is not installed)."""
    return {
        "system": platform.platform(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def processor_facts() -> dict[str, Any]:
    """Cores, memory in bytes (limits of a container respected), instruction sets and the data types native to them."""
    import psutil
    from anarcho_monitor import read_system_memory

    memory = read_system_memory()
    features = cpu_features()
    return {
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(logical=True),
        "usable_threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory.total_bytes,
        "available_bytes": memory.available_bytes,
        "features": features,
        "native_dtypes": native_dtypes(features),
    }


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo"), sysctl: Callable[[str], str | None] | None = None) -> list[str]:
    """Names of the processor's instruction sets that matter for matrix products."""
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next((line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features"))), "")
        return [name for flag, name in CPU_FLAGS.items() if flag in flags.split()]
    read = sysctl or _sysctl
    return [name for key, name in APPLE_FEATURES.items() if read(key) == "1"]


def native_dtypes(features: list[str]) -> list[str]:
    """Data types that the processor multiplies natively; any other is emulated and slower than float32."""
    native = ["float32"]
    native += ["bfloat16"] if any(name in features for name in BFLOAT16) else []
    native += ["float16"] if any(name in features for name in FLOAT16) else []
    return native


def _sysctl(key: str) -> str | None:
    return _first_line(["sysctl", "-n", key])


def compiler_facts(run: Callable[[list[str]], str | None] | None = None) -> dict[str, Any]:
    """The C++ compiler that torch.compile needs on the CPU: path, first line of its version, and Python's headers.

    ``usable`` is False where one of them is missing; the compiler of macOS is there in name before Xcode's tools are.
    """
    read = run or _first_line
    candidates = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    path = next((found for name in candidates if name and (found := shutil.which(name))), None)
    version = read([path, "--version"]) if path else None
    headers = (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()
    return {"path": path, "version": version, "python_headers": headers, "usable": version is not None and headers}


def _first_line(command: list[str]) -> str | None:
    """The first line that a command prints, or None where it is missing, fails or hangs."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.splitlines()[0].strip() if result.stdout else None


def torch_devices() -> dict[str, dict[str, Any]]:
    """Device name -> what PyTorch says of it; empty where torch is not installed."""
    try:
        import torch
    except ModuleNotFoundError:
        return {}
    devices: dict[str, dict[str, Any]] = {"cpu": {"capability": torch.backends.cpu.get_cpu_capability()}}
    devices["cpu"]["num_threads"] = torch.get_num_threads()
    if torch.backends.mps.is_available():
        devices["mps"] = {"name": "Apple GPU", "memory_bytes": torch.mps.recommended_max_memory()}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        devices["cuda"] = {"name": ", ".join(names), "memory_bytes": total, "free_bytes": free, "bfloat16": native}
    return devices


def mlx_facts() -> dict[str, Any] | None:
    """What MLX runs on, or None where it is not installed."""
    try:
        import mlx.core as mx
    except ImportError:
        return None
    return {"device": str(mx.default_device()), "metal": mx.metal.is_available()}
