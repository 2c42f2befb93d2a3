"""The command line of `anarcho pretrain`, before and after the training itself."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import anarcho_cli
import pytest
from anarcho_cli import devices
from anarcho_cli.config import resolve
from anarcho_cli.diagnostics import Diagnostics
from anarcho_cli.runs import RunError, new_run_directory
from anarcho_monitor import MetricsLog


@dataclass
class Summary:
    """What a training reports."""

    run_directory: Path
    validation_loss: float | None = 2.0
    bits_per_byte: float | None = 1.25
    sample: str = "The whale\x1b[2J swam"
    steps: int = 3
    tokens: int = 768
    seconds: float = 1.5
    exit_code: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"run_directory": str(self.run_directory)}


class Composer:
    """Stands in for the training; records what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.exit_code = 0

    def train(self, config: Any, **options: Any) -> Summary:
        self.calls.append({"config": config, **options})
        return Summary(options["run_directory"], exit_code=self.exit_code)

    def resume(self, run_directory: Path, **options: Any) -> Summary:
        self.calls.append({"run_directory": run_directory, **options})
        return Summary(run_directory, exit_code=self.exit_code)


@pytest.fixture
def composer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Composer:
    """The stand-in for the training, with an empty working directory."""
    monkeypatch.chdir(tmp_path)
    stand_in = Composer()
    module: Any = types.ModuleType("anarcho_cli.compose")
    module.train, module.resume = stand_in.train, stand_in.resume
    monkeypatch.setitem(sys.modules, "anarcho_cli.compose", module)
    monkeypatch.setattr(anarcho_cli, "compose", module, raising=False)
    return stand_in


def test_without_an_option_it_trains_the_quickstart_on_the_embedded_corpus(composer: Composer, anarcho) -> None:
    result = anarcho("pretrain", "--device", "cpu")
    assert result.exit_code == 0, result.output
    (call,) = composer.calls
    assert call["config"].data.source == "embedded"
    assert call["config"] == resolve(preset="quickstart")
    assert call["tokenizer_path"] is None
    assert call["run_directory"].parent == Path("runs")
    assert call["run_directory"].name.startswith("quickstart-2")


def test_standard_output_is_the_run_directory_and_nothing_else(composer: Composer, anarcho) -> None:
    result = anarcho("pretrain", "--device", "cpu", "--name", "first")
    assert result.stdout == f"{Path('runs/first')}\n"
    assert "1.2500 bits per byte" in result.stderr
    assert "The whale" not in result.stderr, "the progress display has shown the sample already"


def test_json_prints_the_summary_object(composer: Composer, anarcho) -> None:
    summary = json.loads(anarcho("pretrain", "--device", "cpu", "--name", "first", "--json").stdout)
    assert summary["run_directory"] == str(Path("runs/first"))
    assert summary["bits_per_byte"] == 1.25


