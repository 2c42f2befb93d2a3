"""Tokens a second of whole optimizer steps on the CPU: ours, transformers' Llama and a plain GPT-2-like loop, in turns in one run.

    python benchmarks/cpu_training.py --json cpu_training.jsonl --markdown table.md

All sides train on the same random tokens, compiled, matrix products in bfloat16, float32 weights:

* `ours` is the trainer's own step, from arrays of NumPy to the loss as a number, with clipping, Muon for the matrices of the blocks and
  AdamW for the rest, and with the settings of the C library's memory that a run makes;
* `transformers, Muon` is a Llama of the same shape with `torch.optim.Muon` and fused AdamW, `transformers, AdamW` the same with AdamW;
* `GPT-2-like, AdamW` is a plain loop around a smaller model of the same width and depth: LayerNorm, learned positions, one matrix for
  queries, keys and values, GELU.

The peers do not clip. Each side has a process of its own, which waits while the others have their turn. Step times are medians over all
turns after the steps that compile; `optimizer_ms` is the time in the optimizer's `step`, `share` its part of the whole. `matmul` is the
rate of a product of bfloat16 matrices of 2048, taken in each turn, and `utilisation` the model's operations (6 for each token and
parameter of a matrix, and those of causal attention) beside it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WARM_STEPS = 3
"""The first compiles, the others find their memory."""
SIDES = ("ours", "transformers, Muon", "transformers, AdamW", "GPT-2-like, AdamW")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What all sides have in common."""

    layers: int
    dim: int
    heads: int
    hidden_dim: int
    vocabulary: int
    length: int
    batch: int
    precision: Literal["bfloat16", "float32"]

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def ids(self) -> np.ndarray:
        return np.random.default_rng(0).integers(0, self.vocabulary, (self.batch, self.length + 1), dtype=np.int32)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.precision == "bfloat16")


class Side:
    """One whole step, with the seconds of each and of the optimizer within it."""

    def __init__(self, name: str, shape: Shape, *, compiled: bool) -> None:
        torch.manual_seed(0)
        self.tokens = shape.tokens
        make = {"ours": ours, "GPT-2-like, AdamW": gpt2_like}.get(name, transformers_llama)
        self.model, self.optimizers, self.step = make(name, shape, compiled=compiled)
        self.in_optimizer = 0.0
        for optimizer in self.optimizers:
            self._time(optimizer)

    def _time(self, optimizer: Any) -> None:
        inner = optimizer.step

        def step(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = inner(*arguments, **options)
            self.in_optimizer += time.perf_counter() - started
            return result

        optimizer.step = step

    def flops(self, shape: Shape) -> float:
        """Of one step: forward and twice that for backward."""
        matrices = sum(p.numel() for name, p in self.model.named_parameters() if p.ndim == 2 and "position" not in name)
        attention = shape.layers * 2 * shape.dim * shape.length // 2  # scores and mixing, up to each query
        return 6.0 * shape.tokens * (matrices + attention)


def ours(name: str, shape: Shape, *, compiled: bool) -> tuple[nn.Module, list[Any], Callable[[], float]]:
    """The trainer's step, as a run makes it."""
    from anarcho_cli.freed_memory import keep_freed_memory, return_freed_memory
    from anarcho_model import ModelConfig
    from anarcho_model.torch import GPT
    from anarcho_optim import OptimConfig
    from anarcho_optim.torch import MuonAdamW, param_groups
    from anarcho_tokenize import Batch
    from anarcho_train import StepSchedule, TrainConfig
    from anarcho_train.steps.torch import TorchStep

    return_freed_memory()
    if compiled:
        keep_freed_memory()
    model = GPT(
        ModelConfig(
            vocab_size=shape.vocabulary,
            context_length=shape.length,
            num_layers=shape.layers,
            dim=shape.dim,
            num_heads=shape.heads,
            hidden_dim=shape.hidden_dim,
            tie_embeddings=True,
        )
    )
    model.init_weights(seed=0)
    optimizer = MuonAdamW(param_groups(model, config=OptimConfig()))
    step = TorchStep(
        model,
        optimizer,
        config=TrainConfig(precision=shape.precision, compile="on" if compiled else "off"),
        save_model=lambda model, directory: None,
        load_model=lambda model, directory: None,
    )
    ids = shape.ids()
    rows = Batch(tokens=ids[:, :-1], targets=ids[:, 1:], weights=np.ones(ids[:, 1:].shape, np.float32))
    return model, [optimizer], lambda: step.train([rows], schedule=StepSchedule(lr_scale=1.0)).loss


def transformers_llama(name: str, shape: Shape, *, compiled: bool) -> tuple[nn.Module, list[Any], Callable[[], float]]:
    """A Llama as a script with transformers trains it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.dim,
            intermediate_size=shape.hidden_dim,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=shape.length,
            tie_word_embeddings=True,
            attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
            use_cache=False,
        )
    )
    optimizers: list[Any] = [torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)]
    if name.endswith("Muon"):
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
        rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
        optimizers = [torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(rest, lr=1e-4, fused=True)]
    forward: Any = torch.compile(model, dynamic=False) if compiled else model

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        logits = forward(input_ids=tokens).logits
        return F.cross_entropy(logits.float().view(-1, shape.vocabulary), targets.reshape(-1))

    return model, optimizers, _plain_step(loss, optimizers, shape)


def gpt2_like(name: str, shape: Shape, *, compiled: bool) -> tuple[nn.Module, list[Any], Callable[[], float]]:
    """A GPT-2-like model in a loop of a few lines."""
    model = PlainGPT(shape)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)]
    forward: Any = torch.compile(model, dynamic=False) if compiled else model
    return model, optimizers, _plain_step(forward, optimizers, shape)


def _plain_step(
    loss_of: Callable[[Tensor, Tensor], Tensor], optimizers: list[Any], shape: Shape
) -> Callable[[], float]:
    ids = torch.from_numpy(shape.ids()).long()

    def step() -> float:
        with shape.autocast():
            loss = loss_of(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return step


class PlainBlock(nn.Module):
    """Attention and a GELU layer of four times the width, each behind a LayerNorm without bias."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(dim, bias=False) for _ in range(2))
        self.qkv, self.mix = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.widen, self.narrow = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        heads = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads.unbind(), is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).reshape(batch, length, dim))
        return x + self.narrow(F.gelu(self.widen(self.norms[1](x))))


