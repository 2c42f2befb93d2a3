"""Products in 8-bit floats beside those in bfloat16, on a CUDA GPU: alone, their kernels, and layers forward and backward, compiled.

    python benchmarks/float8_products.py --dims 768 2048 --json float8_products.jsonl

It says which layers gain, and so what `MIN_WIDTH` and `MIN_FUSED_WIDTH` of `anarcho_model.layers.torch_float8` should be. A width is the
dim of a model with a hidden layer four times as wide and heads of 64 columns. Times are medians of the device's own clock, in milliseconds.

* `product`: `tokens x summed x outputs` of the forward pass, of the gradient of the input and of that of the weight; float8 with the fast
  and the exact sum;
* `kernel`: what writes operands in both orders, by its tiles, beside the kernel for bfloat16;
* `layer`: a residual layer, its norm and all casts included, forward and backward, weights in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from anarcho_model import ModelConfig
from anarcho_model.layers import torch_cuda, torch_float8
from anarcho_model.layers.torch import Attention, AttentionContext, RMSNorm, SwiGLU
from torch import Tensor

HEAD_SIZE = 64
HALF, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2
TILES = ((128, 64, 8), (64, 64, 4), (128, 64, 16), (64, 128, 8), (128, 128, 16), (256, 64, 16))
"""Rows, columns and warps."""
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measure what was asked for; the rows that were printed are returned, too."""
    options = _options(arguments)
    rows = []
    for part in options.parts:
        for dim in options.dims:
            for row in {"product": products, "kernel": kernels, "layer": layers}[part](dim, options):
                rows.append({"part": part, "dim": dim, **row})
                print(json.dumps(rows[-1]), flush=True)
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[768, 2048])
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument(
        "--parts", nargs="+", choices=("product", "kernel", "layer"), default=["product", "kernel", "layer"]
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write one line for each row to this file")
    return parser.parse_args(arguments)


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """The median of so many runs by the device's clock, after three that do not count."""
    times = []
    for index in range(repeats + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        if index >= 3:
            times.append(start.elapsed_time(stop))
    return round(statistics.median(times), 4)


def products(dim: int, options: argparse.Namespace) -> Iterator[Row]:
    """Each kind of product of each layer."""
    hidden, tokens = 4 * dim, options.tokens
    unit = torch.ones((), device="cuda")
    for name, inputs, outputs in (
        ("o", dim, dim),
        ("q, k, v", dim, 3 * dim),
        ("gate, up", dim, 2 * hidden),
        ("down", hidden, dim),
    ):
        for use, rows, summed, columns, kind in (
            ("output", tokens, inputs, outputs, E4M3),
            ("gradient of the input", tokens, outputs, inputs, E5M2),
            ("gradient of the weight", outputs, tokens, inputs, E5M2),
        ):
            a, b = (torch.randn(size, summed, device="cuda", dtype=HALF) for size in (rows, columns))
            if use == "gradient of the weight":  # bfloat16 reads what lies as it was made
                wide = [t.t().contiguous() for t in (a, b)]
                plain = milliseconds(lambda x=wide: x[0].t() @ x[1], options.repeats)
            else:
                plain = milliseconds(lambda x=a, y=b: x @ y.t(), options.repeats)
            narrow = (a / 100).to(kind), (b / 100).to(E4M3).t()
            row: Row = {"layer": name, "use": use, "shape": f"{rows} x {summed} x {columns}", "bfloat16 ms": plain}
            for key, fast in (("fast", True), ("exact", False)):
                time = milliseconds(
                    lambda x=narrow, fast=fast: torch._scaled_mm(
                        *x, scale_a=unit, scale_b=unit, out_dtype=HALF, use_fast_accum=fast
                    ),
                    options.repeats,
                )
                row |= {f"{key} ms": time, f"{key} TFLOP/s": round(2e-9 * rows * summed * columns / time)}
            yield row


def kernels(dim: int, options: argparse.Namespace) -> Iterator[Row]:
    """Those of SwiGLU, and of a gradient as wide as the model, by tiles."""
    from anarcho_model.layers import torch_cuda_kernels, torch_float8_kernels

    hidden, tokens = 4 * dim, options.tokens
    gate_up = torch.randn(tokens, 2 * hidden, device="cuda", dtype=HALF)
    grad = torch.randn(tokens, hidden, device="cuda", dtype=HALF)
    narrow, unit = grad[:, :dim].contiguous(), torch.ones((), device="cuda")
    narrower = narrow.to(E4M3)
    numbers, targets = torch.randn(tokens, device="cuda"), torch.zeros(tokens, device="cuda", dtype=torch.long)
    plain = milliseconds(lambda: torch_cuda_kernels.swiglu_gradients(gate_up, grad), options.repeats)
    yield {"kernel": "swiglu_gradients in bfloat16", "ms": plain}
    time = milliseconds(
        lambda: torch_float8_kernels.swiglu_hidden(gate_up, largest=448.0, smallest_limit=1e-30), options.repeats
    )
    yield {"kernel": "swiglu_hidden", "ms": time, "GB/s": round(tokens * 5 * hidden / time / 1e6)}
    chosen = torch_float8_kernels.ROWS, torch_float8_kernels.COLUMNS, torch_float8_kernels.WARPS
    for tile in TILES:
        torch_float8_kernels.ROWS, torch_float8_kernels.COLUMNS, torch_float8_kernels.WARPS = tile
        for name, run, moved in (
            ("swiglu_gradients", lambda: torch_float8_kernels.swiglu_gradients(gate_up, grad, unit, unit), 11 * hidden),
            ("cast_in_both_orders", lambda: torch_float8_kernels.cast_in_both_orders(narrow, unit), 4 * dim),
            ("turned", lambda: torch_float8_kernels.turned(narrower), 2 * dim),
            (
                "logit_gradients",
                lambda: torch_float8_kernels.logit_gradients(gate_up, numbers, targets, numbers, unit),
                8 * hidden,
            ),
        ):
            time = milliseconds(run, options.repeats)
            yield {"kernel": name, "tile": tile, "ms": time, "GB/s": round(tokens * moved / time / 1e6)}
    torch_float8_kernels.ROWS, torch_float8_kernels.COLUMNS, torch_float8_kernels.WARPS = chosen


def layers(dim: int, options: argparse.Namespace) -> Iterator[Row]:
    """SwiGLU, heads of queries, keys and values, and a single product, each in bfloat16 and in 8-bit floats."""
    torch_float8.MIN_WIDTH = torch_float8.MIN_FUSED_WIDTH = 0
    config = ModelConfig(vocab_size=256, dim=dim, num_heads=dim // HEAD_SIZE, num_layers=1, context_length=4096)
    torch.manual_seed(0)
    norm, feed_forward, attention = RMSNorm(dim, eps=1e-5).cuda(), SwiGLU(config).cuda(), Attention(config).cuda()
    length = min(4096, options.tokens)
    angles = torch.rand(1, 1, length, HEAD_SIZE // 2, device="cuda")
    context = AttentionContext(cos=angles.cos(), sin=angles.sin())
    x = torch.randn(options.tokens // length, length, dim, device="cuda", requires_grad=True)

    def swiglu(limit: Tensor | None) -> Any:
        return x + feed_forward(norm(x), limit=limit)

    def heads(limit: Tensor | None) -> Any:
        return attention._heads_of(norm(x), context, limit)

    def single(limit: Tensor | None) -> Any:
        flat, layer = norm(x).view(-1, dim), attention.o_proj
        made = layer(flat) if limit is None else torch_float8.linear(flat, layer.weight)
        return x + made.view(x.shape)

    for name, function, module in (
        ("SwiGLU", swiglu, feed_forward),
        ("q, k, v", heads, attention),
        ("o", single, attention),
    ):
        row: Row = {"layer": name}
        used = [x, norm.weight, *module.parameters()]
        results = []
        for key in ("bfloat16", "float8"):
            torch._dynamo.reset()

            def forward(key: str = key, function: Any = function) -> Any:
                with torch.autocast("cuda", HALF):
                    return function(norm.limit() if key == "float8" else None)

            compiled = torch.compile(forward, dynamic=False, fullgraph=True)
            shapes = [(t.shape, t.dtype) for t in _together(compiled())]
            torch.manual_seed(1)
            grads = [torch.randn(shape, device="cuda", dtype=dtype) * 1e-3 for shape, dtype in shapes]

            def both(compiled: Any = compiled, grads: Any = grads, used: Any = used) -> Any:
                return torch.autograd.grad(_together(compiled()), used, grads, allow_unused=True)

            results.append(both())
            torch.cuda.reset_peak_memory_stats()
            row[f"{key} ms"] = milliseconds(both, options.repeats)
            row[f"{key} GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        row["ratio"] = round(row["bfloat16 ms"] / row["float8 ms"], 3)
        row["largest relative error"] = round(max(_errors(*results)), 4)
        yield row


def _together(made: Any) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


def _errors(plain: Any, narrow: Any) -> Iterator[float]:
    """Of gradients, as norms; infinite where one has numbers that are not."""
    for a, b in zip(plain, narrow, strict=True):
        if a is not None:
            yield float(((a.float() - b.float()).norm() / a.float().norm()).nan_to_num(math.inf))


if __name__ == "__main__":
    if not torch.cuda.is_available() or not torch_cuda.AVAILABLE:
        raise SystemExit("This benchmark needs a CUDA GPU, and Triton.")
    main()
