"""Runs as files, without any training: for what reads runs from outside."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CONFIG = '[data]\nkind = "text"\n\n[train]\nsteps = 40\nseed = 0\n\n[optim]\nlr = 0.02\n'


def entry(kind: str, step: int, *, attempt: int = 1, t: float | None = None, **values: Any) -> dict[str, Any]:
    seconds = float(step if t is None else t)
    own = {"v": 1, "run": "moby", "attempt": attempt, "t_wall": 1.7e9 + seconds, "t_mono": seconds}
    return own | {"kind": kind, "step": step, "tokens": 100 * step} | values


def usual_records(*, steps: int = 40) -> list[dict[str, Any]]:
    """A run that was killed after step 24, went on after step 20, left an update out, and ended."""
    records = [entry("start", 0, device="cpu", backend="torch", precision="float32", parameters=1234567)]
    records += [training(step) for step in range(2, 25, 2)]
    records.insert(6, entry("validation", 10, loss=5.5, bits_per_byte=1.9))
    records.insert(7, entry("checkpoint", 10, path="step-00000010", seconds=0.5))
    records += [entry("start", 20, attempt=2, t=100, device="cpu", backend="torch", precision="float32")]
    records += [training(step, attempt=2, t=100 + step) for step in range(22, steps + 1, 2)]
    records += [
        entry("event", steps, attempt=2, t=200, message="no update at step 40: loss nan"),
        entry("validation", steps, attempt=2, t=200, loss=4.25, bits_per_byte=1.5),
        entry("sample", steps, attempt=2, t=201, text="The whale,\nsaid he."),
        entry("end", steps, attempt=2, t=202, seconds=102.0),
    ]
    return records


def training(step: int, **options: Any) -> dict[str, Any]:
    values = {"loss": 8 - step / 10, "loss_max": 8.5 - step / 10, "grad_norm": 1.0, "lr_matrices": 0.02}
    speed = {"tokens_per_second": 2000.0, "data_wait_share": 0.01, "eta_seconds": 40.0 - step}
    return entry("train", step, **options, **values, **speed, process_bytes=2**31, reserved_bytes=2**31)


def write_run(
    directory: Path, records: Iterable[dict[str, Any]] | None = None, *, config: str | None = CONFIG, torn: str = ""
) -> Path:
    """A run directory with these records; ``torn`` is what a killed process left of its last line."""
    directory.mkdir(parents=True)
    lines = [json.dumps(record) + "\n" for record in (usual_records() if records is None else records)]
    (directory / "metrics.jsonl").write_text("".join(lines) + torn, encoding="utf-8")
    if config is not None:
        (directory / "config.toml").write_text(config, encoding="utf-8")
    (directory / "environment.json").write_text(json.dumps({"machine": "x86_64", "python": "3.11.7"}), encoding="utf-8")
    return directory
