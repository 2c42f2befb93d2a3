"""The benchmark beside mlx-lm runs and compares like with like."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm")

ROOT = Path(__file__).parents[2]
SHAPE = [
    "--layers",
    "1",
    "--dim",
    "32",
    "--heads",
    "2",
    "--vocabulary",
    "64",
    "--precision",
    "float32",
    "--steps",
    "3",
    "--rounds",
    "1",
    "--device",
    "cpu",
]


class Here:
    """In place of the processes, whose start takes longer than what they would do."""

    def __init__(self, processes: int, *, mp_context: Any) -> None: ...

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*arguments))
        return future


def test_both_sides_make_steps_that_learn_and_each_job_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("MLX_MAX_MB_PER_BUFFER", "50")
    import mlx_training

    monkeypatch.setattr(mlx_training, "ProcessPoolExecutor", Here)
    monkeypatch.delitem(sys.modules, "mlx_training")
    main = mlx_training.main
    files = ["--json", str(tmp_path / "rows.jsonl"), "--markdown", str(tmp_path / "table.md")]
    rows = main(["16:2:muon", "16:2:adamw", *SHAPE, *files])
    assert rows == [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["optimizer"] for row in rows] == ["muon", "adamw"]
    assert len((tmp_path / "table.md").read_text().splitlines()) == 2 + len(rows)
    for row in rows:
        for side in ("ours", "mlx-lm"):
            first, last = row[f"{side}: losses"]
            assert last < first
            assert row[f"{side}: tokens/s"] > 0
            assert row[f"{side}: GB"] > 0
