"""What a model learns from one pass over a text, per token and per second: this project's settings and other implementations.

    python benchmarks/books_learning.py prepare --train books-train.jsonl.xz --validation books-validation.jsonl.xz \\
        --tokenizer tokenizer/ --folder books/ --compress
    python benchmarks/books_learning.py train --data books/ --output learned.jsonl --device cuda \\
        --job "ours" --job "small-batch tokens_per_step=16384" --job "Llama-AdamW peer=adamw" --jobs more.txt
    python benchmarks/books_learning.py plot learned.jsonl --picture learned.svg

The default is the reference model of 137.8 million parameters at a context of 2048. `books/jobs.py` says what a job can set; jobs run one
after another in one process and share what is compiled. Each makes its steps over all training tokens, in an order that its seed gives,
and the same order for every size of step.

Seconds are those of training: without compilation, which a step that is undone does first, and without evaluations. An evaluation during
training is of windows spread over the validation text, the last one is of the whole text; both read windows of the context's length that
do not overlap. Records are JSON lines: `job` with all settings, `evaluation`, `end`, or `failed`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anarcho_model import ModelConfig
from anarcho_train import LossSum, StepSchedule
from anarcho_train.micro_batch import Rows
from books.curves import draw, read_records, table
from books.data import Corpus, TokenText, load, prepare
from books.jobs import Job, PlannedStep, micro_rows, plan, read
from books.ours import OwnModels, WeightAverages

AVERAGED_MOMENTS = 400
"""So many moments of a training enter the averages of weights: as good as all, and their cost cannot be seen."""

Write = Callable[[dict[str, Any]], None]


class Trainings:
    """Runs jobs on one device, one after another."""

    def __init__(
        self,
        corpus: Corpus,
        *,
        device: torch.device,
        precision: str,
        compile_mode: str,
        evaluations: int,
        windows: int,
        shared: bool = False,
    ) -> None:
        self._corpus, self._device, self._compile, self._shared = corpus, device, compile_mode, shared
        self._evaluations, self._windows = evaluations, windows
        self._own = OwnModels(device, precision=precision, compile_mode=compile_mode)

    def run(self, job: Job, *, max_tokens: int | None, write: Write) -> None:
        """One training; its records go to ``write``."""
        context, train = job.model.context_length, self._corpus.train
        windows = min(train.num_tokens, max_tokens or train.num_tokens) // context
        # One order for all windows, so that a training over fewer of them sees a sample of the whole text.
        order = np.random.default_rng(job.seed).permutation(train.num_tokens // context)[:windows]
        steps = plan(job, windows=windows)
        if not steps:
            raise ValueError(
                f"job {job.name} has no step in {windows * context} tokens; give more tokens or smaller steps"
            )
        device = {"device": self._device_name(), "device_shared": self._shared}
        write({"kind": "job", **_settings(job), **device, "torch": torch.__version__})

        def batches(step: PlannedStep) -> list[Rows]:
            whole = train.rows(order[step.first : step.first + step.count], length=context)
            rows, size = Rows.cut(whole, step.length), micro_rows(job, step)
            return [Rows.of(rows, first, first + size) for first in range(0, len(rows.tokens), size)]

        first_of_shape = {(step.length, micro_rows(job, step)): step for step in reversed(steps)}
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        step = self._prepared(job, [batches(first)[:1] for first in first_of_shape.values()])
        averages = WeightAverages(step.model.parameters(), powers=job.averages)
        record = {"job": job.name, "parameters": sum(p.numel() for p in step.model.parameters())}
        due = {round(len(steps) * n / self._evaluations) for n in range(1, self._evaluations + 1)}
        every = max(1, len(steps) // AVERAGED_MOMENTS)
        seconds, losses, tokens, start = 0.0, [], 0, self._now()
        for number, planned in enumerate(steps, start=1):
            schedule = StepSchedule(lr_scale=planned.lr_scale, momentum=planned.momentum, number=number - 1)
            losses.append(step.train(batches(planned), schedule=schedule))
            tokens += planned.count * context
            if number % every == 0:
                averages.update()
            if number in due:
                seconds += self._now() - start
                mean = sum(float(metrics.loss) for metrics in losses) / len(losses)
                here = {"step": number, "tokens": tokens, "seconds": round(seconds, 3), "train_loss": mean}
                write({"kind": "evaluation", **record, **here, **self._evaluate(step, job, steps[-1], self._windows)})
                losses, start = [], self._now()
        end = {"steps": len(steps), "tokens": tokens, "seconds": round(seconds, 3), "peak_bytes": self._peak()}
        end |= self._evaluate(step, job, steps[-1], None)
        averaged = {}
        for power in job.averages:
            with averages.applied(power):
                averaged[f"{power:g}"] = self._evaluate(step, job, steps[-1], None)["bits_per_byte"]
        write({"kind": "end", **record, **end, "averaged": averaged})

    def _prepared(self, job: Job, micro_batches: list[list[Rows]]) -> Any:
        if job.peer is None:
            return self._own.warmed(job, micro_batches)
        from books.peers import PeerStep  # transformers takes seconds to load

        step = PeerStep(job, device=self._device, compiled=self._compile != "off" and self._device.type == "cuda")
        for batches in micro_batches:
            step.warm(batches[0])
        return step

    def _evaluate(self, step: Any, job: Job, last: PlannedStep, max_windows: int | None) -> dict[str, float]:
        """Loss in nats per token and bits per byte on the validation text, in batches of a shape that training has compiled."""
        text: TokenText = self._corpus.validation
        context = job.model.context_length
        rows = micro_rows(job, replace(last, length=context))
        total = LossSum()
        for batch in text.batches(rows, length=context, max_windows=max_windows):
            total += step.evaluate(batch)
        loss = total.loss / total.weight
        return {"loss": loss, "bits_per_byte": text.bits_per_byte(loss)}

    def _now(self) -> float:
        """The time when the device has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "CPU"


