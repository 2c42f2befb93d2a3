"""What a run costs beside its optimizer steps: metrics, TensorBoard, memory gauges, the sizes of updates, and checkpoints.

    python benchmarks/run_overhead.py --json run_overhead.jsonl --markdown table.md

The same step trains the same random batches in turns: `bare`, called in a loop; `direct`, by `anarcho_train.Loop` with everything on and a
checkpoint for which training waits; and `copied`, where training goes on while a copy is written. Each turn has its own directory.

* `step_seconds` are medians over the turns of a turn's time by its steps, checkpoints left out of `direct`.
* `monitoring_percent` is what the loop does outside of the step, and what the step takes longer where it measures its update, as a share
  of the loop's time: clocks around the step within one turn, so that a busy machine disturbs both sides alike.
* `checkpoint_percent` spreads the time for which training stood still over `--checkpoint-every` steps.

The default shape is that of the reference comparison on the CPU: 6 layers of 384, SwiGLU of 1536, 8192 tokens of vocabulary, tied, 8
sequences of 512 tokens, Muon and AdamW, in float32.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from anarcho_model import ModelConfig
from anarcho_model.torch import GPT
from anarcho_model.weights import load_weights, save_pretrained
from anarcho_monitor import EarlyStopping, MetricsLog, Progress, Sinks, TensorBoardSink, Throughput, read_memory
from anarcho_optim import OptimConfig
from anarcho_optim.torch import MuonAdamW, param_groups
from anarcho_tokenize import Batch
from anarcho_train import CheckpointStore, Loop, StepMetrics, StepSchedule, TrainConfig
from anarcho_train.steps.torch import TorchStep


class RandomText:
    """Random tokens in the place of a corpus; each sample has its own."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self._vocabulary, self._length = vocabulary, length

    def batch(self, first_sample: int, count: int) -> Batch:
        drawn = np.random.default_rng(first_sample).integers(0, self._vocabulary, (count, self._length + 1))
        drawn = drawn.astype(np.int32)
        weights = np.ones((count, self._length), np.float32)
        return Batch(tokens=drawn[:, :-1], targets=drawn[:, 1:], weights=weights)

    def position(self, sample: int) -> dict[str, int]:
        return {"cursor": sample}

    def state(self, first_sample: int, count: int) -> Literal["ready"]:
        return "ready"


class TimedStep:
    """The step, with the seconds of each of its updates and whether it measured them."""

    def __init__(self, step: TorchStep) -> None:
        self._step = step
        self.times: list[tuple[float, bool]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)

    def train(self, micro_batches: Sequence[Any], *, schedule: StepSchedule) -> StepMetrics:
        started = time.perf_counter()
        metrics = self._step.train(micro_batches, schedule=schedule)
        self.times.append((time.perf_counter() - started, schedule.measure_update))
        return metrics


class Records:
    """A sink that keeps the records of checkpoints."""

    def __init__(self) -> None:
        self.checkpoints: list[dict[str, float]] = []

    def write(self, kind: str, *, step: int, tokens: int, **values: Any) -> None:
        if kind == "checkpoint":
            self.checkpoints.append(values)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, write and return the row."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    step, text = _step(options), RandomText(options.vocabulary, options.length)
    _bare(step, text, options, steps=2)
    turns: dict[str, list[dict[str, float]]] = {"bare": [], "direct": [], "copied": []}
    for _ in range(options.rounds):
        turns["bare"].append(_bare(step, text, options, steps=options.steps))
        for name in ("direct", "copied"):
            with tempfile.TemporaryDirectory() as directory:
                turns[name].append(_loop(step, text, options, Path(directory), background=name == "copied"))
    row = _row(turns, options, parameters=sum(parameter.numel() for parameter in step.model.parameters()))
    print(json.dumps(row))
    if options.json:
        with options.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    if options.markdown:
        options.markdown.write_text(_table(row), encoding="utf-8")
    return row


def _step(options: argparse.Namespace) -> TorchStep:
    config = ModelConfig(
        vocab_size=options.vocabulary,
        context_length=options.length,
        num_layers=options.layers,
        dim=options.dim,
        num_heads=options.heads,
        hidden_dim=options.hidden_dim,
        tie_embeddings=True,
    )
    model = GPT(config)
    model.init_weights(seed=0)

    def save(model: Any, directory: Path) -> None:
        save_pretrained(model, directory, eos_token_id=1, pad_token_id=0)

    def load(model: Any, directory: Path) -> None:
        load_weights(model, directory)

    return TorchStep(
        model,
        MuonAdamW(param_groups(model, config=OptimConfig())),
        config=TrainConfig(precision="float32", compile="off", batch_tokens=options.batch * options.length),
        save_model=save,
        load_model=load,
    )


def _bare(step: TorchStep, text: RandomText, options: argparse.Namespace, *, steps: int) -> dict[str, float]:
    started = time.perf_counter()
    for number in range(steps):
        step.train(
            [text.batch(options.batch * number, options.batch)], schedule=StepSchedule(lr_scale=1.0, number=number)
        )
    return {"step_seconds": (time.perf_counter() - started) / steps}


