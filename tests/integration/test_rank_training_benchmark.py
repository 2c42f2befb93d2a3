"""The benchmark over several processes counts the tokens of all, compares with one process, and goes on where a case fails."""

from __future__ import annotations

import importlib
import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from . import torch_launched

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
rank_training: Any = importlib.import_module("rank_training")

AS_STARTED = """
import os, rank_training
rank_training.torch.set_num_threads(1)
for numbers, given in jobs:
    os.environ |= numbers | own
    rank_training.rank(given)
"""
"""What a process does that torchrun has started, for one job after the other."""
SHAPE = ["--device", "cpu", "--vocabulary", "64", "--context", "16", "--steps", "2", "--compile", "off"]
SMALL = [*SHAPE, "--layers", "1", "--dim", "64", "--fsdp-layers", "1", "--fsdp-dim", "64", "--micro-batch", "1"]


def test_rates_are_of_all_processes_and_a_case_that_fails_is_a_row_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launched(order: Any, options: Any) -> dict[str, Any]:
        if order.case == "peer":
            return {"error": "RuntimeError: no"}
        return {"seconds": 1.0 if order.processes == 1 else 1.25, "peak": 2e9, "warm s": 1.0}

    monkeypatch.setattr(rank_training, "launched", launched)
    monkeypatch.setattr(rank_training, "in_process", lambda function, device: 1e12)
    files = ["--json", str(tmp_path / "rows.jsonl"), "--markdown", str(tmp_path / "table.md")]
    rows = rank_training.main([*SMALL, "--processes", "1", "2", "--batch", "3", *files])
    assert rows == [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len((tmp_path / "table.md").read_text().splitlines()) == 2 + len(rows)
    whole, failed, shards = rows[:2], rows[2:4], rows[4:]
    assert [row["tokens/s"] for row in whole] == [3 * 16, round(2 * 3 * 16 / 1.25)]
    assert [row["tokens/s"] for row in shards] == [4 * 16, round(2 * 4 * 16 / 1.25)], "four micro-batches of each"
    assert [row["efficiency"] for row in (*whole, *shards)] == [1.0, 0.8] * 2
    assert [row["error"] for row in failed] == ["RuntimeError: no"] * 2
    assert not any("tokens/s" in row for row in failed)


def test_processes_share_a_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_training, "launched", lambda order, options: {"seconds": 1, "peak": 0, "warm s": 0})
    monkeypatch.setattr(rank_training, "in_process", lambda function, device: 1e12)
    arguments = [*SMALL, "--case", "ddp", "--global-batch", "4"]
    rows = rank_training.main([*arguments, "--processes", "1", "2"])
    assert [(row["sequences"], row["at once"]) for row in rows] == [(4, 4), (4, 2)]
    with pytest.raises(SystemExit, match="a multiple of 3"):
        rank_training.main([*arguments, "--processes", "3"])


def test_two_processes_measure_each_case_together(tmp_path: Path) -> None:
    options = rank_training._options([*SMALL, "--processes", "2", "--case", "ddp", "fsdp", "--micro-batches", "2"])
    jobs = []
    for order in rank_training._orders(options):
        (tmp_path / order.case).mkdir()
        given = rank_training.told(order, options) | {"directory": str(tmp_path / order.case)}
        with socket.create_server(("127.0.0.1", 0)) as free:
            numbers = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        jobs.append((numbers, given))
    torch_launched._start_server()
    # By a text: pytest alone knows this module by a name.
    told = [{"jobs": jobs, "own": {"RANK": str(rank), "LOCAL_RANK": str(rank)}} for rank in range(2)]
    processes = [torch_launched._SERVER.Process(target=exec, args=(AS_STARTED, given)) for given in told]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0], [p.read_text() for p in tmp_path.glob("*/error-*")]
    for case in ("ddp", "fsdp"):
        assert json.loads((tmp_path / case / "result").read_text())["seconds"] > 0