def _settings(job: Job) -> dict[str, Any]:
    values = asdict(job)
    return {"job": values.pop("name"), **values}


def train(arguments: argparse.Namespace) -> bool:
    """Runs the jobs of the command line; False where one has failed."""
    corpus = load(arguments.data)
    heads = arguments.heads or max(1, arguments.dim // 64)
    model = ModelConfig(
        vocab_size=corpus.vocab_size,
        context_length=arguments.context,
        num_layers=arguments.layers,
        dim=arguments.dim,
        num_heads=heads,
    )
    lines = [line for file in arguments.jobs for line in file.read_text(encoding="utf-8").splitlines()]
    jobs = read([*arguments.job, *lines], common=arguments.common, model=model)
    part, _, parts = arguments.part.partition("/")
    trainings = Trainings(
        corpus,
        device=torch.device(arguments.device),
        precision=arguments.precision,
        compile_mode=arguments.compile,
        evaluations=arguments.evaluations,
        windows=arguments.windows,
        shared=arguments.shared,
    )
    sound = True
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("a", encoding="utf-8") as file:

        def write(record: dict[str, Any]) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()
            if record["kind"] == "end":
                averaged = "".join(f", {power}: {bits:.4f}" for power, bits in record["averaged"].items())
                told = f"{record['bits_per_byte']:.4f}{averaged} after {record['seconds']:.1f} s"
                print(f"{record['job']}: {told}, {time.perf_counter() - begun:.1f} s in all", flush=True)

        for job in jobs[int(part) - 1 :: int(parts)]:
            begun = time.perf_counter()
            try:
                trainings.run(job, max_tokens=arguments.tokens, write=write)
            except (RuntimeError, ValueError) as error:  # The other jobs can still be done.
                sound = False
                write({"kind": "failed", "job": job.name, "error": f"{type(error).__name__}: {error}"[:1000]})
                print(f"{job.name} failed: {error}"[:1000], file=sys.stderr)
    print(table(read_records([arguments.output])))
    return sound


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare", help="encode the texts")
    for name in ("train", "validation", "tokenizer", "folder"):
        preparing.add_argument(f"--{name}", type=Path, required=True)
    preparing.add_argument(
        "--compress", action="store_true", help="about half as large, for the way to another machine"
    )
    training = commands.add_parser("train", help="run jobs")
    training.add_argument("--data", type=Path, required=True, help="a folder that `prepare` has written")
    training.add_argument(
        "--output", type=Path, required=True, help="records are appended here, one JSON object a line"
    )
    training.add_argument("--job", action="append", default=[], help='"name key=value ..."; may be given several times')
    training.add_argument("--jobs", type=Path, action="append", default=[], help="a file with a job a line")
    training.add_argument("--common", default="", help="settings of all jobs, where a job says nothing else")
    training.add_argument(
        "--part", default="1/1", help="K/N: every Nth job from the Kth on, for N processes on one GPU"
    )
    training.add_argument("--device", default="cpu")
    training.add_argument(
        "--shared", action="store_true", help="others use the device, too: seconds are not to be compared"
    )
    training.add_argument(
        "--precision", default="auto", help="of this project's matrix products: auto, float32, bfloat16"
    )
    training.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    training.add_argument("--tokens", type=int, help="train on so many tokens; left out, all")
    training.add_argument("--context", type=int, default=2048, help="tokens of a sequence")
    training.add_argument("--layers", type=int, default=12)
    training.add_argument("--dim", type=int, default=768)
    training.add_argument("--heads", type=int, help="left out, one for each 64 of the width")
    training.add_argument("--evaluations", type=int, default=12, help="during a training, the last at its end")
    training.add_argument("--windows", type=int, default=64, help="sequences of an evaluation during a training")
    plotting = commands.add_parser("plot", help="draw the curves, and print the table")
    plotting.add_argument("records", type=Path, nargs="+")
    plotting.add_argument("--picture", type=Path, help=".svg or .png")
    plotting.add_argument(
        "--label", action="append", default=[], help="JOB=LABEL: draw these jobs alone; may be repeated"
    )
    plotting.add_argument("--top", type=float, help="the largest bits per byte that is drawn")
    return parser


def main() -> None:
    arguments = _parser().parse_args()
    try:
        if arguments.command == "prepare":
            paths = {"tokenizer": arguments.tokenizer, "folder": arguments.folder}
            print(json.dumps(prepare(arguments.train, arguments.validation, compress=arguments.compress, **paths)))
        elif arguments.command == "train":
            sys.exit(0 if train(arguments) else 1)
        else:
            records = read_records(arguments.records)
            print(table(records))
            if arguments.picture:
                labels = dict(label.partition("=")[::2] for label in arguments.label)
                draw(records, arguments.picture, labels=labels, top=arguments.top)
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