def test_options_become_settings(composer: Composer, anarcho, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("[train]\nsteps = 9\n")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.txt").write_text("a text")
    arguments = ["--preset", "small-15m", "-c", "my.toml", "--set", "train.seed=4", "--data", "x/*.txt"]
    anarcho("pretrain", *arguments, "--name", "n", "--runs-dir", "elsewhere", "--device", "cpu")
    (call,) = composer.calls
    config = call["config"]
    assert config.model == resolve(preset="small-15m").model
    assert (config.train.steps, config.train.seed, config.data.source) == (9, 4, "x/*.txt")
    assert call["run_directory"] == Path("elsewhere/n")
    assert call["device"] == "cpu"


def test_a_given_tokenizer_decides_the_vocabulary(composer: Composer, anarcho, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the whale and the sea and the ship " * 200)
    made = anarcho("tokenizer", "train", "t.txt", "--vocab-size", 280, "--out", "tok")
    assert made.exit_code == 0, made.output
    assert anarcho("pretrain", "--tokenizer", "tok", "--device", "cpu").exit_code == 0
    (call,) = composer.calls
    assert call["tokenizer_path"] == Path("tok")
    assert call["config"].tokenizer.vocab_size == call["config"].model.vocab_size == 280


@pytest.mark.parametrize("status", [130, 143])
def test_a_stop_by_signal_is_reported_with_how_to_go_on(status: int, composer: Composer, anarcho) -> None:
    composer.exit_code = status
    result = anarcho("pretrain", "--device", "cpu", "--name", "first")
    assert result.exit_code == status
    assert f"--resume {Path('runs/first')}" in result.stderr
    assert result.stdout.splitlines()[-1] == str(Path("runs/first"))


def test_resume_continues_the_run_and_takes_the_device(composer: Composer, anarcho, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").touch()
    (tmp_path / "run" / "environment.json").touch()
    assert anarcho("pretrain", "--resume", "run", "--device", "cpu").stdout == "run\n"
    unchanged = {"overrides": [], "allow_changes": False, "diagnostics": Diagnostics()}
    (call,) = composer.calls
    assert call.pop("ranks").size == 1
    assert call == {"run_directory": Path("run"), "backend": "torch", "device": "cpu", **unchanged}


def test_resume_without_a_device_goes_on_where_the_run_was(composer: Composer, anarcho, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").touch()
    (tmp_path / "run" / "environment.json").touch()
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl", run="run", attempt=1)
    log.write("start", step=0, tokens=0, device="cuda")
    log.close()
    asked = []
    find = partial(devices.resolve_device, find=lambda: devices.Accelerators(cuda=("H100",)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "resolve_device", lambda wanted, **options: asked.append(wanted) or find(wanted))
        assert anarcho("pretrain", "--resume", "run").exit_code == 0
        assert anarcho("pretrain", "--resume", "run", "--device", "cpu").exit_code == 0
    assert asked == ["cuda", "cpu"], "the run's own device, unless another is given"
    assert [call["device"] for call in composer.calls] == ["cuda", "cpu"]


def test_a_dry_run_prints_the_plan_and_starts_nothing(composer: Composer, anarcho, tmp_path: Path) -> None:
    arguments = ["pretrain", "--preset", "reference-137m", "--dry-run"]
    result = anarcho(*arguments)
    assert result.exit_code == 0, result.output
    tokens = resolve(preset="reference-137m").total_tokens
    for part in ("[model]", "137,841,408", f"{tokens:,}", "memory", "FLOPs"):
        assert part in result.stdout
    assert composer.calls == []
    assert list(tmp_path.iterdir()) == []


def test_the_plan_counts_what_the_run_will_do(composer: Composer, anarcho) -> None:
    def plan(*options: str) -> dict[str, Any]:
        return json.loads(anarcho("pretrain", "--preset", "reference-137m", "--dry-run", "--json", *options).stdout)

    cpu = plan("--set", "train.precision=float32")
    assert cpu["parameters"] == 137_841_408
    assert cpu["tokens"] == cpu["steps"] * cpu["batch_sequences"] * cpu["config"]["train"]["sequence_length"]
    # 6 FLOPs a parameter and token are the least; attention over 4096 tokens and the output layer add to that.
    assert 6 * cpu["parameters"] * cpu["tokens"] < cpu["flops"] < 12 * cpu["parameters"] * cpu["tokens"]
    assert cpu["memory_bytes"]["weights"] == 4 * 137_841_408
    assert cpu["memory_bytes"]["total"] > 3 * cpu["memory_bytes"]["weights"]
    half = plan("--device", "cuda")
    assert (cpu["dtype_bytes"], half["dtype_bytes"]) == (4, 2)
    assert half["memory_bytes"]["activations"] < cpu["memory_bytes"]["activations"]
    leaner = plan("--device", "cuda", "--set", "train.gradient_checkpointing=true")
    assert leaner["memory_bytes"]["total"] < half["memory_bytes"]["total"]


def test_a_dry_run_loads_no_framework() -> None:
    program = (
        "import sys\nfrom anarcho_cli.main import app\n"
        "try: app(['pretrain', '--dry-run'])\n"
        "except SystemExit as stop: assert not stop.code, stop\n"
        "assert not {'torch', 'mlx'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "option",
    [
        ["--preset", "quickstart"],
        ["--name", "x"],
        ["--data", "x"],
        ["--dry-run"],
        ["-c", "x.toml"],
        ["--runs-dir", "runs"],
    ],
)
def test_resume_refuses_what_would_change_the_run(option: list[str], composer: Composer, refused, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").touch()
    (tmp_path / "run" / "environment.json").touch()
    assert "cannot go with --resume" in refused("pretrain", "--resume", "run", *option)
    assert composer.calls == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--preset", "quickstrat"], ["quickstrat", "did you mean 'quickstart'?"]),
        (["-c", "absent.toml"], ["absent.toml"]),
        (["-c", "."], ["directory"]),
        (["--set", "train.stepz=1"], ["train.stepz", "train.steps"]),
        (["--set", "train.steps=many"], ["train.steps", "many", "whole number"]),
        (["--set", "train.steps"], ["section.key=value"]),
        (["--set", "model.dim=256", "--set", "model.num_heads=3"], ["model.num_heads", "256"]),
        (["--set", "model.head_dim=5"], ["model.head_dim", "even"]),
        (
            ["--set", "train.sequence_length=512", "--set", "model.context_length=256"],
            ["train.sequence_length", "512", "model.context_length", "256"],
        ),
        (["--tokenizer", "absent"], ["absent"]),
        (["--data", "absent.txt"], ["absent.txt"]),
        (["--data", "absent/*.txt"], ["absent/*.txt"]),
        (["--data", "runs"], ["runs", "no text"]),
        (["--name", "../x"], ["--name", "../x"]),
        (["--name", ".hidden"], ["--name", ".hidden"]),
        (["--name", ""], ["--name"]),
        (["--resume", "absent"], ["absent"]),
        (["--resume", "."], ["config.toml"]),
        (["--allow-changes"], ["--allow-changes", "--resume"]),
        (["--runs-dir", "a-file"], ["a-file", "expected a directory"]),
        (["--name", "taken"], ["taken", "exists already", "--resume"]),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    arguments: list[str], parts: list[str], composer: Composer, refused, tmp_path: Path
) -> None:
    (tmp_path / "a-file").touch()
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    message = refused("pretrain", "--device", "cpu", *arguments)
    assert all(part in message for part in parts), message
    assert composer.calls == []
    assert sorted(tmp_path.rglob("*")) == before


def test_a_device_that_is_not_there_is_refused(
    composer: Composer, refused, anarcho, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = partial(devices.resolve_device, find=devices.Accelerators)
    monkeypatch.setattr(devices, "resolve_device", bare)
    for device in ("mps", "cuda"):
        assert f"--device {device}" in refused("pretrain", "--device", device)
    assert composer.calls == []
    result = anarcho("pretrain", "--device", "auto")
    assert "so the CPU does the work" in result.stderr
    assert composer.calls[0]["device"] == "cpu"


def test_runs_that_start_within_one_second_get_different_names(tmp_path: Path) -> None:
    now = datetime(2026, 1, 2, 3, 4, 5)
    names = []
    for _ in range(3):
        directory = new_run_directory(tmp_path, None, preset="quickstart", now=now)
        directory.mkdir()
        names.append(directory.name)
    assert names == ["quickstart-20260102-030405", "quickstart-20260102-030405-2", "quickstart-20260102-030405-3"]


@pytest.mark.parametrize("name", ["a/b", "..", "-x", "a b", "a\n", "é", "x" * 101])
def test_a_name_that_is_no_plain_folder_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run name"):
        new_run_directory(tmp_path, name, preset="quickstart")


@pytest.mark.parametrize("name", ["a", "run-1", "v1.2_x", "0"])
def test_a_plain_folder_name_is_taken_as_it_is(name: str, tmp_path: Path) -> None:
    assert new_run_directory(tmp_path, name, preset="quickstart") == tmp_path / name
