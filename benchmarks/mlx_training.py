"""Tokens a second and memory of training with MLX, beside mlx-lm's Llama of the same shape, in one run and in turns.

    python benchmarks/mlx_training.py 4096:1:adamw 4096:4:muon --json mlx_training.jsonl --markdown table.md

A job is `context:batch:optimizer`, the optimizer `muon` (matrices of the blocks by Muon, the rest by AdamW) or `adamw`. Both sides make
whole compiled steps on the same random tokens and end each with their weights evaluated:

* ours is the trainer's own step: float32 weights and optimizer state, matrix products in bfloat16, clipping, and this project's optimizer;
  with `--narrow-residual` the residual stream is in bfloat16, too, as theirs is;
* theirs is mlx-lm's trainer's: its loss on its Llama with weights (and so gradients and state) in bfloat16, no clipping, and MLX's own
  `AdamW` or `Muon`.

Each side has a process of its own, as its users start it: ours says to MLX on CUDA how much it may keep waiting, theirs leaves that as it
is. Time is the median over all steps of all rounds, after the steps that compile. Memory is MLX's peak over these steps, without what its
cache keeps. The default shape is the reference model of 137.8 million parameters.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
from anarcho_model import ModelConfig
from anarcho_model.mlx import GPT
from anarcho_optim import OptimConfig
from anarcho_optim.mlx import MuonAdamW, param_groups
from anarcho_tokenize import Batch
from anarcho_train import StepSchedule, TrainConfig
from anarcho_train.steps.mlx import MlxStep
from anarcho_train.steps.mlx_memory import bound_waiting_buffers
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.trainer import default_loss

WARM_STEPS = 3
"""The first compiles, the others find every buffer in MLX's cache."""

