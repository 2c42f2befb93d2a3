"""Tokens a second and memory of training on a CUDA GPU, beside transformers' Llama of the same shape, in one run.

    python benchmarks/cuda_training.py 4096:16:muon 4096:16:adamw 4096:1:muon:checkpointing --json cuda_training.jsonl --markdown table.md

A job is `context:batch:optimizer`, and what else is set for it: `:checkpointing` if each block keeps its input alone, `:lean` for our
weights and state in bfloat16, `:at_once` for our updates within the backward pass (without clipping), `:layers=24` or `:dim=1536` for
another size (heads have 64 columns), `:documents=8` for so many documents in a sequence that do not see each other (ours alone). Both
sides make whole optimizer steps on the same random tokens, compiled, matrix products in bfloat16, weights and optimizer state in float32:

* ours is the trainer's own step: clipping included, and the loss read after every step, with the temporary memory that a run gives its
  optimizer; `muon` is this project's optimizer, and so is `adamw`, with every parameter in its AdamW half; `forecast` is what a run would
  have been told to take, the device's library included;
* theirs is transformers' Llama with PyTorch's cross entropy of whole logits, no clipping, nothing read; `muon` is `torch.optim.Muon` for
  the blocks' matrices with fused AdamW for the rest, `adamw` is fused AdamW.

Each side has a process of its own. Time is the median over the steps of all rounds, after those that compile, each ended by a
synchronisation; memory is the allocator's peak over these steps and the one before, and what it holds at the end with all that is free
within it. The utilisation is that of the model's own operations, 6 for each weight
of a matrix and token plus causal attention's, against the rate of bfloat16 products of 8192 x 8192 in the same run; what is computed again
is not counted. The default shape is the reference model of 137.8 million parameters. Growth with the context at constant tokens a step, and
with depth and width:

    python benchmarks/cuda_training.py 1024:64:muon 2048:32:muon 4096:16:muon 8192:8:muon 16384:4:muon --sides ours
    python benchmarks/cuda_training.py 4096:4:muon 4096:4:muon:layers=24 4096:4:muon:dim=1536 --sides ours
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from anarcho_model import ModelConfig
from anarcho_model.footprint import training_memory
from anarcho_model.torch import GPT
from anarcho_optim import OptimConfig
from anarcho_optim.memory import scratch_bytes
from anarcho_optim.torch import MuonAdamW, param_groups
from anarcho_tokenize import Batch
from anarcho_train import StepMetrics, StepSchedule, TrainConfig
from anarcho_train.steps.torch import TorchStep
from anarcho_train.steps.torch_ranks import TorchRanks

if TYPE_CHECKING:
    from anarcho_train.steps.torch_shards import Shards

WARM_STEPS = 4
"""The first compiles, the second meets the gradients' first addresses, the third fills the allocator, the last records CUDA graphs."""
CEILING_SIZE = 8192
HEAD_SIZE = 64
CUDA_WORKSPACE_BYTES = 64 * 2**20
"""What cuBLAS works in."""
SIDES = ("ours", "transformers")

Strategy = Literal["ddp", "fsdp"]
Step = Callable[[], Any]
"""Makes one optimizer step; the device may still be at work when it returns."""


