"""Two network namespaces as two machines: torchrun's processes meet, train, lose their link, stop with a checkpoint, and go on.

This takes a minute and the right to make namespaces, so it runs where ANARCHO_TWO_NODES is set, as root on Linux.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from anarcho_monitor import read_curve

from .conftest import settings

pytestmark = pytest.mark.skipif(
    "ANARCHO_TWO_NODES" not in os.environ or shutil.which("ip") is None or os.geteuid() != 0,
    reason="makes network namespaces: set ANARCHO_TWO_NODES=1, as root, with iproute2",
)

STEPS, CUT_AFTER, TIMEOUT = 400, 40, 5
LOST = 75
NODES = [("anarcho-a", "anarcho-va", "10.203.7.1"), ("anarcho-b", "anarcho-vb", "10.203.7.2")]
TINY = {
    "tokenizer.vocab_size": 300,
    "model.num_layers": 1,
    "model.dim": 16,
    "model.num_heads": 2,
    "model.hidden_dim": 32,
    "model.context_length": 32,
    "train.steps": STEPS,
    "train.batch_tokens": 256,
    "train.micro_batch": 4,
    "train.eval_every": 100,
    "train.checkpoint_every": 1000,
    "train.log_every": 1,
    "train.precision": "float32",
    "train.rank_timeout_seconds": TIMEOUT,
    "optim.ns_dtype": "float32",
    "sample.max_new_tokens": 1,
    "monitor.tensorboard": "false",
}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def link(state: str) -> None:
    for name, device, _ in NODES:
        ip("-n", name, "link", "set", device, state)


@pytest.fixture
def nodes() -> Iterator[None]:
    """Two namespaces, each with an end of one cable."""
    try:
        for name, _, _ in NODES:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            NODES[0][1],
            "netns",
            NODES[0][0],
            "type",
            "veth",
            "peer",
            "name",
            NODES[1][1],
            "netns",
            NODES[1][0],
        )
        for name, device, address in NODES:
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", "lo", "up")
        link("up")
        yield
    finally:
        for name, _, _ in NODES:
            subprocess.run(["ip", "netns", "delete", name], check=False)


class Nodes:
    """`torchrun` on both machines, in a directory that they share."""

    def __init__(self, directory: Path, arguments: list[object]) -> None:
        self.directory = directory
        self.logs = [directory / f"node-{rank}.txt" for rank in range(len(NODES))]
        self.processes = [self._start(rank, [str(part) for part in arguments]) for rank in range(len(NODES))]

    def _start(self, rank: int, arguments: list[str]) -> subprocess.Popen[bytes]:
        name, device, _ = NODES[rank]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        torchrun += ["--node-rank", str(rank), "--master-addr", NODES[0][2], "--master-port", "29517"]
        with self.logs[rank].open("wb") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", name, *torchrun, "-m", "anarcho_cli", *arguments],
                cwd=self.directory,
                env=os.environ | {"GLOO_SOCKET_IFNAME": device, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def exit_codes(self, *, timeout: float) -> list[int]:
        """Of both torchruns, which must end in this time."""
        until = time.monotonic() + timeout
        try:
            return [process.wait(until - time.monotonic()) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def said(self) -> str:
        """What both have written."""
        return "\n".join(log.read_text() for log in self.logs)


def losses(run: Path) -> dict[int, float]:
    return {step: value for step, *_, value in read_curve(run / "metrics.jsonl", "train", "loss")}


def wait_for_step(run: Path, step: int, nodes: Nodes) -> None:
    until = time.monotonic() + 120
    while not ((run / "metrics.jsonl").exists() and max(losses(run), default=0) >= step):
        assert time.monotonic() < until, nodes.said()
        assert all(process.poll() is None for process in nodes.processes), nodes.said()
        time.sleep(0.1)


def test_a_cut_link_stops_both_machines_with_a_checkpoint_and_they_go_on_when_it_is_mended(nodes, tmp_path):
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghij", k=5)) for _ in range(50)]
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(" ".join(chance.choices(words, k=100)) for _ in range(40)))
    begin: list[object] = ["pretrain", "--device", "cpu", "--data", corpus, *settings(TINY), "--name"]
    run, whole = tmp_path / "runs/cut", tmp_path / "runs/whole"

    first = Nodes(tmp_path, [*begin, "cut"])
    wait_for_step(run, CUT_AFTER, first)
    link("down")
    assert all(first.exit_codes(timeout=10 * TIMEOUT)), first.said()
    assert first.said().count("another process of this run was lost") >= 2, first.said()
    reached = max(losses(run))
    saved = sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))
    assert CUT_AFTER <= reached < STEPS
    assert max(saved, default=0) >= reached - 1, "the state of the last step that both made is saved"

    link("up")
    second = Nodes(tmp_path, ["pretrain", "--resume", run])
    assert second.exit_codes(timeout=180) == [0, 0], second.said()

    alone = subprocess.run(
        [sys.executable, "-m", "anarcho_cli", *map(str, begin), "whole"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 0, alone.stderr
    ours, theirs = losses(run), losses(whole)
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose([ours[step] for step in theirs], [*theirs.values()], atol=1e-3)
