"""How long it takes until something happens: imports, `anarcho --help`, and `anarcho pretrain` to its first step.

    python benchmarks/start_up.py --json start_up.jsonl --markdown table.md

* An import is that of one package in a new interpreter, beyond the framework that it needs (PyTorch or NumPy), which is imported before.
* `anarcho --help` is the whole process.
* `anarcho pretrain` is the time from the start of the process to the end of its first optimizer step, as `metrics.jsonl` says it, on the
  CPU without compilation: the quickstart's model on the embedded corpus, training of the tokenizer and preparation of the data included.

`anarcho bench --only start-up` measures the same of a configuration whose tokenizer and data are prepared.

Every number is a median over rounds, in which all things follow each other, after one round that fills the caches of the file system and of
Python. `cpu_ms` is the time that a process had a core, children included: on a busy machine it says more than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anarcho_cli.benching.starting import Measured, children_seconds, first_step, import_package, packages_of

LIMITS = {"import": 0.05, "anarcho --help": 0.3, "anarcho pretrain": 8.0}
"""Seconds that each is to stay under."""


def show_help() -> Measured:
    """The command's own help, as a user calls it."""
    return _timed(lambda: subprocess.run([*_anarcho(), "--help"], check=True, capture_output=True))


def reach_first_step(preset: str) -> Measured:
    """A run until its first line of metrics, which then is ended; what it prepares before is part of the time."""
    place = ["--preset", preset, "--device", "cpu", "--set", "train.steps=2", "--set", "train.compile=off"]
    with tempfile.TemporaryDirectory() as folder:
        return first_step([*_anarcho(), "pretrain", *place], runs_dir=Path(folder), name="run")


def _anarcho() -> list[str]:
    return [str(Path(sys.executable).with_name("anarcho"))]


def _timed(work: Callable[[], object]) -> Measured:
    started, used = time.perf_counter(), children_seconds()
    work()
    return time.perf_counter() - started, children_seconds() - used


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, write and return one row for each thing."""
    options = _options(arguments)
    things: dict[str, tuple[Callable[[], Measured], float, int]] = {
        f"import {package}" + (f" after {framework}" if framework else ""): (
            lambda package=package, framework=framework: import_package(package, framework),
            LIMITS["import"],
            options.rounds,
        )
        for package, framework in packages_of("torch").items()
    }
    things["anarcho --help"] = (show_help, LIMITS["anarcho --help"], options.rounds)
    things["anarcho pretrain, to the first step"] = (
        lambda: reach_first_step(options.preset),
        LIMITS["anarcho pretrain"],
        options.runs,
    )
    found: dict[str, list[Measured]] = {name: [] for name in things}
    for number in range(1 + max(options.rounds, options.runs)):
        for name, (measure, _, rounds) in things.items():
            if number <= rounds:
                found[name].append(measure())
    rows = [_row(name, found[name][1:] or found[name], limit=things[name][1]) for name in things]
    for row in rows:
        print(json.dumps(row))
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = _table(rows)
    print(table)
    if options.markdown:
        options.markdown.write_text(table)
    return rows


def _row(name: str, measured: list[Measured], *, limit: float) -> dict[str, Any]:
    wall, cpu = (statistics.median(values) for values in zip(*measured, strict=True))
    return {
        "what": name,
        "ms": round(1e3 * wall, 1),
        "cpu_ms": round(1e3 * cpu, 1),
        "least_ms": round(1e3 * min(wall for wall, _ in measured), 1),
        "limit_ms": round(1e3 * limit),
        "rounds": len(measured),
        "python": ".".join(map(str, sys.version_info[:3])),
        "load_average": round(os.getloadavg()[0], 1),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| what | ms | of a core | least | limit |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['what']} | {row['ms']} | {row['cpu_ms']} | {row['least_ms']} | {row['limit_ms']} |" for row in rows
    ]
    return "\n".join(lines) + "\n"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="of imports and of the help")
    parser.add_argument("--runs", type=int, default=3, help="of the pre-training; 0 leaves it out, but for a first one")
    parser.add_argument("--preset", default="quickstart", help="of the pre-training")
    parser.add_argument("--json", type=Path, help="write one line for each thing to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