@dataclass(frozen=True)
class Job:
    """What one line of the table measures."""

    context: int
    batch: int
    optimizer: str
    layers: int
    dim: int
    checkpointing: bool = False
    lean: bool = False
    at_once: bool = False
    documents: int = 1

    @classmethod
    def parse(cls, text: str, *, layers: int, dim: int) -> Job:
        """From `context:batch:optimizer[:setting...]`; raises ValueError for anything else."""
        context, batch, optimizer, *settings = text.split(":")
        options: dict[str, Any] = {"layers": layers, "dim": dim}
        for setting in settings:
            key, _, value = setting.partition("=")
            counted = key in ("layers", "dim", "documents")
            if key not in cls.__dataclass_fields__ or counted != bool(value):
                raise ValueError(
                    f"the job {text} has {setting}; expected checkpointing, lean, at_once, layers=N, dim=N or documents=N"
                )
            options[key] = int(value) if value else True
        if optimizer not in ("muon", "adamw"):
            raise ValueError(f"the job is {text}; expected context:batch:muon or context:batch:adamw, and settings")
        return cls(int(context), int(batch), optimizer, **options)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure every job that was asked for; the rows that were written are returned, too."""
    options = _options(arguments)
    ceiling = in_process(product_rate, options.device)
    rows = []
    for text in options.jobs:
        job = Job.parse(text, layers=options.layers, dim=options.dim)
        if job.documents > 1 and "transformers" in options.sides:
            raise ValueError(f"the job {text} has several documents in a sequence; expected --sides ours")
        rows.append({"job": text, "ceiling TFLOP/s": round(ceiling / 1e12, 1), **_measure(job, ceiling, options)})
        print(json.dumps(rows[-1]), flush=True)
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = as_table(rows)
    print(table)
    if options.markdown:
        options.markdown.write_text(table)
    return rows


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", metavar="context:batch:optimizer[:setting...]")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--narrow-residual", action="store_true", help="ours keeps the residual stream in bfloat16")
    parser.add_argument("--float8", action="store_true", help="ours multiplies in 8-bit floats where that gains")
    parser.add_argument("--compile", choices=("on", "off"), default="on", help="of both sides")
    parser.add_argument("--cuda-graphs", choices=("auto", "on", "off"), default="auto", help="of our side")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=1, help="how often the sides follow each other")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="write one line for each job to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    return parser.parse_args(arguments)


def _measure(job: Job, ceiling: float, options: argparse.Namespace) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {side: [] for side in options.sides}
    config = model_config(job, options)
    row: dict[str, Any] = {"forecast GB": round(forecast(job, config)[0] / 1e9, 3)}
    for _ in range(options.rounds):
        for side in options.sides:
            found = in_process(_measure_side, side, job, config, options)
            seconds[side] += found.pop("seconds")
            row |= {f"{side}: {key}": value for key, value in found.items()}
    for side, times in seconds.items():
        rate = job.batch * job.context / statistics.median(times)
        row[f"{side}: tokens/s"] = round(rate)
        row[f"{side}: utilisation"] = round(rate * flops_per_token(config) / ceiling, 3)
    if len(options.sides) == 2:
        row["speed ratio"] = round(row["ours: tokens/s"] / row["transformers: tokens/s"], 2)
        row["memory ratio"] = round(row["ours: GB"] / max(row["transformers: GB"], 1e-9), 2)
    return row


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns, called in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


def product_rate(device: str) -> float:
    """Floating-point operations a second of a large bfloat16 product, the median of ten."""
    size = CEILING_SIZE if device == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / statistics.median(timed(lambda: a @ b, device, 10, warm=3))


def model_config(job: Job, options: argparse.Namespace) -> ModelConfig:
    """The shape of both sides' model."""
    return ModelConfig(
        vocab_size=options.vocabulary,
        context_length=job.context,
        num_layers=job.layers,
        dim=job.dim,
        num_heads=job.dim // HEAD_SIZE,
    )


def flops_per_token(config: ModelConfig) -> float:
    """The model's own operations, forward and backward."""
    matrices = config.num_parameters - (2 * config.num_layers + 1) * config.dim
    return 6 * matrices + 6 * config.num_layers * config.dim * config.context_length


def _measure_side(side: str, job: Job, config: ModelConfig, options: argparse.Namespace) -> dict[str, Any]:
    """One round of one side, in the process that calls it."""
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (job.batch, job.context + 1), dtype=np.int32)
    step = (our_step if side == "ours" else their_step)(job, config, ids, options)
    start = time.perf_counter()
    timed(step, options.device, WARM_STEPS - 1)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timed(step, options.device, 1)
    warm = time.perf_counter() - start
    seconds = timed(step, options.device, options.steps)
    peak, held = (
        (torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()) if options.device == "cuda" else (0, 0)
    )
    return {"seconds": seconds, "warm s": round(warm, 1), "GB": round(peak / 1e9, 3), "held GB": round(held / 1e9, 3)}


def timed(
    step: Step, device: str, number: int, *, warm: int = 0, before: Callable[[], Any] = lambda: None
) -> list[float]:
    """Seconds of each step, between synchronisations; what is to be done ``before`` it is no part of it."""
    seconds = []
    for index in range(warm + number):
        before()
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        if index >= warm:
            seconds.append(time.perf_counter() - start)
    return seconds


