"""What `auto` means in PyTorch: the compute type, and whether the model is compiled."""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
from pathlib import Path

import torch

COMPILE_MIN_FLOPS = 5e12
"""A CPU run of fewer floating-point operations ends sooner without compilation: at 150 GFLOP/s it takes about half a minute."""


def native_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 matrices in hardware, or through Metal from macOS 14 on."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":
        return int(platform.mac_ver()[0].split(".")[0] or 0) >= 14
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The compute type: ``auto`` is bfloat16 where native, float16 on other GPUs (with loss scaling), float32 on other CPUs."""
    if name == "auto":
        if native_bfloat16(device):
            return torch.bfloat16
        return torch.float32 if device.type == "cpu" else torch.float16
    if name == "float16" and device.type == "cpu":
        raise ValueError(
            "train.precision is float16 on the CPU, where it is slow and loses range; use bfloat16, float32 or auto"
        )
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def resolve_compile(name: str, device: torch.device, *, flops: float) -> bool:
    """Whether the model is compiled.

    ``auto`` compiles on CUDA, and on the CPU where C++ code can be compiled and the run, of ``flops`` floating-point operations, is long
    enough to earn the compilation back. The answer depends on the configuration and the machine only, so that a resumed run decides alike.
    """
    if name != "auto":
        return name == "on"
    if device.type == "cpu":
        return flops >= COMPILE_MIN_FLOPS and _can_compile_for_cpu()
    return device.type == "cuda"


def _can_compile_for_cpu() -> bool:
    """Whether the C++ compiler and the Python headers are there that torch.compile needs for CPU code."""
    compilers = (os.environ.get("CXX"), "g++", "clang++")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return headers.is_file() and any(name and shutil.which(name) for name in compilers)