Step = Callable[[], float]
"""Makes one optimizer step and returns its loss, when everything has been computed."""


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure every job that was asked for; the rows that were written are returned, too."""
    options = _options(arguments)
    if options.device:
        mx.set_default_device(getattr(mx, options.device))
    rows = []
    for job in options.jobs:
        context, batch, optimizer = job.split(":")
        config = ModelConfig(
            vocab_size=options.vocabulary,
            context_length=int(context),
            num_layers=options.layers,
            dim=options.dim,
            num_heads=options.heads,
        )
        row = {"device": _device_name(), "mlx": version("mlx"), "context": int(context), "batch": int(batch)}
        rows.append({**row, "optimizer": optimizer, **_measure(config, int(batch), optimizer, options)})
        print(json.dumps(rows[-1]), flush=True)
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = _table(rows)
    print(table)
    if options.markdown:
        options.markdown.write_text(table)
    return rows


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", metavar="context:batch:optimizer")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--precision", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--checkpointing", action="store_true", help="ours keeps only each block's input for backward")
    parser.add_argument(
        "--narrow-residual", action="store_true", help="ours keeps the residual stream in the precision"
    )
    parser.add_argument("--logits-mib", type=int, help="bound of our float32 logits; the model's own without it")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=2, help="how often the two follow each other")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="MLX's default without it")
    parser.add_argument("--json", type=Path, help="write one line for each job to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    return parser.parse_args(arguments)


def _measure(config: ModelConfig, batch: int, optimizer: str, options: argparse.Namespace) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"ours": [], "mlx-lm": []}
    row: dict[str, Any] = {}
    for _ in range(options.rounds):
        for name in seconds:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                found = process.submit(_measure_side, name, config, batch, optimizer, options).result()
            seconds[name] += found.pop("seconds")
            row |= {f"{name}: {key}": value for key, value in found.items()}
    for name, times in seconds.items():
        row[f"{name}: tokens/s"] = round(batch * config.context_length / statistics.median(times), 1)
    row["speed ratio"] = round(row["ours: tokens/s"] / row["mlx-lm: tokens/s"], 2)
    row["memory ratio"] = round(row["ours: GB"] / row["mlx-lm: GB"], 2)
    return row


def _measure_side(
    name: str, config: ModelConfig, batch: int, optimizer: str, options: argparse.Namespace
) -> dict[str, Any]:
    """One round of one side, in the process that calls it."""
    if options.device:
        mx.set_default_device(getattr(mx, options.device))
    if name == "ours":
        bound_waiting_buffers()
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, config.context_length + 1), dtype=np.int32)
    step = (_our_step if name == "ours" else _their_step)(config, ids, optimizer, options)
    start = time.perf_counter()
    losses = [step() for _ in range(WARM_STEPS)]
    warm = time.perf_counter() - start
    mx.synchronize()
    mx.reset_peak_memory()
    seconds = []
    for _ in range(options.steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": seconds,
        "warm s": round(warm, 1),
        "GB": round(mx.get_peak_memory() / 1e9, 3),
        "losses": [round(losses[0], 3), round(losses[-1], 3)],
    }


def _our_step(config: ModelConfig, ids: np.ndarray, optimizer: str, options: argparse.Namespace) -> Step:
    model = GPT(config)
    model.init_weights(seed=0)
    model.gradient_checkpointing, model.narrow_residual = options.checkpointing, options.narrow_residual
    if options.logits_mib:
        model.logits_chunk_bytes = options.logits_mib * 2**20
    groups: Any = param_groups(model, config=OptimConfig(lr=1e-3, adamw_lr=1e-4))
    if optimizer == "adamw":
        groups = [{"algorithm": "adamw", "lr": 1e-4, "params": list(model.named_parameters().items())}]
    trainer = MlxStep(
        model,
        MuonAdamW(groups),
        config=TrainConfig(precision=options.precision, compile="on"),
        save_model=lambda model, directory: None,
        load_model=lambda model, directory: None,
    )
    batch = Batch(tokens=ids[:, :-1], targets=ids[:, 1:], weights=np.ones(ids[:, 1:].shape, dtype=np.float32))
    return lambda: trainer.train([batch], schedule=StepSchedule(lr_scale=1.0)).loss


def _their_step(config: ModelConfig, ids: np.ndarray, optimizer: str, options: argparse.Namespace) -> Step:
    model = Model(
        ModelArgs(
            model_type="llama",
            hidden_size=config.dim,
            num_hidden_layers=config.num_layers,
            intermediate_size=config.ffn_size,
            num_attention_heads=config.num_heads,
            rms_norm_eps=config.norm_eps,
            vocab_size=config.vocab_size,
            tie_word_embeddings=True,
        )
    )
    model.set_dtype(getattr(mx, options.precision))
    chosen = mlx.optimizers.AdamW(1e-4)
    if optimizer == "muon":
        chosen = mlx.optimizers.MultiOptimizer([mlx.optimizers.Muon(1e-3), chosen], [_is_matrix_of_a_block])
    tokens, lengths = mx.array(ids), mx.array([[0, ids.shape[1]]] * len(ids))
    gradient = nn.value_and_grad(model, default_loss)
    state = [model.state, chosen.state]

    def step(tokens: mx.array, lengths: mx.array) -> mx.array:
        (loss, _), gradients = gradient(model, tokens, lengths)
        chosen.update(model, gradients)
        return loss

    compiled = mx.compile(step, inputs=state, outputs=state)

    def whole() -> float:
        loss = compiled(tokens, lengths)
        mx.eval(state, loss)
        return float(np.array(loss))

    return whole


def _is_matrix_of_a_block(name: str, weight: mx.array) -> bool:
    return weight.ndim == 2 and "embed" not in name and "lm_head" not in name


def _device_name() -> str:
    return "CPU" if mx.default_device() == mx.cpu else str(mx.device_info().get("device_name", "GPU"))


def _table(rows: list[dict[str, Any]]) -> str:
    keys = [key for key in rows[0] if not key.endswith(("losses", "warm s"))]
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(str(row[key]) for key in keys) + " |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
