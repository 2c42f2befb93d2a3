"""The forecast of a training run's peak memory beside the measured peak, for twelve configurations and more, each in a process of its own.

    python benchmarks/memory_forecast.py --device cpu --json memory_forecast.jsonl --markdown table.md

What is measured is the run's own step (model, optimizer, precision and compilation as configured): on a CPU the peak of the process'
resident memory, on CUDA that of the device's allocator. The forecast is that of `anarcho plan`, closed form. A ratio of 1.1 means that
the forecast is 10 % above what was measured. The configurations vary depth, width, vocabulary, length, micro-batch, precision,
checkpointing, grouped heads, isolated documents and the optimizer; the reference model is among them, with checkpointing and without.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from anarcho_cli.benching.cases import Case, Kind
from anarcho_cli.benching.processes import run_cases
from anarcho_cli.config import resolve
from anarcho_monitor import read_system_memory

UNCOMPILED = ["train.compile=off"]
CONFIGURATIONS: dict[str, tuple[str, list[str]]] = {
    "quickstart": ("quickstart", []),
    "quickstart, half the micro-batch": ("quickstart", ["train.micro_batch=8"]),
    "small": ("small-15m", []),
    "small, float32": ("small-15m", ["train.precision=float32"]),
    "small, checkpointing": ("small-15m", ["train.gradient_checkpointing=true", "train.micro_batch=16"]),
    "small, isolated documents": ("small-15m", ["data.isolate_documents=true"]),
    "small, vocabulary 32000": ("small-15m", ["tokenizer.vocab_size=32000"]),
    "small, grouped heads, QK-norm": ("small-15m", ["model.num_kv_heads=2", "model.qk_norm=true"]),
    "medium": ("medium-45m", ["train.micro_batch=4"]),
    "medium, untied head": ("medium-45m", ["train.micro_batch=4", "model.tie_embeddings=false"]),
    "reference, context 1024": ("reference-137m", ["model.context_length=1024", "train.sequence_length=1024"]),
    "reference, context 1024, checkpointing": (
        "reference-137m",
        ["model.context_length=1024", "train.sequence_length=1024", "train.gradient_checkpointing=true"],
    ),
}
FULL_LENGTH = {
    "reference, context 4096": ("reference-137m", []),
    "reference, context 4096, checkpointing": ("reference-137m", ["train.gradient_checkpointing=true"]),
    "reference, context 4096, checkpointing, steps of one micro-batch": (
        "reference-137m",
        ["train.gradient_checkpointing=true", "train.batch_tokens=4096"],
    ),
    "reference, context 4096, checkpointing, steps of one micro-batch, lean": (
        "reference-137m",
        ["train.gradient_checkpointing=true", "train.batch_tokens=4096", "train.lean=true"],
    ),
}
"""In place of the reference model at a quarter of its length, on a device that is fast enough."""


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure what was asked for; the rows that were written are returned, too."""
    options = _options(arguments)
    chosen = dict(CONFIGURATIONS)
    if options.device == "cuda":
        chosen = {name: value for name, value in chosen.items() if "context 1024" not in name} | FULL_LENGTH
    names = options.only or list(chosen)
    cases = {
        name: Case(
            kind=Kind.training,
            preset=chosen[name][0],
            config=resolve(preset=chosen[name][0], overrides=[*chosen[name][1], *UNCOMPILED, *(options.set or [])]),
            steps=1,
            backend=options.backend,
            device=options.device,
        )
        for name in names
    }
    found = run_cases(
        list(cases.values()), timeout_seconds=options.timeout, available_bytes=read_system_memory().available_bytes
    )
    rows = []
    for name, result in zip(cases, found, strict=True):
        row = {"configuration": name, "backend": options.backend, "device": options.device}
        if "error" in result:
            rows.append({**row, "error": result["error"]})
        else:
            measured = result["allocator_peak_bytes"] if options.device == "cuda" else result["peak_bytes"]
            forecast = result["forecast_bytes"]
            rows.append({**row, "forecast": forecast, "measured": measured, "ratio": round(forecast / measured, 3)})
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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", choices=("torch", "mlx"), default="torch")
    parser.add_argument("--only", action="append", choices=[*CONFIGURATIONS, *FULL_LENGTH], help="of these alone")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="over all configurations")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one configuration")
    parser.add_argument("--json", type=Path, help="write one line for each configuration to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    return parser.parse_args(arguments)


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| configuration | forecast | measured | forecast / measured |", "|---|---|---|---|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['configuration']} | {row['error']} | | |")
        else:
            sizes = f"{row['forecast'] / 1e9:.2f} GB | {row['measured'] / 1e9:.2f} GB"
            lines.append(f"| {row['configuration']} | {sizes} | {row['ratio']:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
