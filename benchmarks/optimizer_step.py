"""Time, memory and launches of one whole Muon + AdamW step, ours and its peers' in one run.

    python benchmarks/optimizer_step.py --device cuda [--peers FOLDER] [--output FILE.jsonl]
    python benchmarks/optimizer_step.py --device cpu

CUDA: the parameters of a 137.8 M Llama-like model (12 layers of 768, SwiGLU 3072, vocabulary 32000, tied), float32, medians of consecutive
steps. CPU: those of a 17 M one (6 layers of 384, SwiGLU 1536, vocabulary 8192) on two threads, medians of interleaved rounds.
``--peers`` is a folder with checkouts of microsoft/dion (``dion``) and karpathy/nanochat (``nanochat``); a peer that is missing or fails
is a row with its error.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from anarcho_optim.torch import MuonAdamW
from torch import Tensor

Parameters = tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]
CUDA_SHAPE = {"layers": 12, "dim": 768, "hidden": 3072, "vocab": 32000}
CPU_SHAPE = {"layers": 6, "dim": 384, "hidden": 1536, "vocab": 8192}


def make_parameters(device: str, *, layers: int, dim: int, hidden: int, vocab: int) -> Parameters:
    """Muon's matrices and AdamW's rest of a Llama-like model, with gradients of a fixed seed."""
    torch.manual_seed(0)
    shapes = [(dim, dim)] * 4 + [(hidden, dim)] * 2 + [(dim, hidden)]
    matrices = [torch.randn(shape, device=device) * 0.02 for _ in range(layers) for shape in shapes]
    rest = [
        torch.randn(vocab, dim, device=device) * 0.02,
        *(torch.ones(dim, device=device) for _ in range(2 * layers + 1)),
    ]
    named = [(f"p{i}", torch.nn.Parameter(p)) for i, p in enumerate([*matrices, *rest])]
    for _, p in named:
        p.grad = torch.randn_like(p) * 1e-3
    return named[: len(matrices)], named[len(matrices) :]


class Pair:
    """Two optimizers stepped one after the other."""

    def __init__(self, *optimizers: Any) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def ours(matrices: list[Any], rest: list[Any], **options: Any) -> Any:
    muon = {"algorithm": "muon", "params": matrices, "weight_decay": 0.1, **options.pop("muon", {})}
    return MuonAdamW([muon, {"algorithm": "adamw", "params": rest}], **options)


def torch_muon(matrices: list[Any], rest: list[Any]) -> Any:
    fused = torch.optim.AdamW([p for _, p in rest], lr=1e-3, fused=True)
    return Pair(torch.optim.Muon([p for _, p in matrices], lr=1e-3), fused)


def torch_adamw(matrices: list[Any], rest: list[Any]) -> Any:
    return torch.optim.AdamW([p for _, p in [*matrices, *rest]], lr=1e-3, fused=True)


def dion(matrices: list[Any], rest: list[Any], *, name: str = "Muon", triton: bool = False, graph: bool = False) -> Any:
    import dion as library  # type: ignore[import-not-found]

    groups = [
        {"params": [p for _, p in matrices]},
        {"params": [p for _, p in rest], "algorithm": "adamw", "lr": 1e-3},
    ]
    optimizer = getattr(library, name)(groups, lr=torch.tensor(0.02) if graph else 0.02, use_triton=triton)
    if not graph:
        return optimizer
    from dion.cuda_graph import CudaGraphOptimizer  # type: ignore[import-not-found]

    return CudaGraphOptimizer(optimizer)


def nanochat(matrices: list[Any], rest: list[Any]) -> Any:
    from nanochat.optim import MuonAdamW as Library  # type: ignore[import-not-found]

    adamw = {"kind": "adamw", "params": [p for _, p in rest], "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-10}
    groups = [adamw | {"weight_decay": 0.0}]
    for shape in sorted({tuple(p.shape) for _, p in matrices}):
        members = [p for _, p in matrices if tuple(p.shape) == shape]
        muon = {"kind": "muon", "lr": 0.02, "momentum": 0.95, "ns_steps": 5, "beta2": 0.9, "weight_decay": 0.0}
        groups.append(muon | {"params": members})
    return Library(groups)


Factory = Callable[[list[Any], list[Any]], Any]

CUDA_CASES: dict[str, Factory] = {
    "torch.optim.AdamW fused, no Muon": torch_adamw,
    "torch.optim.Muon + fused AdamW": torch_muon,
    "nanochat MuonAdamW": nanochat,
    "dion Muon": dion,
    "dion Muon, Triton": lambda m, r: dion(m, r, triton=True),
    "dion NorMuon, Triton": lambda m, r: dion(m, r, name="NorMuon", triton=True),
    "dion Muon, Triton, CUDA graph": lambda m, r: dion(m, r, triton=True, graph=True),
    "anarcho-optim": ours,
    "anarcho-optim, CUDA graph": lambda m, r: ours(m, r, cuda_graph=True),
    "anarcho-optim, bfloat16": lambda m, r: ours(m, r, muon={"ns_dtype": "bfloat16"}),
    "anarcho-optim, NorMuon, cautious decay": lambda m, r: ours(
        m, r, muon={"normuon": True, "cautious_weight_decay": True}
    ),
    "anarcho-optim, polar-express-8": lambda m, r: ours(m, r, muon={"variant": "polar-express-8"}),
}

CPU_CASES: dict[str, Factory] = {
    "torch.optim.AdamW fused, no Muon": torch_adamw,
    "torch.optim.Muon + fused AdamW": torch_muon,
    "anarcho-optim": ours,
    "anarcho-optim, float32": lambda m, r: ours(m, r, muon={"ns_dtype": "float32"}),
}


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def count_launches(optimizer: Any) -> int:
    """Kernels that one step runs on the GPU, copies included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def singular_range(optimizer: Any, matrix: Tensor) -> tuple[float, float]:
    """Smallest and largest singular value, over the median, of what one step adds to ``matrix``."""
    before = matrix.detach().clone()
    optimizer.step()
    values = torch.linalg.svdvals((matrix.detach() - before).float())
    values = values / values.median()
    return round(values.min().item(), 3), round(values.max().item(), 3)


