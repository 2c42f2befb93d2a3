"""Tokens a second, utilisation and memory of training over several GPUs of one machine, each side started by torchrun, in one run.

    python benchmarks/rank_training.py --processes 1 2 --json rank_training.jsonl --markdown table.md

There are three cases:

* `ddp`: the reference model of 137.8 million parameters, whole in each process. It is the trainer's own step, made as the command makes
  it: gradients averaged by DistributedDataParallel, each process orthogonalising its share of the matrices, clipping included, and the
  loss of all processes read after every step;
* `peer`: transformers' Llama of the same shape under DistributedDataParallel, with the optimizers of `cuda_training.py`: no clipping,
  nothing read, and every process makes the whole update;
* `fsdp`: a model of 1.1 billion parameters in shards, with several micro-batches of each process in a step.

Both sides are compiled, with matrix products in bfloat16 and weights, gradients and state in float32. `--batch` is the number of sequences
of each process, so that a step grows with the processes; with `--global-batch` they share one step of always the same size. Processes
that are one alone use neither DistributedDataParallel nor shards.

A step is timed from a barrier to the synchronisation of the device; the slowest process counts, and of the steps the median. The efficiency
is the rate over that of one process of the same run, for each process. The utilisation is that of the model's own operations against
as many times the rate of bfloat16 products of 8192 x 8192 on one device. Memory is the allocator's peak in the process that has most;
`forecast` is what a run would have been told. A case that fails or takes too long is a row with its error. Tiny, on a CPU:

    python benchmarks/rank_training.py --processes 1 2 --device cpu --layers 2 --dim 64 --fsdp-layers 2 --fsdp-dim 64 --vocabulary 256 \\
        --context 64 --batch 2 --compile off --steps 2
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from anarcho_train.steps.torch_ranks import TorchRanks
from cuda_training import (
    WARM_STEPS,
    Job,
    Step,
    as_table,
    flops_per_token,
    forecast,
    in_process,
    model_config,
    our_step,
    product_rate,
    their_step,
    timed,
)

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
"""By its number, because a machine may not know its own name."""
CASES = ("ddp", "peer", "fsdp")
ORDER = "RANK_TRAINING_ORDER"
"""The environment variable with the order of a rank."""
GRACE_SECONDS = 60
"""How much longer torchrun is waited for than its processes, which end themselves."""


@dataclass(frozen=True)
class Order:
    """What the processes of one row measure; `job.batch` sequences go through a process's model at once."""

    case: str
    job: Job
    processes: int
    micro_batches: int
    """Of each process in a step."""

    @property
    def sequences(self) -> int:
        """Of a step, over all processes."""
        return self.job.batch * self.micro_batches * self.processes


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure every case that was asked for; the rows that were written are returned, too."""
    options = _options(arguments)
    orders = _orders(options)
    ceiling = in_process(product_rate, options.device)
    rows: list[dict[str, Any]] = []
    for order in orders:
        rows.append(_row(order, launched(order, options), ceiling, options, before=rows))
        print(json.dumps(rows[-1]), flush=True)
        if options.json:  # After each one: a machine that is lent may be taken away.
            options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if options.markdown:
            options.markdown.write_text(as_table(rows))
    print(as_table(rows))
    return rows


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--optimizer", nargs="+", choices=("muon", "adamw"), default=["muon"])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--batch", type=int, default=16, help="sequences of each process in a step of ddp and peer")
    parser.add_argument("--global-batch", type=int, help="sequences of all processes in such a step, instead")
    parser.add_argument("--layers", type=int, default=12, help="of ddp and peer")
    parser.add_argument("--dim", type=int, default=768, help="of ddp and peer; heads have 64 columns")
    parser.add_argument("--fsdp-layers", type=int, default=16)
    parser.add_argument("--fsdp-dim", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences at once in a process of fsdp")
    parser.add_argument("--micro-batches", type=int, default=4, help="of each process in a step of fsdp")
    parser.add_argument("--checkpointing", action="store_true", help="the blocks of fsdp keep their inputs alone")
    parser.set_defaults(cuda_graphs="off")  # Several processes have none.
    parser.add_argument("--narrow-residual", action="store_true", help="ours keeps the residual stream in bfloat16")
    parser.add_argument("--float8", action="store_true", help="ours multiplies in 8-bit floats where that gains")
    parser.add_argument("--compile", choices=("on", "off"), default="on", help="of both sides")
    parser.add_argument(
        "--whole-graph", action="store_true", help="the peer's is not cut where buckets of gradients end"
    )
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--timeout", type=int, default=240, help="seconds for one row, compilation included")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="write one line for each row to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    return parser.parse_args(arguments)


def _orders(options: argparse.Namespace) -> list[Order]:
    for count in options.processes:
        if options.global_batch and options.global_batch % count:
            raise SystemExit(f"--global-batch is {options.global_batch}; expected a multiple of {count} processes")
    orders = []
    for case in options.case:
        for optimizer in options.optimizer:
            job = Job(options.context, options.batch, optimizer, options.layers, options.dim)
            micro_batches = 1
            if case == "fsdp":
                job = replace(job, batch=options.micro_batch, layers=options.fsdp_layers, dim=options.fsdp_dim)
                job, micro_batches = replace(job, checkpointing=options.checkpointing), options.micro_batches
            for count in options.processes:
                share = options.global_batch // count if options.global_batch and case != "fsdp" else job.batch
                orders.append(Order(case, replace(job, batch=share), count, micro_batches))
    return orders


def _row(
    order: Order,
    found: dict[str, Any],
    ceiling: float,
    options: argparse.Namespace,
    *,
    before: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """What was found, as a line of the table; ``before`` are the lines above it."""
    job, config = order.job, model_config(order.job, options)
    row: dict[str, Any] = {
        "case": order.case,
        "optimizer": job.optimizer,
        "million parameters": round(config.num_parameters / 1e6, 1),
        "context": job.context,
        "processes": order.processes,
        "sequences": order.sequences,
        "at once": job.batch,
        "checkpointing": job.checkpointing,
        "ceiling TFLOP/s": round(ceiling / 1e12, 1),
    }
    if "error" in found:
        return row | found
    rate = order.sequences * job.context / found["seconds"]
    same = ("case", "optimizer", "million parameters", "context", "checkpointing")
    ones = [one for one in before if one["processes"] == 1 and all(one[key] == row[key] for key in same)]
    alone = rate if order.processes == 1 else next((one["tokens/s"] for one in ones if "tokens/s" in one), None)
    row |= {"ms a step": round(1000 * found["seconds"], 2), "tokens/s": round(rate)}
    row["efficiency"] = None if alone is None else round(rate / order.processes / alone, 3)
    row["utilisation"] = round(rate * flops_per_token(config) / (order.processes * ceiling), 3)
    row["GB"] = round(found["peak"] / 1e9, 3)
    if order.case != "peer":
        row["forecast GB"] = round(_forecast_bytes(order, options) / 1e9, 3)
    return row | {"warm s": found["warm s"]}


def _forecast_bytes(order: Order, options: argparse.Namespace) -> int:
    shards = None if order.processes == 1 else order.processes if order.case == "fsdp" else 1
    return forecast(order.job, model_config(order.job, options), gradients_held=order.micro_batches > 1, shards=shards)[
        0
    ]


def launched(order: Order, options: argparse.Namespace) -> dict[str, Any]:
    """What rank 0 has found, or the ``error`` of the first rank that failed."""
    with tempfile.TemporaryDirectory() as directory, Path(directory, "log").open("w+") as log:
        process = subprocess.Popen(
            [*TORCHRUN, "--nproc-per-node", str(order.processes), __file__],
            env={"OMP_NUM_THREADS": "1"}
            | os.environ
            | {ORDER: json.dumps(told(order, options) | {"directory": directory})},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            process.wait(options.timeout + GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()  # It ends its processes before itself.
            process.wait()
        result = Path(directory, "result")
        if process.returncode == 0 and result.is_file():
            return json.loads(result.read_text())
        log.seek(0)
        print(log.read()[-6000:], file=sys.stderr, flush=True)
        errors = sorted(Path(directory).glob("error-*"), key=lambda file: file.stat().st_mtime)
        late = f"it took longer than {options.timeout} s, or ended by itself; see what it has written"
        return {"error": errors[0].read_text() if errors else late}


def told(order: Order, options: argparse.Namespace) -> dict[str, Any]:
    """What a rank is told, besides the directory for what it finds, as JSON knows it."""
    return asdict(order) | {"options": {**vars(options), "json": None, "markdown": None}}


def rank(given: dict[str, Any]) -> None:
    """What one process does: its part of one row."""
    options, directory = argparse.Namespace(**given["options"]), given["directory"]
    order = Order(given["case"], Job(**given["job"]), given["processes"], given["micro_batches"])
    faulthandler.dump_traceback_later(options.timeout, exit=True)
    ranks = connect(options.device, timeout_seconds=options.timeout)
    try:
        found = measured(order, ranks, options)
    except BaseException as error:
        traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        Path(directory, f"error-{ranks.rank}").write_text(text)
        sys.stderr.flush()
        os._exit(1)  # The end of an interpreter would wait for what others do not send any more.
    if ranks.rank == 0:
        Path(directory, "result").write_text(json.dumps(found))
    ranks.gathered([0.0])
    faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()


def connect(device: str, *, timeout_seconds: float) -> TorchRanks:
    """As the command does it: numbers of the host travel over gloo, and each process has the device of its number."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_seconds))
    if device == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise SystemExit(f"process {local} has no GPU of its own, there are {count}; start at most {count}")
        torch.cuda.set_device(local)
    return TorchRanks(dist.group.WORLD, timeout_seconds=timeout_seconds)