class PlainGPT(nn.Module):
    """GPT-2 without biases and dropout, output layer tied to the embedding; returns the mean loss."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens, self.positions = (nn.Embedding(size, shape.dim) for size in (shape.vocabulary, shape.length))
        self.blocks = nn.ModuleList(PlainBlock(shape.dim, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.dim, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


_side: Side | None = None
"""The side that this process measures."""


def prepare(name: str, shape: Shape, threads: int, compiled: bool) -> dict[str, Any]:
    """Makes the process's side and its first steps."""
    global _side
    torch.set_num_threads(threads)
    _side = Side(name, shape, compiled=compiled)
    started = time.perf_counter()
    losses = [_side.step() for _ in range(WARM_STEPS)]
    return {
        "parameters": sum(p.numel() for p in _side.model.parameters()),
        "flops": _side.flops(shape),
        "warm_s": round(time.perf_counter() - started, 1),
        "first_loss": round(losses[0], 3),
    }


def turn(steps: int) -> dict[str, Any]:
    """So many steps of the process's side."""
    assert _side is not None
    times, in_optimizer, loss = [], [], 0.0
    for _ in range(steps):
        _side.in_optimizer = 0.0
        started = time.perf_counter()
        loss = _side.step()
        times.append(time.perf_counter() - started)
        in_optimizer.append(_side.in_optimizer)
    return {"seconds": times, "optimizer_seconds": in_optimizer, "loss": loss}


def matmul_rate(size: int = 2048) -> float:
    """Operations a second of a product of bfloat16 matrices."""
    a, b = torch.randn(size, size).bfloat16(), torch.randn(size, size).bfloat16()
    times = []
    for _ in range(7):
        started = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, write and return one row for each side."""
    options = _options(arguments)
    names = ("layers", "dim", "heads", "hidden_dim", "vocabulary", "length", "batch", "precision")
    shape = Shape(**{name: getattr(options, name) for name in names})
    torch.set_num_threads(options.threads)
    with ExitStack() as stack:
        context = multiprocessing.get_context("spawn")
        processes = {
            name: stack.enter_context(ProcessPoolExecutor(1, mp_context=context))
            for name in SIDES
            if not options.only or any(wanted in name for wanted in options.only)
        }
        made = {
            name: process.submit(prepare, name, shape, options.threads, not options.eager).result()
            for name, process in processes.items()
        }
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in processes}
        rates = []
        for _ in range(options.rounds):
            for name, process in processes.items():
                turns[name].append(process.submit(turn, options.steps).result())
            rates.append(matmul_rate())
    rate = statistics.median(rates)
    rows = [_row(name, made[name], turns[name], shape=shape, rate=rate) for name in made]
    _add_ratios(rows)
    for row in rows:
        print(json.dumps(row), flush=True)
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = _table(rows)
    print(table)
    if options.markdown:
        options.markdown.write_text(table)
    return rows


def _row(name: str, made: dict[str, Any], turns: list[dict[str, Any]], *, shape: Shape, rate: float) -> dict[str, Any]:
    seconds = statistics.median(time for one in turns for time in one["seconds"])
    optimizer = statistics.median(time for one in turns for time in one["optimizer_seconds"])
    return {
        "side": name,
        "parameters": made["parameters"],
        "tokens/s": round(shape.tokens / seconds),
        "step_ms": round(seconds * 1e3, 1),
        "optimizer_ms": round(optimizer * 1e3, 1),
        "share": round(optimizer / seconds, 3),
        "warm_s": made["warm_s"],
        "losses": [made["first_loss"], round(turns[-1]["loss"], 3)],
        "utilisation": round(made["flops"] / seconds / rate, 3),
        "matmul GFLOP/s": round(rate / 1e9),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
    }


def _add_ratios(rows: list[dict[str, Any]]) -> None:
    own = next((row["tokens/s"] for row in rows if row["side"] == "ours"), None)
    for row in rows:
        row["ours / this"] = round(own / row["tokens/s"], 2) if own else None


def _table(rows: list[dict[str, Any]]) -> str:
    keys = [
        "side",
        "parameters",
        "tokens/s",
        "ours / this",
        "step_ms",
        "optimizer_ms",
        "share",
        "utilisation",
        "matmul GFLOP/s",
    ]
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(str(row[key]) for key in keys) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {
        "rounds": (5, "turns of each side"),
        "steps": (3, "steps of a turn"),
        "threads": (2, "of PyTorch"),
        "layers": (6, "of the model"),
        "dim": (384, "of the model"),
        "heads": (6, "of the model"),
        "hidden-dim": (1536, "of the feed-forward layers of the Llamas"),
        "vocabulary": (8192, "tokens"),
        "length": (512, "tokens of a sequence"),
        "batch": (8, "sequences of a step"),
    }
    for name, (default, text) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="compile no side")
    parser.add_argument("--only", action="append", help="measure the sides whose name contains this; may be repeated")
    parser.add_argument("--json", type=Path, help="write one line for each side to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