def measure_cuda(name: str, factory: Factory) -> dict[str, Any]:
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()
    matrices, rest = make_parameters("cuda", **CUDA_SHAPE)
    optimizer = factory(matrices, rest)
    started = time.perf_counter()
    for _ in range(8):
        optimizer.step()
    torch.cuda.synchronize()
    warm_up = time.perf_counter() - started
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    gpu, wall = [], []
    for _ in range(30):
        torch.cuda.synchronize()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        at = time.perf_counter()
        start.record()
        optimizer.step()
        stop.record()
        torch.cuda.synchronize()
        wall.append(time.perf_counter() - at)
        gpu.append(start.elapsed_time(stop))
    row = {
        "optimizer": name,
        "step_ms": round(median(gpu), 2),
        "wall_ms": round(median(wall) * 1e3, 2),
        "min_ms": round(min(gpu), 2),
        "extra_MB": round((torch.cuda.max_memory_allocated() - base) / 2**20),
        "warm_up_s": round(warm_up, 1),
        "singular_values": singular_range(optimizer, matrices[6][1]),
        "launches": count_launches(optimizer),
    }
    del optimizer, matrices, rest
    gc.collect()
    deeper = factory(*make_parameters("cuda", **(CUDA_SHAPE | {"layers": 24})))
    for _ in range(3):
        deeper.step()
    return row | {"launches_24_layers": count_launches(deeper)}


def measure_cpu(rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(2)
    optimizers = {name: factory(*make_parameters("cpu", **CPU_SHAPE)) for name, factory in CPU_CASES.items()}
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for index in range(rounds + 2):
        for name, optimizer in optimizers.items():
            at = time.perf_counter()
            optimizer.step()
            if index >= 2:
                times[name].append(time.perf_counter() - at)
    base = median(times["torch.optim.Muon + fused AdamW"])
    return [
        {
            "optimizer": name,
            "step_ms": round(median(values) * 1e3, 1),
            "of_torch_muon": round(median(values) / base, 3),
            "min_ms": round(min(values) * 1e3, 1),
        }
        for name, values in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--peers", type=Path, default=Path(".peers"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", help="run the cases whose name contains this")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    sys.path[:0] = [str(arguments.peers / name) for name in ("nanochat", "dion")]
    rows: list[dict[str, Any]] = []
    if arguments.device == "cpu":
        rows = measure_cpu(arguments.rounds)
    for name, factory in CUDA_CASES.items() if arguments.device == "cuda" else ():
        if arguments.only and arguments.only not in name:
            continue
        try:
            rows.append(measure_cuda(name, factory))
        except Exception as error:
            rows.append({"optimizer": name, "error": repr(error)[:300]})
        print(json.dumps(rows[-1]), flush=True)
    if arguments.device == "cpu":
        print("\n".join(map(json.dumps, rows)))
    if arguments.output:
        arguments.output.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