def measured(order: Order, ranks: TorchRanks, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step and bytes at the peak, each of the process that has most, the same in all."""
    step = _step(order, ranks, options)

    def together() -> None:
        ranks.gathered([0.0])

    begin = time.perf_counter()
    timed(step, options.device, WARM_STEPS, before=together)
    warm = time.perf_counter() - begin
    cuda = options.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = ranks.gathered(timed(step, options.device, options.steps, before=together)).max(axis=0)
    peak = ranks.gathered([torch.cuda.max_memory_allocated() if cuda else 0]).max()
    return {"seconds": statistics.median(seconds.tolist()), "peak": float(peak), "warm s": round(warm, 1)}


def _step(order: Order, ranks: TorchRanks, options: argparse.Namespace) -> Step:
    """One rank's part of a step, with sequences of its own."""
    job, config = order.job, model_config(order.job, options)
    rows = (job.batch * order.micro_batches, job.context + 1)
    ids = np.random.default_rng(ranks.rank).integers(0, config.vocab_size, rows, dtype=np.int32)
    if order.case == "peer":
        return their_step(job, config, ids, options, averaged=lambda model: _averaged(model, ranks, options))
    strategy = "fsdp" if order.case == "fsdp" else "ddp"
    return our_step(job, config, ids, options, ranks=ranks, strategy=strategy, micro_batches=order.micro_batches)


def _averaged(model: torch.nn.Module, ranks: TorchRanks, options: argparse.Namespace) -> torch.nn.Module:
    if ranks.size == 1:
        return model
    ranks.join_devices(next(model.parameters()).device)
    torch._dynamo.config.optimize_ddp = not options.whole_graph
    return torch.nn.parallel.DistributedDataParallel(
        model,
        device_ids=[torch.cuda.current_device()] if options.device == "cuda" else None,
        process_group=ranks.computing,
        gradient_as_bucket_view=True,
    )


if __name__ == "__main__":
    rank(json.loads(os.environ[ORDER])) if ORDER in os.environ else main()