def _loop(
    step: TorchStep, text: RandomText, options: argparse.Namespace, directory: Path, *, background: bool
) -> dict[str, float]:
    """A run of so many steps with one checkpoint in its midst, and the one at its end, which is left out."""
    timed: Any = TimedStep(step)
    records = Records()
    marks: list[float] = []
    sinks: list[Any] = [
        MetricsLog(directory / "metrics.jsonl", run="overhead"),
        TensorBoardSink(directory / "tensorboard"),
        Progress(options.steps, tokens_per_step=options.batch * options.length, stream=io.StringIO()),
        records,
    ]

    def schedule(number: int) -> StepSchedule:
        marks.append(time.perf_counter())
        return StepSchedule(lr_scale=1.0, number=number)

    loop = Loop(
        step=timed,
        batches=text,
        validation=None,
        schedule=schedule,
        config=TrainConfig(
            steps=options.steps + 1,
            batch_tokens=options.batch * options.length,
            micro_batch=options.batch,
            eval_every=0,
            checkpoint_every=1 + options.steps // 3,
            log_every=options.log_every,
        ),
        sequence_length=options.length,
        checkpoints=CheckpointStore(directory / "checkpoints"),
        sink=Sinks(sinks),
        early_stopping=EarlyStopping(patience=0),
        throughput=Throughput(total_steps=options.steps + 1, flops_per_token=1e8, peak_flops=1e12),
        gauges=lambda: read_memory("cpu").metrics(),
        background=lambda: background,
    )
    loop.run()
    times = timed.times[:-1]
    total, inside = marks[-1] - marks[0], sum(seconds for seconds, _ in times)
    plain = statistics.median(seconds for seconds, measured in times if not measured)
    measured = [max(0.0, seconds - plain) for seconds, measured in times if measured]
    saves = [save for save in records.checkpoints if save["path"] != f"step-{options.steps + 1:08d}"]
    still = sum(save.get("copy_seconds", save["seconds"]) for save in saves)
    return {
        "step_seconds": (total - (0.0 if background else still)) / len(times),
        "outside_seconds": (total - inside - still) / len(times),
        "measure_seconds": statistics.median(measured) if measured else 0.0,
        "still_seconds": still / max(1, len(saves)),
        "written_seconds": sum(save["seconds"] for save in saves) / max(1, len(saves)),
    }


def _row(turns: dict[str, list[dict[str, float]]], options: argparse.Namespace, *, parameters: int) -> dict[str, Any]:
    def median(turn: str, name: str) -> float:
        return statistics.median(values[name] for values in turns[turn])

    bare = median("bare", "step_seconds")
    row: dict[str, Any] = {
        "parameters": parameters,
        "batch_tokens": options.batch * options.length,
        "threads": options.threads,
        "rounds": options.rounds,
        "steps": options.steps,
        "log_every": options.log_every,
        "checkpoint_every": options.checkpoint_every,
        "load_average": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "bare_step_seconds": round(bare, 4),
    }
    for turn in ("direct", "copied"):
        outside = median(turn, "outside_seconds") + median(turn, "measure_seconds") / options.log_every
        row[turn] = {
            "step_seconds": round(median(turn, "step_seconds"), 4),
            "monitoring_percent": round(100 * outside / bare, 3),
            "stands_still_seconds": round(median(turn, "still_seconds"), 3),
            "written_after_seconds": round(median(turn, "written_seconds"), 3),
            "checkpoint_percent": round(100 * median(turn, "still_seconds") / (bare * options.checkpoint_every), 3),
        }
    return row


def _table(row: dict[str, Any]) -> str:
    lines = [
        f"{row['parameters']:,} parameters, {row['batch_tokens']} tokens a step, {row['threads']} threads; a bare step takes "
        f"{row['bare_step_seconds']:.3f} s. A line of metrics every {row['log_every']} steps, a checkpoint every "
        f"{row['checkpoint_every']}.",
        "",
        "| checkpoints | step, s | monitoring | training stands still, s | on the disk after, s | checkpoints |",
        "|---|---|---|---|---|---|",
    ]
    for turn in ("direct", "copied"):
        values = row[turn]
        lines.append(
            f"| {turn} | {values['step_seconds']:.3f} | {values['monitoring_percent']:.2f} % | {values['stands_still_seconds']:.3f} | "
            f"{values['written_after_seconds']:.3f} | {values['checkpoint_percent']:.2f} % |"
        )
    return "\n".join(lines) + "\n"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    numbers: dict[str, tuple[int, str]] = {
        "rounds": (3, "turns of each kind"),
        "steps": (12, "optimizer steps of a turn"),
        "log-every": (10, "steps between lines of metrics"),
        "checkpoint-every": (500, "steps over which the time of a checkpoint is spread"),
        "threads": (2, "of PyTorch"),
        "layers": (6, "of the model"),
        "dim": (384, "of the model"),
        "heads": (6, "of the model"),
        "hidden-dim": (1536, "of the model"),
        "vocabulary": (8192, "tokens"),
        "length": (512, "tokens of a sequence"),
        "batch": (8, "sequences of a step"),
    }
    for name, (default, text) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    kind: Callable[[str], Path] = Path
    parser.add_argument("--json", type=kind, help="file to which the row is added")
    parser.add_argument("--markdown", type=kind, help="file that is replaced by a table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
