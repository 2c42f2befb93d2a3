"""A pipeline whose every stage is killed once, at a random moment, ends with what an uninterrupted one makes, bit for bit.

Without ANARCHO_PIPELINE_KILLS the pipeline ends with its first training, and each stage is killed once; with it, the pipeline
goes on to an exported model, and each stage is killed so many times. ANARCHO_PIPELINE_SEED draws other moments.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from anarcho_tokenize.corpus import embedded_rows

from .conftest import LIGHT

WHOLE_CHAIN = "ANARCHO_PIPELINE_KILLS" in os.environ
KILLS = int(os.environ.get("ANARCHO_PIPELINE_KILLS", "1"))
SEED = int(os.environ.get("ANARCHO_PIPELINE_SEED", "0"))
PATIENCE_SECONDS = 120

STEPS = "set.train = { steps = 4, batch_tokens = 256, micro_batch = 1, eval_every = 2, checkpoint_every = 1, log_every = 1 }"
SMALL = f"options.backend = '{LIGHT}'\noptions.device = 'cpu'\nset.sample.max_new_tokens = 2\nset.optim.warmup_steps = 1\n{STEPS}\n"
CHAIN = f"""
[[stage]]
name = "vocabulary"
command = "tokenizer"
data = "text.jsonl"
options = {{ vocab_size = 400 }}

[[stage]]
name = "shards"
command = "prepare"
from = "vocabulary"
data = "text.jsonl"

[[stage]]
name = "base"
command = "pretrain"
from = "vocabulary"
data = "text.jsonl"
set.model = {{ num_layers = 1, dim = 32, num_heads = 2, hidden_dim = 64, context_length = 128 }}
{SMALL}
[[stage]]
name = "chat"
command = "sft"
from = "base"
data = "chat.jsonl"
set.data.validation_fraction = 0.2
{SMALL}
[[stage]]
name = "aligned"
command = "preference"
from = "chat"
data = "preference.jsonl"
set.data.validation_fraction = 0.2
{SMALL}
[[stage]]
name = "scores"
command = "eval"
from = ["base", "aligned"]
options = {{ task = "preference.jsonl", limit = 4, chat = true, compare = true, device = "cpu" }}

[[stage]]
name = "folder"
command = "export"
from = "aligned"
options = {{ to = "hf" }}
"""
TRAININGS = ("base", "chat", "aligned")
NAMES = ["vocabulary", "shards", "base", "chat", "aligned", "scores", "folder"][: None if WHOLE_CHAIN else 3]
TRIAL = "chat runs/chain/folder" if WHOLE_CHAIN else "generate runs/chain/base 'It was'"


class Chain:
    """The pipeline in a folder of its own, as a process."""

    def __init__(self, folder: Path, small_text: Path) -> None:
        self.folder = folder
        folder.mkdir()
        tables = CHAIN.split("[[stage]]")[1 : 1 + len(NAMES)]
        (folder / "chain.toml").write_text("".join(f"[[stage]]{table}" for table in tables))
        (folder / "text.jsonl").write_bytes(b"".join(small_text.read_bytes().splitlines(keepends=True)[:6]))
        for kind in ("chat", "preference"):
            rows = lzma.decompress(embedded_rows(kind)).splitlines(keepends=True)[:24]
            (folder / f"{kind}.jsonl").write_bytes(b"".join(rows))

    def start(self) -> subprocess.Popen[bytes]:
        # One thread: two would wait for each other wherever the tests share the cores with something else.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (self.folder / "log").open("ab") as log:
            command = [sys.executable, "-m", "anarcho_cli", "pipeline", "run", "chain.toml"]
            return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)

    def finish(self) -> None:
        status = self.start().wait(timeout=5 * PATIENCE_SECONDS)
        assert status == 0, self.log()

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def stages(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / "runs/chain/state.json").read_text())["stages"]
        except FileNotFoundError:
            return {}

    def kill_in(self, stage: str, *, after: float) -> None:
        """Start it, and kill the pipeline with its stage so many seconds after the stage, or its training, has begun."""
        process, deadline = self.start(), time.monotonic() + PATIENCE_SECONDS
        while not self.has_begun(stage):
            assert process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.005)
        time.sleep(after)
        process.kill()
        process.wait()
        # The pipeline may have begun the next stage meanwhile.
        for left in self.stages().values():
            if left["status"] == "running" and left["process"] is not None and psutil.pid_exists(left["process"]):
                os.kill(left["process"], signal.SIGKILL)
                while psutil.pid_exists(left["process"]) and alive(left["process"]):
                    time.sleep(0.005)

    def has_begun(self, stage: str) -> bool:
        """Whether the stage runs; of a training, whether it has come to a step."""
        if self.stages().get(stage, {}).get("process") is None:
            return False
        metrics = self.folder / "runs/chain" / stage / "metrics.jsonl"
        return stage not in TRAININGS or (metrics.exists() and '"train"' in metrics.read_text())

    def seconds(self, stage: str) -> float:
        """How long a stage took, of a training from its first step on: what comes before is killed in other tests."""
        if stage not in TRAININGS:
            return self.stages()[stage]["seconds"]
        lines = (self.folder / "runs/chain" / stage / "metrics.jsonl").read_text().splitlines()
        times = [record["t_wall"] for record in map(json.loads, lines) if record["kind"] != "start"]
        return times[-1] - times[0]

    def made(self) -> dict[str, str]:
        """File -> hash of all that a model, an optimizer's state, a tokenizer, shards or scores consist of."""
        root = self.folder / "runs/chain"
        names = ("*.safetensors", "*.bin", "*.idx", "tokenizer.*", "report.json")
        files = sorted({file for name in names for file in root.rglob(name) if ".old-" not in str(file)})
        return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def alive(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def whole(small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The pipeline that nothing interrupted."""
    chain = Chain(tmp_path_factory.mktemp("whole") / "it", small_text)
    chain.finish()
    return chain


def test_a_pipeline_killed_in_every_stage_makes_the_same_files_bit_for_bit(
    whole: Chain, small_text: Path, tmp_path: Path
) -> None:
    chance, chain = random.Random(SEED), Chain(tmp_path / "it", small_text)
    for name in NAMES:
        for _ in range(KILLS):
            chain.kill_in(name, after=chance.uniform(0, 0.9) * whole.seconds(name))
            if chain.stages()[name]["status"] == "complete":  # The kill came too late.
                break
    chain.finish()
    assert list(chain.stages()) == NAMES
    assert {record["status"] for record in chain.stages().values()} == {"complete"}
    assert "resume, was interrupted" in chain.log()
    made, expected = chain.made(), whole.made()
    assert made.keys() == expected.keys()
    assert {name for name in made if made[name] != expected[name]} == set()


def test_what_is_complete_is_left_alone_and_says_how_to_try_the_model(whole: Chain) -> None:
    before = whole.made()
    (whole.folder / "log").unlink()
    whole.finish()
    assert whole.log().count("skip, nothing changed") == len(NAMES)
    assert f"done: 0 stages run, {len(NAMES)} skipped" in whole.log()
    assert f"try the model with anarcho {TRIAL}" in whole.log()
    assert whole.made() == before