def our_step(
    job: Job,
    config: ModelConfig,
    ids: np.ndarray,
    options: argparse.Namespace,
    *,
    ranks: TorchRanks | None = None,
    strategy: Strategy = "ddp",
    micro_batches: int = 1,
) -> Step:
    """A step of a run with these settings; with several ``ranks``, of this one's share of it, whose rows are ``ids``."""
    ranks = ranks or TorchRanks()
    model = GPT(config)
    model.init_weights(seed=0)
    model.gradient_checkpointing, model.narrow_residual = job.checkpointing, options.narrow_residual
    model.float8 = options.float8
    shards = _in_shards(model, ranks, options) if strategy == "fsdp" and ranks.size > 1 else None
    if shards is None:
        model.to(options.device, torch.bfloat16 if job.lean else torch.float32)
        ranks.join_devices(next(model.parameters()).device)
    groups = param_groups(model, config=OptimConfig(lr=1e-3, adamw_lr=1e-4))
    if job.optimizer == "adamw":
        groups = [{"params": list(model.named_parameters()), "algorithm": "adamw", "lr": 1e-4, "name": "all"}]
    several = ranks.size * micro_batches > 1
    trainer = TorchStep(
        model,
        MuonAdamW(
            groups,
            process_group=None if shards else ranks.computing,
            cuda_scratch_bytes=forecast(job, config, gradients_held=several)[1],
            state_dtype=torch.bfloat16 if job.lean else torch.float32,
            stochastic_rounding=job.lean,
        ),
        config=TrainConfig(
            precision="bfloat16",
            compile=options.compile,
            grad_clip=0.0 if job.at_once else 1.0,
            update_in_backward=job.at_once,
            cuda_graphs={"on": True, "off": False}.get(options.cuda_graphs, "auto"),
        ),
        save_model=lambda model, directory: None,
        load_model=lambda model, directory: None,
        ranks=ranks,
        shards=shards,
    )
    batches = [
        Batch(
            tokens=part[:, :-1],
            targets=part[:, 1:],
            weights=np.ones(part[:, 1:].shape, dtype=np.float32),
            **(_documents(job, len(part)) if job.documents > 1 else {}),
        )
        for part in np.split(ids, micro_batches)
    ]

    def step() -> StepMetrics:
        metrics = trainer.train(batches, schedule=StepSchedule(lr_scale=1.0))
        if metrics.skipped:
            raise RuntimeError(
                f"a step was left out: loss {metrics.loss}, norm of the gradient {metrics.grad_norm}; expected finite numbers"
            )
        return metrics

    return step


def _documents(job: Job, rows: int) -> dict[str, np.ndarray]:
    """Segments and positions of documents of random lengths, as many in each row as the job says."""
    starts = np.zeros((rows, job.context), dtype=np.int32)
    for row, random in zip(starts, np.random.default_rng(0).spawn(rows), strict=True):
        row[1 + random.choice(job.context - 1, job.documents - 1, replace=False)] = 1
    place = np.arange(job.context, dtype=np.int32)
    begun = np.maximum.accumulate(np.where(starts, place, 0), axis=1)
    return {"segments": starts.cumsum(1, dtype=np.int32), "positions": place - begun}


def _in_shards(model: GPT, ranks: TorchRanks, options: argparse.Namespace) -> Shards:
    from anarcho_train.steps.torch_shards import Shards

    place = torch.device(options.device)
    return Shards(model, list(model.model.layers), ranks, device=place, compute=torch.bfloat16)


def forecast(
    job: Job, config: ModelConfig, *, gradients_held: bool = False, shards: int | None = None
) -> tuple[int, int]:
    """Bytes at the peak of our side, cuBLAS's own included, and of these what its optimizer may take for the time of an update.

    Of one of several processes, ``shards`` says into how many parts the model is cut, 1 where each has all of it.
    """
    state: dict[str, Any] = {"matrix_optimizer_bytes": 4 if job.optimizer == "muon" else 8, "other_optimizer_bytes": 8}
    memory = training_memory(
        config,
        micro_batch=job.batch,
        length=job.context,
        weight_dtype_bytes=2 if job.lean else 4,
        gradient_checkpointing=job.checkpointing,
        gradients_held=gradients_held,
        gradients_freed=job.at_once,
        narrow_gradients=shards is None,
        segments=job.documents > 1,
        device="cuda",
        compiled=True,
        shards=shards,
        **{key: size // 2 if job.lean else size for key, size in state.items()},
    )
    shapes = config.tensor_shapes().items()
    matrices = sum(math.prod(shape) for name, shape in shapes if len(shape) == 2 and ".layers." in name)
    scratch = scratch_bytes("cuda", matrices, room=memory.transient - memory.before_update)
    return replace(memory, optimizer_scratch=scratch).total + CUDA_WORKSPACE_BYTES, scratch


def their_step(
    job: Job,
    config: ModelConfig,
    ids: np.ndarray,
    options: argparse.Namespace,
    *,
    averaged: Callable[[torch.nn.Module], torch.nn.Module] = lambda model: model,
) -> Step:
    """The same of transformers' model; ``averaged`` makes of it one whose gradients are those of several processes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.ffn_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.context_length,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
            use_cache=False,
        )
    ).to(options.device)
    if job.checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    optimizers = _their_optimizers(model, job.optimizer)
    tokens = torch.from_numpy(ids.astype(np.int64)).to(options.device)
    whole = averaged(model)
    called = torch.compile(whole, dynamic=False) if options.compile == "on" else whole

    def step() -> None:
        with torch.autocast(options.device, dtype=torch.bfloat16):
            logits = called(input_ids=tokens[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].reshape(-1)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def _their_optimizers(model: torch.nn.Module, name: str) -> list[torch.optim.Optimizer]:
    if name == "adamw":
        return [torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)]
    matrices, others = [], []
    for key, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in key and "lm_head" not in key
        (matrices if is_matrix else others).append(parameter)
    return [torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(others, lr=1e-4, fused=True)]


def as_table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, without the time of compilation."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if not key.endswith("warm s")]
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(str(row.get(key, "")) for key in keys) + " |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
