"""Tokens a second of generation, beside `transformers` with the same weights in the same process, in turns.

    python benchmarks/generation.py --model DIRECTORY --batch 1 8 --dtype float32 bfloat16 --markdown table.md

Each figure is the median over repetitions in which the two follow each other, as is their ratio, so that a busy machine
slows both. The time is that of a whole call, the prompt included. Both write the same number of tokens, greedily, with
no text that ends early. `--compiled` adds a third column: transformers with a static cache and its step compiled.
`--random` takes a model of SmolLM2-135M's shape with random weights, for speed does not depend on their values.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from anarcho_model import InitConfig, ModelConfig
from anarcho_model.generate.sampling import SamplingConfig
from anarcho_model.generate.torch import generate_batch
from anarcho_model.torch import GPT
from anarcho_model.weights import load_pretrained, save_pretrained

SMOLLM2_135M = ModelConfig(
    vocab_size=49152,
    context_length=8192,
    num_layers=30,
    dim=576,
    num_heads=9,
    num_kv_heads=3,
    hidden_dim=1536,
    rope_theta=100000.0,
)


def main() -> None:
    """Measure every combination that was asked for."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        directory = options.model or Path(folder)
        if options.model is None:
            _write_random(directory)
        rows = []
        for dtype in options.dtype:
            ours, theirs = _load(directory, getattr(torch, dtype), options.device)
            for batch in options.batch:
                for sampled in (False, True) if options.sampled else (False,):
                    row = _measure(ours, theirs, batch=batch, sampled=sampled, options=options)
                    rows.append({"device": _name(options.device), "dtype": dtype, **row})
                    print(json.dumps(rows[-1]), flush=True)
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = _table(rows)
    print(table)
    if options.markdown:
        options.markdown.write_text(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face directory")
    parser.add_argument(
        "--random", action="store_true", help="random weights of SmolLM2-135M's shape (without --model)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--sampled", action="store_true", help="also with temperature 0.8 and top-k 50")
    parser.add_argument("--compiled", action="store_true", help="also transformers with a static cache, compiled")
    parser.add_argument("--threads", type=int, help="of the processor; torch's own choice without it")
    parser.add_argument("--json", type=Path, help="write one line for each combination to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args()
    if (options.model is None) != options.random:
        parser.error("give either --model or --random")
    return options


def _write_random(directory: Path) -> None:
    model = GPT(SMOLLM2_135M)
    model.init_weights(seed=0, init=InitConfig(zero_residual_outputs=False))
    save_pretrained(model, directory, eos_token_id=None, pad_token_id=0)


def _load(directory: Path, dtype: torch.dtype, device: str) -> tuple[GPT, Any]:
    from transformers import AutoModelForCausalLM

    gc.collect()
    theirs: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    theirs = theirs.to(device).eval()
    theirs.generation_config.eos_token_id = None
    return load_pretrained(directory, device=device).to(dtype).eval(), theirs


def _measure(ours: GPT, theirs: Any, *, batch: int, sampled: bool, options: argparse.Namespace) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    vocab = ours.config.vocab_size
    prompts = torch.randint(0, vocab, (batch, options.prompt_tokens), generator=random)
    new, ids = options.new_tokens, prompts.tolist()
    config = SamplingConfig(max_new_tokens=new, temperature=0.8 if sampled else 0.0, top_k=50, seed=0)
    drawing = {"do_sample": True, "temperature": 0.8, "top_k": 50} if sampled else {"do_sample": False}
    there = prompts.to(options.device)

    def theirs_as(**more: Any) -> list[list[int]]:
        attention = torch.ones_like(there)
        texts = theirs.generate(there, attention_mask=attention, max_new_tokens=new, pad_token_id=0, **drawing, **more)
        return texts[:, options.prompt_tokens :].tolist()

    runs: dict[str, Callable[[], list[list[int]]]] = {
        "ours": lambda: generate_batch(ours, ids, config=config),
        "transformers": theirs_as,
    }
    if options.compiled:
        runs["transformers, compiled"] = lambda: theirs_as(cache_implementation="static")
    texts = {name: run() for name, run in runs.items()}  # and so that everything is warm
    assert all(len(text) == new for found in texts.values() for text in found)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repetitions):
        for name, run in runs.items():
            start = time.perf_counter()
            run()  # ends with the ids on the processor, so nothing is left to wait for
            seconds[name].append(time.perf_counter() - start)
    row: dict[str, Any] = {"batch": batch, "sampled": sampled, "prompt": options.prompt_tokens, "new": new}
    row["equal_tokens"] = None if sampled else _shared(texts["ours"], texts["transformers"])
    for name, times in seconds.items():
        row[f"{name}: tokens/s"] = round(batch * new / statistics.median(times), 1)
        if name != "ours":
            ratios = [theirs / mine for theirs, mine in zip(times, seconds["ours"], strict=True)]
            row[f"{name}: ratio"] = round(statistics.median(ratios), 2)
    return row


def _shared(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of tokens up to each text's first difference: rounding decides between tokens that are equally likely."""
    firsts = [
        next((n for n, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(ours, theirs, strict=True)
    ]
    return round(sum(firsts) / sum(map(len, ours)), 3)


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"


def _table(rows: list[dict[str, Any]]) -> str:
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(str(row[key]) for key in keys) + " |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
