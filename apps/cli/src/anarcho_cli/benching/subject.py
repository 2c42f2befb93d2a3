"""What is measured: a run's own training step on one framework and device, and that device's bare matrix products."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from anarcho_cli.benching.timing import best_rate
from anarcho_cli.config import RunConfig

if TYPE_CHECKING:
    from anarcho_cli.back_ends import BackEnd, TrainingStep

SIZES = (256, 512, 1024, 2048, 4096)
CUDA_SIZES = (*SIZES, 8192)
"""Sides of the matrices of which the fastest product is the ceiling."""


def is_installed(backend: str) -> bool:
    """Whether a framework is installed; does not load it."""
    from anarcho_cli.devices import DeviceError, resolve_backend

    try:
        return resolve_backend(backend) == backend
    except DeviceError:
        return False


def new_step(backend: BackEnd, config: RunConfig, *, device: str) -> TrainingStep:
    """The step that a run of this configuration makes, with random weights; it is never saved, so it needs no tokenizer."""
    backend.require_supported(config, device)
    backend.limit_memory(device)
    tokenizer: Any = SimpleNamespace(vocab_size=config.tokenizer.vocab_size)
    return backend.make_step(config, tokenizer, Path(os.devnull), device=device)


def device_name(backend: BackEnd, device: str) -> str:
    """The name of the device; a Mac's chip has one for its processor and its GPU."""
    from anarcho_cli.benching.machine import machine_facts

    return backend.device_name(device) if device == "cuda" else machine_facts()["chip"]


def published_peak(name: str, *, device: str, precision: str) -> float | None:
    """The peak FLOP/s that the maker states, None where there is no such figure: for a CPU, and for float32 on CUDA."""
    from anarcho_monitor import peak_flops

    return None if device == "cpu" or (device == "cuda" and precision == "float32") else peak_flops(name)


def ceiling(backend: str, *, device: str, precision: str) -> float:
    """FLOP/s of the device's fastest matrix products of a type, without anything around them."""
    product = (_mlx_product if backend == "mlx" else _torch_product)(device, precision)
    return best_rate(product, sizes=CUDA_SIZES if device == "cuda" else SIZES)


def _torch_product(device: str, precision: str) -> Callable[[int, int], float]:
    import torch

    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device, lambda: None)

    def product(size: int, count: int) -> float:
        left, right = (torch.ones(size, size, device=device, dtype=getattr(torch, precision)) for _ in range(2))
        wait()
        start = time.perf_counter()
        for _ in range(count):
            _ = left @ right
        wait()
        return time.perf_counter() - start

    return product


def _mlx_product(device: str, precision: str) -> Callable[[int, int], float]:
    import mlx.core as mx

    def product(size: int, count: int) -> float:
        dtype = getattr(mx, precision)
        with mx.stream(mx.cpu if device == "cpu" else mx.gpu):
            # MLX does what is asked for once: the factors of one evaluation differ.
            lefts = [mx.full((size, size), 1 + n, dtype=dtype) for n in range(min(count, 8))]
            right = mx.ones((size, size), dtype=dtype)
            mx.eval(lefts, right)
            start = time.perf_counter()
            for done in range(0, count, 8):
                mx.eval([left @ right for left in lefts[: count - done]])
            return time.perf_counter() - start

    return product
