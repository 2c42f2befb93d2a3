"""Searches the quickstart preset's settings: trains many variants of it and reports the validation bits per byte of each.

    uv run python benchmarks/quickstart_sweep.py --device cuda --workers 15 results.jsonl
    uv run python benchmarks/quickstart_sweep.py --device cpu --time optim.lr=0.02        # one variant, with its time

Notable: a GPU trains the variants (a few seconds each, many at a time), because what they learn from a number of tokens does not depend on
where they are trained; what a step costs on a CPU is measured on the CPU, with ``--time``. Every variant is the preset with a few keys
changed; the results and what was chosen from them stand in quickstart_sweep.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import tomllib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

PRESET = Path(__file__).parents[1] / "apps/cli/src/anarcho_cli/presets/quickstart.toml"

STEPS = 320
"""Steps of a variant that names none."""

PLAIN = {
    "model.tie_embeddings": True,
    "init.embedding_std": 0.02,
    "init.zero_residual_outputs": False,
    "optim.variant": "jordan",
    "optim.adjust_lr_fn": "match_rms_adamw",
    "optim.momentum": 0.95,
    "optim.beta1": 0.9,
    "optim.schedule": "cosine",
    "optim.final_lr_fraction": 0.1,
}


def shape(layers: int, dim: int, heads: int, hidden: int) -> dict[str, Any]:
    """Overrides for another size of model."""
    return {"model.num_layers": layers, "model.dim": dim, "model.num_heads": heads, "model.hidden_dim": hidden}


def one_at_a_time() -> list[dict[str, Any]]:
    """The preset, seeds, budgets, sizes, and each setting moved by itself."""
    moves: dict[str, list[Any]] = {
        "train.seed": [1, 2],
        "train.steps": [240, 280, 360, 400, 450],
        "optim.lr": [0.01, 0.02, 0.03, 0.05, 0.07],
        "optim.adamw_lr": [0.005, 0.01, 0.03, 0.05],
        "optim.embedding_lr": [0.02, 0.05, 0.2, 0.3],
        "optim.momentum": [0.85, 0.95],
        "optim.beta1": [0.7, 0.9],
        "optim.beta2": [0.9, 0.99],
        "optim.weight_decay": [0.0, 0.03, 0.3],
        "optim.warmup_steps": [0, 10, 40],
        "optim.final_lr_fraction": [0.0, 0.1],
        "optim.variant": ["jordan"],
        "optim.schedule": ["cosine", "wsd"],
        "optim.momentum_warmup_steps": [150],
        "init.embedding_std": [0.02, 0.1, 0.2, 1.0],
        "init.linear_scale": [0.5, 0.7],
        "init.zero_residual_outputs": [False],
        "init.head_std": [0.02],
        "model.qk_norm": [True],
        "model.rope_theta": [1000.0],
        "train.grad_clip": [0.0],
        "tokenizer.vocab_size": [2048, 3072, 6144, 8192],
    }
    trials: list[dict[str, Any]] = [{}]
    trials += [{key: value} for key, values in moves.items() for value in values]
    trials += [{"optim.adjust_lr_fn": "match_rms_adamw", "optim.lr": lr} for lr in (0.006, 0.01, 0.02)]
    trials += [{"optim.adjust_lr_fn": "original", "optim.lr": lr} for lr in (0.02, 0.03)]
    return trials


def budgets_and_shapes() -> list[dict[str, Any]]:
    """Other batches, lengths and sizes at the preset's number of tokens, and the plain settings that it grew from."""
    trials: list[dict[str, Any]] = [
        {"train.batch_tokens": 2048, "train.steps": 640},
        {"train.batch_tokens": 2048, "train.steps": 640, "optim.lr": 0.03},
        {"train.batch_tokens": 8192, "train.steps": 160},
        {"train.batch_tokens": 8192, "train.steps": 160, "optim.lr": 0.06},
        {"model.context_length": 128},
        {"model.context_length": 512},
        {"model.tie_embeddings": True, "init.embedding_std": 0.02, "optim.embedding_lr": 0.02},
        {"model.tie_embeddings": True, "init.embedding_std": 0.05},
    ]
    sizes = [(2, 192, 3, 512), (3, 192, 3, 512), (5, 192, 3, 512), (6, 192, 3, 512), (4, 128, 2, 384), (4, 160, 5, 448)]
    sizes += [(4, 192, 3, 384), (4, 192, 3, 768), (3, 256, 4, 704), (4, 256, 4, 704), (4, 320, 5, 896)]
    trials += [shape(*size) for size in sizes]
    trials += [
        {**PLAIN, "optim.lr": lr, "optim.adamw_lr": lr, "optim.embedding_lr": lr} for lr in (0.002, 0.004, 0.008, 0.016)
    ]
    return trials


