"""What `auto` means in MLX: the compute type, and whether functions are compiled."""

from __future__ import annotations

import mlx.core as mx

COMPILE_MIN_FLOPS = 1e12
"""A CPU run of fewer floating-point operations ends sooner without compilation: at 10 GFLOP/s it takes about two minutes."""


def resolve_precision(name: str, device: mx.Device) -> mx.Dtype:
    """The compute type: ``auto`` is bfloat16 on a GPU, Apple's or CUDA's, and float32 on the CPU."""
    if name == "auto":
        return mx.float32 if device == mx.cpu else mx.bfloat16
    if name == "float16" and device == mx.cpu:
        raise ValueError(
            "train.precision is float16 on the CPU, where it is slow and loses range; use bfloat16, float32 or auto"
        )
    return {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}[name]


def resolve_compile(name: str, device: mx.Device, *, flops: float) -> bool:
    """Whether functions are compiled: ``auto`` compiles on a GPU, and on the CPU where the run, of ``flops`` operations, is long enough.

    The answer depends on the configuration and the machine only, so that a resumed run decides alike. Without a C++ compiler, MLX
    leaves the CPU's operations as they are by itself.
    """
    if name != "auto":
        return name == "on"
    return device != mx.cpu or flops >= COMPILE_MIN_FLOPS
