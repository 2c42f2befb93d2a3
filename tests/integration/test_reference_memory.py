"""The reference model of 137,841,408 parameters learns on a CPU within the memory that was forecast for it."""

from __future__ import annotations

import json
from itertools import islice

import pytest
from anarcho_monitor import read_curve
from anarcho_tokenize import embedded_documents

from .conftest import settings

SHORT = {
    "tokenizer.vocab_size": 1000,
    "model.vocab_size": 32000,
    "data.validation_fraction": 0.002,
    "train.steps": 2,
    "train.sequence_length": 256,
    "train.batch_tokens": 512,
    "train.micro_batch": 1,
    "train.compile": "off",
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.eval_tokens": 256,
    "optim.warmup_steps": 1,
    "sample.max_new_tokens": 2,
}
"""Two steps of two sequences: from the second on, all that a training keeps is there. Most ids are of no piece: learning takes long."""

STOP_BEFORE_TRAINING = "import os\nimport anarcho_cli.compose as compose\ncompose._train = lambda *a, **k: os._exit(0)"

REPORT_PEAK = """
import atexit, resource, sys
unit = 1 if sys.platform == "darwin" else 1024
atexit.register(lambda: print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, file=sys.stderr))
"""


@pytest.mark.slow
def test_the_reference_model_learns_within_the_forecast_memory(anarcho, tmp_path):
    text = "".join(islice((document for document in embedded_documents() if len(document) < 10_000), 20))
    rows = [json.dumps({"text": text[begin : begin + 1000]}) + "\n" for begin in range(0, len(text), 1000)]
    (tmp_path / "text.jsonl").write_text("".join(rows), encoding="utf-8")
    options = ["--preset", "reference-137m", "--device", "cpu", "--data", "text.jsonl", *settings(SHORT)]
    plan = json.loads(anarcho("pretrain", *options, "--dry-run", "--json", cwd=tmp_path).stdout)
    assert plan["parameters"] == 137_841_408
    # The text is prepared by a process of its own, whose memory would hide the training's.
    anarcho("pretrain", *options, "--name", "reference", cwd=tmp_path, patch=STOP_BEFORE_TRAINING)
    run = tmp_path / "runs" / "reference"
    result = anarcho("pretrain", "--resume", run, "--device", "cpu", cwd=tmp_path, patch=REPORT_PEAK)
    peak = int(result.stderr.rpartition("peak ")[2])
    assert peak <= 1.15 * plan["memory_bytes"]["total"]
    losses = read_curve(run / "metrics.jsonl", "train", "loss")
    assert losses[0].value == pytest.approx(10.4, abs=0.3)
    assert losses[-1].value < losses[0].value - 0.3
