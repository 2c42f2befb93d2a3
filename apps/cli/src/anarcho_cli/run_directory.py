"""A run's directory: what is where in it, how it begins, and that one process at a time works there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anarcho_tokenize import load_tokenizer
from anarcho_train import lock_run

from anarcho_cli import config as configuration
from anarcho_cli.config import RunConfig
from anarcho_cli.diagnosis import processor_facts, system_facts
from anarcho_cli.models import WEIGHTS

CONFIG_FILE = "config.toml"
ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"
TOKENIZER = "tokenizer"
DATA = "data"
BASE = "base"
REFERENCE = "reference"


def create_run(
    run_directory: Path,
    config: RunConfig,
    tokenizer_path: Path | None,
    base: Path | None,
    *,
    backend: str,
    device: str,
) -> None:
    """Makes the directory of a new run under another name and renames it, so that a run is never half begun."""
    if run_directory.exists():
        raise FileExistsError(
            f"the run {run_directory} exists already; choose another --name, or continue it with --resume {run_directory}"
        )
    staging = run_directory.with_name(f".{run_directory.name}.partial-{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        (staging / CONFIG_FILE).write_text(configuration.dumps(config), encoding="utf-8")
        environment = {"backend": backend, "device": device, **system_facts(), "processor": processor_facts()}
        (staging / ENVIRONMENT_FILE).write_text(json.dumps(environment, indent=1) + "\n", encoding="utf-8")
        if tokenizer_path is not None:
            load_tokenizer(tokenizer_path).save(staging / TOKENIZER)
        if base is not None:
            _keep_base(base, staging / BASE)
        staging.rename(run_directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _keep_base(base: Path, directory: Path) -> None:
    """Links the base model's files into the run, or copies them, so that it can begin anew when they are gone elsewhere."""
    directory.mkdir()
    for name in (WEIGHTS, "config.json"):
        try:
            (directory / name).hardlink_to(base / name)
        except OSError:
            shutil.copyfile(base / name, directory / name)


@contextmanager
def locked(run_directory: Path) -> Iterator[None]:
    """Holds the lock of the run."""
    lock = lock_run(run_directory)
    try:
        yield
    finally:
        lock.release()
