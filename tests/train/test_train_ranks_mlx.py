"""Several MLX processes make the update of one, agree on it to the last bit, and none outlives another that is killed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("mlx.core")

import mlx.core as mx
from anarcho_train import RankLost
from anarcho_train.steps import mlx_ranks

from .conftest import CountingText

pytestmark = pytest.mark.skipif(
    not mx.distributed.is_available("ring"), reason="this MLX has no ring to connect processes"
)


def rows(count: int = 8) -> dict[str, np.ndarray]:
    batch = CountingText().rows(range(count))
    return {"tokens": batch.tokens, "targets": batch.targets, "weights": batch.weights}


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def start(directory: Path, mode: str = "", *, count: int = 2) -> list[subprocess.Popen]:
    """``count`` ranks on this machine, told of each other as ``mlx.launch`` does."""
    directory.mkdir()
    np.savez(directory / "rows.npz", **rows())
    hosts = directory / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(count)]))
    script = Path(__file__).with_name("mlx_rank.py")
    return [
        subprocess.Popen(
            [sys.executable, str(script), str(directory), *filter(None, [mode])],
            env=os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def outcome(directory: Path, rank: int) -> tuple[dict[str, mx.array], list[dict]]:
    """The weights and the metrics that a rank left."""
    return mx.load(str(directory / f"rank-{rank}.safetensors")), json.loads(
        (directory / f"rank-{rank}.json").read_text()
    )


def test_two_ranks_make_the_updates_of_one_noise_and_skipped_steps_included(tmp_path):
    for process in start(tmp_path / "two") + start(tmp_path / "one", "alone", count=1):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    (weights, metrics), other = outcome(tmp_path / "two", 0), outcome(tmp_path / "two", 1)
    expected_weights, expected = outcome(tmp_path / "one", 0)
    assert repr(metrics) == repr(other[1])
    assert [m["skipped"] for m in metrics] == [False, False, True, False]
    for ours, theirs in zip(metrics, expected, strict=True):
        for name in ("loss", "weight", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, nan_ok=True), name
    for name, value in expected_weights.items():
        assert mx.array_equal(weights[name], other[0][name])
        np.testing.assert_allclose(weights[name], value, atol=1e-5)


def test_a_rank_that_is_killed_ends_the_other_with_one_sentence(tmp_path):
    survivor, killed = start(tmp_path / "lost", "lost")
    killed.communicate(timeout=60)
    _, errors = survivor.communicate(timeout=30)
    assert survivor.returncode == 1
    assert "RankLost: another process of this run was lost" in errors
    assert "start all of them again" in errors


def test_an_exchange_without_an_answer_ends_after_the_timeout_and_every_later_one_at_once():
    two = SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    ranks = mlx_ranks.MlxRanks(two, timeout_seconds=0.2)
    never = threading.Event()
    began = time.monotonic()
    with pytest.raises(RankLost, match=r"did not answer for 0\.2 seconds"):
        ranks._result(never.wait)
    with pytest.raises(RankLost):
        ranks.gathered([1.0])
    assert time.monotonic() - began < 5
    assert mx.array([1.0, 2.0]).sum().item() == 3, "what this thread computes does not wait for the one that is stuck"
    never.set()


def test_gradients_travel_in_few_buckets_that_hold_everything_once(monkeypatch):
    monkeypatch.setattr(mlx_ranks, "BUCKET_BYTES", 100)
    buckets = list(mlx_ranks._buckets({"a": 60, "b": 60, "c": 400, "d": 8, "e": 8}))
    assert buckets == [["a", "b"], ["c"], ["d", "e"]]
