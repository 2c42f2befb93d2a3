"""How long it takes until a run trains: from `anarcho pretrain` in a new process to the end of its first step, and what imports take.

Notable: tokenizer and shards are there before, as for a run on what `anarcho data prepare` has made. A first run, which fills the caches of
the file system, of Python and of the framework's compiler, is not counted. An import is that of one package in a new interpreter, beyond
the framework that it needs, which is imported before.
"""

from __future__ import annotations

import dataclasses
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from anarcho_cli.back_ends import back_end
from anarcho_cli.benching.cases import Case
from anarcho_cli.benching.feeding import learn_tokenizer, prepare_sample, sample_config
from anarcho_cli.benching.processes import last_line
from anarcho_cli.benching.subject import device_name
from anarcho_cli.config import RunConfig, dumps
from anarcho_cli.layers import ConfigError
from anarcho_cli.pipeline.process import anarcho
from anarcho_cli.run_directory import METRICS_FILE

FRAMEWORKS = {"torch": "torch", "mlx": "mlx.core"}
"""What a back-end imports of its framework."""
PLAIN_PACKAGES = {
    "anarcho_tokenize": "",
    "anarcho_model": "",
    "anarcho_optim": "",
    "anarcho_train": "numpy",
    "anarcho_monitor": "",
    "anarcho_cli": "",
}
"""Packages that load no framework, and what is imported before them."""
FIRST_STEP_SETTINGS = ("train.log_every=1", "train.eval_every=0", "train.checkpoint_every=0")
"""So that the first step is told at once, and nothing comes before it."""
IMPORT = """
import sys, time
if len(sys.argv) > 2: __import__(sys.argv[2])
clock, used = time.perf_counter(), time.process_time()
__import__(sys.argv[1])
print(time.perf_counter() - clock, time.process_time() - used)
"""
POLL_SECONDS = 0.005

Measured = tuple[float, float]
"""Seconds by the clock, and of a core."""


def measure_start_up(case: Case) -> dict[str, Any]:
    """Seconds until the first step of a case's run, and of the imports that it makes."""
    require_pretraining(case.config)
    rounds = min(case.steps, 3)
    with tempfile.TemporaryDirectory(prefix="anarcho-bench-") as folder:
        command = _warm_run(case, Path(folder))
        runs = [first_step(command, runs_dir=Path(folder), name=f"run-{n}")[0] for n in range(rounds + 1)]
    packages = {FRAMEWORKS[case.backend]: "", **packages_of(case.backend)}
    imports = [
        {"package": name, "after": after, "seconds": median(import_package(name, after)[0] for _ in range(rounds))}
        for name, after in packages.items()
    ]
    return {
        "device_name": device_name(back_end(case.backend), case.device),
        "first_step_seconds": median(runs[1:]),
        "first_run_seconds": runs[0],
        "imports": imports,
    }


def require_pretraining(config: RunConfig) -> None:
    """Raises ConfigError for rows that `anarcho pretrain` does not train on."""
    if config.data.kind != "text":
        raise ConfigError(
            f"data.kind is '{config.data.kind}'; expected 'text' to measure start-up, which is that of `anarcho pretrain`"
        )


def packages_of(backend: str) -> dict[str, str]:
    """The project's packages as a run of a back-end imports them -> what is imported before each."""
    own = ("anarcho_model", "anarcho_optim", "anarcho_train.steps")
    return {**PLAIN_PACKAGES, **{f"{package}.{backend}": FRAMEWORKS[backend] for package in own}}


def import_package(package: str, after: str) -> Measured:
    """One import in a new interpreter, once ``after`` has been imported, if that is not empty."""
    command = [sys.executable, "-c", IMPORT, package, *([after] if after else [])]
    wall, used = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
    return float(wall), float(used)


def first_step(command: Sequence[str], *, runs_dir: Path, name: str) -> Measured:
    """A run by a training command until its metrics tell of a step; then it is ended.

    ``runs_dir`` and ``name`` are added to the command. Raises ValueError where it ends without a step.
    """
    settings = [part for setting in FIRST_STEP_SETTINGS for part in ("--set", setting)]
    metrics, log = runs_dir / name / METRICS_FILE, runs_dir / f"{name}.log"
    started, used = time.perf_counter(), children_seconds()
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--runs-dir", str(runs_dir), "--name", name, *settings],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    try:
        while not _has_step(metrics):
            if process.poll() is not None and not _has_step(metrics):
                said = last_line(log.read_text(errors="replace")) or "it said nothing"
                raise ValueError(f"the run made no step: {said}")
            time.sleep(POLL_SECONDS)
        reached = time.perf_counter() - started
    finally:
        process.kill()
        process.wait()
    return reached, children_seconds() - used


def children_seconds() -> float:
    """Seconds that processes which this one has waited for have had a core."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _warm_run(case: Case, folder: Path) -> list[str]:
    """The command of a case's run, whose tokenizer and shards lie in a folder."""
    sample = sample_config(case.config)
    tokenizer, shards, file = folder / "tokenizer", folder / "data", folder / "config.toml"
    learn_tokenizer(sample, tokenizer)
    prepare_sample(sample, tokenizer, shards)
    data = dataclasses.replace(sample.data, source=str(shards), sources=(), max_tokens=None, streaming=None)
    file.write_text(dumps(dataclasses.replace(case.config, data=data)), encoding="utf-8")
    place = [f"--backend={case.backend}", f"--device={case.device}"]
    return [*anarcho(["pretrain"]), f"--preset={case.preset}", f"--config={file}", f"--tokenizer={tokenizer}", *place]


def _has_step(metrics: Path) -> bool:
    return metrics.is_file() and any('"kind":"train"' in line for line in metrics.read_text().splitlines())
