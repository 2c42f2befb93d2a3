"""Real runs of the whole command, in processes of their own, on a small text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from anarcho_tokenize import embedded_documents

Run = Callable[..., subprocess.CompletedProcess]

SMALL = {
    "tokenizer.vocab_size": 512,
    "train.steps": 6,
    "train.batch_tokens": 512,
    "train.micro_batch": 1,
    "train.eval_every": 3,
    "train.checkpoint_every": 2,
    "train.log_every": 1,
    "optim.warmup_steps": 2,
    "sample.max_new_tokens": 8,
}
"""The quickstart model in a run of seconds: two sequences a step, six steps."""

LIGHT = "mlx" if find_spec("mlx") else "torch"
"""The framework that loads in a fraction of a second where it is installed: for what both do alike, in a process for each run."""


def settings(values: dict[str, Any]) -> list[str]:
    """The values as ``--set`` options."""
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty real documents as JSON lines, a few hundred kilobytes."""
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    documents = [document for document in embedded_documents() if len(document) < 20_000][:20]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def anarcho() -> Run:
    """Runs ``anarcho`` with the arguments in a process; ``patch`` is Python that is executed first."""

    def run(*arguments: object, cwd: Path, patch: str = "", check: bool = True) -> subprocess.CompletedProcess:
        code = f"{patch}\nimport sys\nsys.argv[0] = 'anarcho'\nfrom anarcho_cli.main import run\nrun()"
        # One thread: two would wait for each other wherever the tests share the cores with something else.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True
        )
        assert not check or result.returncode == 0, result.stderr
        return result

    return run
