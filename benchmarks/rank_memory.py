"""The forecast of each process's peak memory beside the measured peak, where several processes train one model over gloo.

    python benchmarks/rank_memory.py --json rank_memory.jsonl --markdown table.md

Each case is started by torchrun. A rank makes the run's own step, as configured, trains three times, evaluates, and lets the first rank
have the whole model as a checkpoint does. What is measured is the peak of each process' resident memory; the largest one stands in the
table: it is what `anarcho plan --processes` forecasts. A ratio of 1.1 means that the forecast is 10 % above what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from anarcho_cli.config import RunConfig, dumps, loads, resolve
from anarcho_cli.plan import Processes, plan_run

FLOAT32, BFLOAT16 = (["train.compile=off", f"train.precision={name}"] for name in ("float32", "bfloat16"))
SHORT = ["train.sequence_length=128", "train.batch_tokens=1024", "train.micro_batch=2"]
CONFIGURATIONS: dict[str, tuple[str, list[str]]] = {
    "small, length 256": (
        "small-15m",
        ["train.sequence_length=256", "train.batch_tokens=2048", "train.micro_batch=2", *FLOAT32],
    ),
    "medium, length 128": ("medium-45m", [*SHORT, *FLOAT32]),
    "medium, length 128, bfloat16": ("medium-45m", [*SHORT, *BFLOAT16]),
    "reference, length 128": ("reference-137m", [*SHORT, *FLOAT32]),
}
CASES = {
    "ddp over 2": Processes(strategy="ddp", count=2),
    "fsdp over 2": Processes(strategy="fsdp", count=2),
    "fsdp over 4": Processes(strategy="fsdp", count=4),
    "hybrid over 2 x 2": Processes(strategy="hybrid", count=4, machines=2),
}
RANK = "RANK_MEMORY_ORDER"
"""The environment variable with the order of a rank."""


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure what was asked for; the rows that were written are returned, too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=CONFIGURATIONS, help="of these models alone")
    parser.add_argument("--case", action="append", choices=CASES, help="of these ways alone")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for one case")
    parser.add_argument("--json", type=Path, help="write one line for each case to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args(arguments)
    rows = []
    for name in options.only or CONFIGURATIONS:
        preset, overrides = CONFIGURATIONS[name]
        for case in options.case or CASES:
            processes = CASES[case]
            config = resolve(preset=preset, overrides=[*overrides, f"train.strategy={processes.strategy}"])
            forecast = plan_run(config, device="cpu", processes=processes).total_bytes
            peaks = measured_peaks(config, processes, timeout_seconds=options.timeout)
            row = {"configuration": name, "processes": case, "forecast": forecast, "measured": max(peaks)}
            rows.append({**row, "peaks": peaks, "ratio": round(forecast / max(peaks), 3)})
            print(json.dumps(rows[-1]), flush=True)
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = _table(rows)
    print(table)
    if options.markdown:
        options.markdown.write_text(table)
    return rows


def measured_peaks(config: RunConfig, processes: Processes, *, timeout_seconds: float) -> list[int]:
    """Peak resident bytes of each rank."""
    with tempfile.TemporaryDirectory() as directory:
        order = {"config": dumps(config), "machines": processes.machines, "directory": directory}
        count = str(processes.count)
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count, __file__],
            env=os.environ | {RANK: json.dumps(order), "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            timeout=timeout_seconds,
        )
        return [int(Path(directory, f"rank-{rank}").read_text()) for rank in range(processes.count)]


def rank(order: dict[str, Any]) -> None:
    """What one process does: three steps, an evaluation, and the first one's whole model."""
    from anarcho_cli.back_ends import back_end
    from anarcho_cli.back_ends.torch_processes import connect
    from anarcho_cli.benching.training import peak_memory, random_batch
    from anarcho_train.step import StepSchedule

    here = int(os.environ["WORLD_SIZE"]) // order["machines"]
    os.environ |= {"LOCAL_WORLD_SIZE": str(here), "GROUP_RANK": str(int(os.environ["RANK"]) // here)}
    config = loads(order["config"], origin="the order")
    ranks = connect(timeout_seconds=600)
    framework: Any = back_end("torch")
    framework.limit_memory("cpu")
    tokenizer: Any = argparse.Namespace(vocab_size=config.tokenizer.vocab_size)
    step = framework.make_step(config, tokenizer, Path(os.devnull), device="cpu", ranks=ranks)
    batch = random_batch(config)
    share = config.batch_sequences // (config.train.fixed_micro_batch * ranks.size)
    for number in range(3):  # DistributedDataParallel makes its buckets anew in the second.
        step.train([batch] * share, schedule=StepSchedule(lr_scale=1.0, number=number))
    step.evaluate(batch)
    ranks.gathered([0.0])
    whole = step.whole_model() if ranks.rank == 0 else None
    ranks.gathered([0.0])
    del whole
    peak = peak_memory("cpu", own_memory=False)["peak_bytes"]
    Path(order["directory"], f"rank-{ranks.rank}").write_text(str(peak))
    ranks.gathered([0.0])


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | processes | forecast | measured | forecast / measured |", "|---|---|---|---|---|"]
    for row in rows:
        sizes = f"{row['forecast'] / 1e9:.2f} GB | {row['measured'] / 1e9:.2f} GB"
        lines.append(f"| {row['configuration']} | {row['processes']} | {sizes} | {row['ratio']:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    rank(json.loads(os.environ[RANK])) if RANK in os.environ else main()
