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
        [sys.executable, *command], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    # Threads of gloo that outlive the work sometimes abort a process at its exit, whatever the optimizer; all has been printed by then.
    aborted_at_exit = "terminate called without an active exception" in finished.stderr and "final" in finished.stdout
    assert finished.returncode == 0 or aborted_at_exit, finished.stderr
    return finished.stdout


def final_loss(output: str) -> float:
    return float(re.search(r"^final loss ([\d.]+)$", output, re.MULTILINE)[1])


ONE_AFTER_ANOTHER = """
import os, runpy, sys

for number, (script, *arguments) in enumerate({scripts}):
    if os.environ["RANK"] == "0":
        print("running", os.path.basename(script), flush=True)
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # Ranks meet at a place of their own for each.
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The folder in which torchrun has run the distributed examples, and what each has printed: loading torch is most of their time."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("launched")
    scripts = [[str(EXAMPLES / "optim_ddp.py")], [str(EXAMPLES / "optim_fsdp.py"), "checkpoint"]]
    (folder / "both.py").write_text(ONE_AFTER_ANOTHER.format(scripts=scripts))
    output = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "both.py", cwd=folder)
    return folder, dict(part.split("\n", 1) for part in output.split("running ")[1:])


@pytest.mark.parametrize("script", ["optim_torch.py", "optim_mlx.py"])
def test_a_small_transformer_learns_and_resumes_exactly(script, tmp_path):
    pytest.importorskip({"optim_torch.py": "torch", "optim_mlx.py": "mlx.core"}[script])
    output = run(str(EXAMPLES / script), cwd=tmp_path)
    assert final_loss(output) < 0.3
    assert "muon" in output


def test_two_replicas_learn_and_stay_equal(launched):
    _, outputs = launched
    assert final_loss(outputs["optim_ddp.py"]) < 0.1


def test_two_ranks_of_shards_learn_and_resume_from_a_distributed_checkpoint(launched):
    folder, outputs = launched
    output = outputs["optim_fsdp.py"]
    uninterrupted, resumed = re.search(r"after 30 ([\d.]+), resumed ([\d.]+)", output).groups()
    assert uninterrupted == resumed
    assert final_loss(output) < 0.1
    assert list((folder / "checkpoint").glob("*.distcp"))