VARIANTS = one_at_a_time() + budgets_and_shapes()


def train(overrides: dict[str, Any], *, device: str, data: Path, timed: bool = False) -> dict[str, Any]:
    """Trains one variant from scratch; returns its bits per byte on the whole validation text and its size."""
    import torch
    from anarcho_model import InitConfig, ModelConfig
    from anarcho_model.torch import GPT
    from anarcho_optim import OptimConfig, schedules
    from anarcho_optim.torch import MuonAdamW, param_groups
    from anarcho_tokenize import PackedBatches, SequentialBatches, TokenizerConfig, TokenShards
    from anarcho_train import StepSchedule, TrainConfig, evaluate
    from anarcho_train.steps.torch import TorchStep

    sections = tomllib.loads(PRESET.read_text(encoding="utf-8"))
    sections["train"]["steps"] = STEPS
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        sections[section][name] = value
    tokenizer = TokenizerConfig(**sections["tokenizer"])
    model_config = ModelConfig(vocab_size=tokenizer.vocab_size, **sections["model"])
    optim = OptimConfig(**sections["optim"])
    length = model_config.context_length
    per_step = sections["train"]["batch_tokens"] // length
    settings = {"micro_batch": per_step, "compile": "auto" if timed else "off"}
    config = TrainConfig(**{**sections["train"], **settings})
    shards = {part: TokenShards.open(data / str(tokenizer.vocab_size) / part) for part in ("train", "validation")}

    torch.set_num_threads(torch.get_num_threads() if timed else 1)
    model = GPT(model_config)
    model.init_weights(seed=config.seed, init=InitConfig(**sections["init"]))
    model.to(device)
    optimizer = MuonAdamW(param_groups(model, config=optim))
    step = TorchStep(
        model,
        optimizer,
        config=config,
        save_model=lambda model, directory: None,
        load_model=lambda model, directory: None,
        flops=1e15 if timed else 0.0,
    )
    batches = PackedBatches(shards["train"], length=length, seed=config.seed)
    seconds = []
    for number in range(config.steps):
        scale = schedules.lr_scale(optim, number, total_steps=config.steps)
        schedule = StepSchedule(lr_scale=scale, momentum=schedules.momentum(optim, number))
        began = time.perf_counter()
        step.train([batches.batch(number * per_step, per_step)], schedule=schedule)
        seconds.append(time.perf_counter() - began)
    validation = SequentialBatches(shards["validation"], length=length)
    loss, bits = evaluate(step, validation, batch_size=per_step, sequence_length=length)
    size = {"parameters": model_config.num_parameters, "tokens": config.steps * config.batch_tokens}
    timing = {"step_seconds": sorted(seconds)[len(seconds) // 2], "first_step_seconds": seconds[0]} if timed else {}
    return {"variant": overrides, "bits_per_byte": round(bits, 4), "loss": round(loss, 4), **size, **timing}


def prepare(trials: list[dict[str, Any]], data: Path) -> None:
    """Tokenizers and shards of the embedded corpus, one per vocabulary size."""
    from anarcho_tokenize import TokenizerConfig, embedded_documents, train_tokenizer, write_shards

    default = tomllib.loads(PRESET.read_text(encoding="utf-8"))["tokenizer"]["vocab_size"]
    for size in {trial.get("tokenizer.vocab_size", default) for trial in trials}:
        tokenizer = train_tokenizer(embedded_documents(), config=TokenizerConfig(vocab_size=size))
        write_shards(embedded_documents(), tokenizer, data / str(size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", help="file for the results, one JSON object a line")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="variants that are trained at the same time")
    parser.add_argument(
        "--time", nargs="*", metavar="KEY=VALUE", help="train one variant, compiled, and time its steps"
    )
    arguments = parser.parse_args()
    trials = VARIANTS
    if arguments.time is not None:
        trials = [
            {
                key: tomllib.loads(f"v = {value}")["v"]
                for key, _, value in (item.partition("=") for item in arguments.time)
            }
        ]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        prepare(trials, data)
        options = {"device": arguments.device, "data": data, "timed": arguments.time is not None}
        # Processes start afresh: a forked one could not use the GPU.
        with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
            results = [job.result() for job in [pool.submit(train, trial, **options) for trial in trials]]
    results.sort(key=lambda result: result["bits_per_byte"])
    lines = [json.dumps(result) for result in results]
    print("\n".join(lines))
    if arguments.results:
        arguments.results.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
