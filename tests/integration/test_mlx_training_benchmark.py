"""The benchmark beside mlx-lm runs and compares like with like."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

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


def test_both_sides_make_steps_that_learn_and_each_job_is_a_row(tmp_path: Path) -> None:
    main = runpy.run_path(str(ROOT / "benchmarks" / "mlx_training.py"))["main"]
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
