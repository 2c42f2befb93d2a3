"""Which framework a command takes, where that is said, and what is refused; nothing is trained here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from anarcho_cli import devices, reference
from anarcho_cli.back_ends.mlx import CACHE_SHARE, memory_limit
from anarcho_cli.config import dumps, resolve
from anarcho_cli.data import RunData
from anarcho_cli.pipeline.command_line import arguments
from anarcho_cli.pipeline.definition import load_pipeline
from anarcho_cli.runs import recorded_place
from anarcho_monitor import MetricsLog
from anarcho_train import ReferenceCache

GIB = 2**30


@pytest.fixture
def plan(anarcho, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The plan of a run with these options."""
    monkeypatch.chdir(tmp_path)

    def plan(*options: object) -> dict[str, Any]:
        result = anarcho("pretrain", "--dry-run", "--json", *options)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return plan


def test_the_option_goes_before_set_which_goes_before_the_file(plan, tmp_path: Path) -> None:
    (tmp_path / "mlx.toml").write_text('backend = "mlx"\n[train]\nsteps = 7\n')
    assert plan()["backend"] == "torch"
    assert plan("-c", "mlx.toml")["backend"] == "mlx"
    assert plan("-c", "mlx.toml")["steps"] == 7
    assert plan("-c", "mlx.toml", "--set", "backend=torch")["backend"] == "torch"
    assert plan("--set", "backend=torch", "--backend", "mlx")["backend"] == "mlx"


def test_the_framework_is_no_part_of_a_runs_configuration() -> None:
    config = resolve(overrides=["backend=mlx"])
    assert config == resolve()
    assert "mlx" not in dumps(config)


def test_a_plan_on_mlx_counts_its_memory_and_not_pytorchs(plan) -> None:
    torch, mlx = plan("--device", "mps"), plan("--device", "mps", "--backend", "mlx")
    assert mlx["memory_bytes"]["libraries"] < torch["memory_bytes"]["libraries"]
    assert mlx["memory_bytes"]["weights"] == torch["memory_bytes"]["weights"]
    assert mlx["memory_bytes"]["vocabulary_chunk"] > torch["memory_bytes"]["vocabulary_chunk"]


