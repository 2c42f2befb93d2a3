"""The scripts in `examples/` that are about the optimizer run and learn; those for torchrun on two processes of this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# Tiny tensors, and two processes on two cores: more threads would only wait for each other.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*command: str, cwd: Path) -> str:
    """What the command of this Python prints."""
    finished = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    # Threads of gloo that outlive the work sometimes abort a process at its exit, whatever the optimizer; all has been printed by then.
    aborted_at_exit = "terminate called without an active exception" in finished.stderr and "final" in finished.stdout
    assert finished.returncode == 0 or aborted_at_exit, finished.stderr
    return finished.stdout


def final_loss(output: str) -> float:
    return float(re.search(r"^final loss ([\d.]+)$", output, re.MULTILINE)[1])


@pytest.mark.parametrize("script", ["optim_torch.py", "optim_mlx.py"])
def test_a_small_transformer_learns_and_resumes_exactly(script, tmp_path):
    pytest.importorskip({"optim_torch.py": "torch", "optim_mlx.py": "mlx.core"}[script])
    output = run(str(EXAMPLES / script), cwd=tmp_path)
    assert final_loss(output) < 0.3
    assert "muon" in output


def launch(script: str, *arguments: str, cwd: Path) -> str:
    """What the script prints when torchrun has two processes run it."""
    pytest.importorskip("torch")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return run(*torchrun, str(EXAMPLES / script), *arguments, cwd=cwd)


def test_two_replicas_learn_and_stay_equal(tmp_path):
    assert final_loss(launch("optim_ddp.py", cwd=tmp_path)) < 0.1


def test_two_ranks_of_shards_learn_and_resume_from_a_distributed_checkpoint(tmp_path):
    output = launch("optim_fsdp.py", "checkpoint", cwd=tmp_path)
    uninterrupted, resumed = re.search(r"after 30 ([\d.]+), resumed ([\d.]+)", output).groups()
    assert uninterrupted == resumed
    assert final_loss(output) < 0.1
    assert list((tmp_path / "checkpoint").glob("*.distcp"))