@pytest.mark.parametrize("where", ["--set", "file"])
def test_an_unknown_framework_is_refused_where_it_is_named(where: str, refused, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text('backend = "mxl"\n')
    message = refused("pretrain", *(["--set", "backend=mxl"] if where == "--set" else ["-c", "x.toml"]))
    assert "'mxl' (did you mean 'mlx'?); expected one of torch, mlx" in message
    assert ("--set" if where == "--set" else "x.toml") in message


def test_without_mlx_the_run_is_refused_before_anything_is_written(refused, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(devices, "_installed", lambda module: module != "mlx")
    assert "pip install 'anarcho-cli[mlx]'" in refused("pretrain", "--backend", "mlx", "--device", "cpu")
    assert list(tmp_path.iterdir()) == []


def test_a_run_goes_on_where_it_was_and_one_of_the_first_version_with_pytorch(tmp_path: Path) -> None:
    assert recorded_place(tmp_path) == (None, None)
    (tmp_path / "environment.json").write_text(json.dumps({"backend": "mlx", "device": "cpu"}))
    assert recorded_place(tmp_path) == ("mlx", "cpu"), "also of a run that was stopped before it trained"
    for attempt, facts in enumerate([{"device": "mps"}, {"device": "mps", "backend": "mlx"}], start=1):
        log = MetricsLog(tmp_path / "metrics.jsonl", run="run", attempt=attempt)
        log.write("start", step=0, tokens=0, **facts)
        log.close()
        assert recorded_place(tmp_path) == (facts.get("backend", "torch"), "mps")


def test_mlx_stays_below_what_metal_recommends_and_leaves_a_share_elsewhere() -> None:
    apple = {"max_recommended_working_set_size": 11 * GIB, "memory_size": 16 * GIB}
    assert memory_limit(apple, total=16 * GIB) == 11 * GIB
    assert memory_limit(apple, total=8 * GIB) == 8 * GIB, "never more than there is"
    assert memory_limit({"total_memory": 80 * GIB}, total=500 * GIB) == int(0.85 * 80 * GIB)
    assert memory_limit({}, total=10 * GIB) == int(0.85 * 10 * GIB)
    assert 0 < CACHE_SHARE < 1


PIPELINE = """
[[stage]]
name = "vocabulary"
command = "tokenizer"

[[stage]]
name = "base"
command = "pretrain"
from = "vocabulary"
options = { backend = "torch", device = "cpu" }
set.train.steps = 9

[[stage]]
name = "scores"
command = "eval"
from = "base"

[[stage]]
name = "folder"
command = "export"
from = "base"
options = { to = "hf" }
"""


def test_settings_of_a_pipeline_reach_the_stages_that_they_concern(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(PIPELINE)
    known: dict[tuple[str, ...], set[str]] = {
        ("pretrain",): {"backend", "device", "set"},
        ("eval",): {"backend"},
        ("export",): {"to"},
    }
    pipeline = load_pipeline(
        tmp_path / "p.toml",
        options=lambda words: frozenset(known.get(words, {"set"})),
        overrides=["backend=mlx", "train.steps=3", "tokenizer.vocab_size=300"],
    )
    lines = {stage.name: arguments(pipeline, stage, tmp_path) for stage in pipeline.stages}
    assert "--backend=mlx" in lines["base"]
    assert "--backend=torch" not in lines["base"], "it goes before the stage's own"
    assert "train.steps=3" in lines["base"]
    assert "--backend=mlx" in lines["scores"]
    assert not [word for word in lines["folder"] if "backend" in word or "train" in word]
    assert "tokenizer.vocab_size=300" in lines["vocabulary"]
    assert "train.steps=3" not in lines["vocabulary"]
    resumed = arguments(pipeline, pipeline.stages[1], tmp_path, resume=True)
    assert {"--backend=mlx", "--device=cpu"} <= set(resumed)


def test_a_wrong_setting_of_a_pipeline_is_refused(tmp_path: Path, refused) -> None:
    (tmp_path / "p.toml").write_text(PIPELINE)
    assert "train.steps" in refused("pipeline", "run", tmp_path / "p.toml", "--set", "train.stepz=3", "--dry-run")


class OtherStep:
    """A step whose framework computes in float32."""

    precision = "mlx.core.float32"

    def answer_logprobs(self, batch: Any) -> Any:
        raise AssertionError("there is no batch")


@pytest.mark.parametrize("complete", [True, False])
def test_a_reference_stays_with_its_run_in_another_precision_unless_it_is_unfinished(
    complete: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    hashes = {"model": hashlib.sha256(b"weights").hexdigest(), "data": "d", "precision": "bfloat16"}
    kept = ReferenceCache(tmp_path / "reference", hashes=hashes)
    kept.compute([], lambda batch: batch.weights)
    manifest = tmp_path / "reference" / "reference.json"
    manifest.write_text(manifest.read_text().replace('"complete": true', f'"complete": {json.dumps(complete)}'))
    monkeypatch.setattr(reference, "_all_batches", lambda config, shards: iter(()))
    nothing: Any = None
    data = RunData(
        train=nothing,
        validation=None,
        samples_per_step=None,
        samples_per_epoch=None,
        sha256="d",
        facts={},
        release=lambda sample: None,
    )
    step: Any = OtherStep()
    directory = tmp_path / "reference"
    reference.with_reference(data, nothing, step, base=tmp_path, shards=tmp_path, directory=directory)
    found = json.loads(manifest.read_text())["hashes"]["precision"]
    assert found == ("bfloat16" if complete else "float32")
    assert ("computed anew in float32" in capsys.readouterr().err) is not complete
