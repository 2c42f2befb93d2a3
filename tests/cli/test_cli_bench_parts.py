"""The parts of a run that are measured beside its training steps: the optimizer's update, the way of the data, and the start."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from anarcho_cli.benching import feeding, starting, updating
from anarcho_cli.benching.cases import Case, Kind
from anarcho_cli.benching.measurement import measure
from anarcho_cli.benching.processes import run_cases
from anarcho_cli.benching.report import print_report
from anarcho_cli.benching.shares import with_shares
from anarcho_cli.benching.subject import is_installed
from anarcho_cli.config import resolve

SMALL = [
    "model.num_layers=1",
    "model.dim=32",
    "model.num_heads=2",
    "model.hidden_dim=64",
    "model.context_length=16",
    "tokenizer.vocab_size=300",
    "train.batch_tokens=64",
    "train.sequence_length=16",
    "train.micro_batch=2",
    "train.compile=off",
]
BACK_ENDS = [name for name in ("torch", "mlx") if is_installed(name)]
MACHINE = {"chip": "chip", "model": None, "gpu_cores": None, "memory_bytes": 2**34, "system": "Linux", "mac": False}


def small_case(kind: Kind, *overrides: str, preset: str = "quickstart", **place: str) -> Case:
    return Case(
        kind=kind, preset=preset, config=resolve(preset=preset, overrides=[*SMALL, *overrides]), steps=1, **place
    )


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """Two hundred documents of 40 bytes."""
    file = tmp_path / "texts.jsonl"
    texts = [f"{n:03d} words of the document of {n * n % 997:010d}" for n in range(200)]
    assert {len(text) for text in texts} == {39}
    file.write_text("".join(json.dumps({"text": f"{text}."}) + "\n" for text in texts))
    return file


@pytest.mark.parametrize("backend", BACK_ENDS)
def test_the_update_of_every_framework_is_timed_beside_its_own_optimizers(backend: str) -> None:
    row = measure(small_case(Kind.optimizer, backend=backend))
    assert row["optimizer"] == "MuonAdamW"
    assert row["muon_tensors"] > 0 < row["adamw_tensors"]
    assert set(row["peers"]) == {"AdamW", "Muon + AdamW"}
    for peer in row["peers"].values():
        assert peer["ratio"] == pytest.approx(row["update_seconds"] / peer["update_seconds"])


@pytest.mark.skipif("torch" not in BACK_ENDS, reason="needs PyTorch")
def test_each_of_the_timed_calls_updates_all_that_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Any] = []
    new_step, changed = updating.new_step, {}

    def seen_step(*arguments: Any, **options: Any) -> Any:
        steps.append(new_step(*arguments, **options))
        return steps[0]

    def observe(updates: Mapping[str, updating.Update], *, rounds: int) -> dict[str, float]:
        for name, update in updates.items():
            before = {key: value.clone() for key, value in steps[0].model.named_parameters()}
            update()
            changed[name] = all(not value.equal(before[key]) for key, value in steps[0].model.named_parameters())
        return dict.fromkeys(updates, 1.0)

    monkeypatch.setattr(updating, "new_step", seen_step)
    monkeypatch.setattr(updating, "time_in_turns", observe)
    measure(small_case(Kind.optimizer, backend="torch"))
    assert changed == dict.fromkeys(("MuonAdamW", "AdamW", "Muon + AdamW"), True)


def test_quick_updates_are_repeated_in_turns_and_slow_ones_only_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    updates = {name: lambda name=name: calls.append(name) for name in "ab"}
    updating.time_in_turns(updates, rounds=7)
    assert calls == list("ab") * 9
    calls.clear()
    monkeypatch.setattr(updating, "SLOW_SECONDS", 0.0)
    updating.time_in_turns(updates, rounds=7)
    assert calls == list("ab") * 4


def test_data_is_measured_from_texts_to_batches_of_the_run(documents: Path) -> None:
    case = small_case(Kind.data, f"data.source={documents}")
    row = measure(case)
    preparing, reading = row["preparing"], row["reading"]
    assert preparing["documents_per_second"] * preparing["seconds"] == pytest.approx(200)
    assert preparing["bytes_per_second"] * preparing["seconds"] == pytest.approx(200 * 40)
    assert reading["tokens_per_second"] * row["read_seconds"] == pytest.approx(64)
    assert reading["bytes_per_second"] == pytest.approx(40 * reading["documents_per_second"])
    # All texts are of one kind, so the tokens of either are of one size; the epoch's last row is not full.
    sizes = [part["bytes_per_second"] / part["tokens_per_second"] for part in (preparing, reading)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_pairs_of_answers_are_measured_in_batches_of_their_own_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "LEARN_BYTES", 30_000)
    overrides = [
        "tokenizer.vocab_size=400",
        "model.context_length=256",
        "train.sequence_length=256",
        "train.batch_tokens=1024",
    ]
    row = measure(small_case(Kind.data, *overrides, preset="preference"))
    # Batches of pairs of a length hold at most as many tokens as are asked for.
    assert 0 < row["reading"]["tokens_per_second"] * row["read_seconds"] <= 1024
    assert row["reading"]["documents_per_second"] > 0


def test_what_is_prepared_already_or_missing_is_refused_where_it_is_asked_for(
    refused, documents: Path, tmp_path: Path
) -> None:
    config = feeding.sample_config(small_case(Kind.data, f"data.source={documents}").config)
    feeding.learn_tokenizer(config, tmp_path / "tokenizer")
    feeding.prepare_sample(config, tmp_path / "tokenizer", tmp_path / "shards")
    message = refused("bench", "--only", "data", "--set", f"data.source={tmp_path / 'shards'}")
    assert "which is prepared already; expected texts" in message
    assert "missing.txt does not exist" in refused("bench", "--only", "start-up", "--set", "data.source=missing.txt")
    message = refused("bench", "--only", "start-up", "--preset", "sft")
    assert "data.kind is 'chat'; expected 'text' to measure start-up" in message


def test_a_start_is_measured_to_the_first_step_of_a_run_with_its_tokenizer_and_shards(
    monkeypatch: pytest.MonkeyPatch, documents: Path
) -> None:
    backend = BACK_ENDS[-1]
    monkeypatch.setattr(starting, "packages_of", lambda name: {"anarcho_monitor": ""})
    seen: list[list[str]] = []
    first_step = starting.first_step

    def watched(command: Any, *, runs_dir: Path, name: str) -> starting.Measured:
        seen.append(sorted(path.name for path in runs_dir.iterdir()))
        measured = first_step(command, runs_dir=runs_dir, name=name)
        assert not (runs_dir / name / "data").exists(), "the run has prepared what was there"
        return measured

    monkeypatch.setattr(starting, "first_step", watched)
    row = measure(small_case(Kind.start_up, f"data.source={documents}", backend=backend))
    assert len(seen) == 2, "one to fill the caches, one that counts"
    assert {"data", "tokenizer"} <= set(seen[0])
    assert [item["package"] for item in row["imports"]] == [starting.FRAMEWORKS[backend], "anarcho_monitor"]
    assert 0 < row["imports"][1]["seconds"] < row["first_step_seconds"]


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_a_run_is_ended_when_it_has_told_of_its_first_step(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    program = (
        "import os, pathlib, sys, time\n"
        f"run = pathlib.Path({str(tmp_path)!r}, 'run')\n"
        "(run / 'process').write_text(str(os.getpid()))\n"
        "(run / 'metrics.jsonl').write_text('{\"kind\":\"start\"}\\n')\n"
        "time.sleep(0.2)\n"
        '(run / \'metrics.jsonl\').write_text(\'{"kind":"start"}\\n{"kind":"train"}\\n\')\n'
        "time.sleep(600)\n"
    )
    wall, _ = starting.first_step(python(program), runs_dir=tmp_path, name="run")
    assert 0.2 <= wall < 60
    assert not psutil.pid_exists(int((tmp_path / "run" / "process").read_text()))


def test_a_run_that_makes_no_step_is_told_by_its_last_line(tmp_path: Path) -> None:
    command = python("print('preparing'); raise SystemExit('anarcho: error: no room')")
    with pytest.raises(ValueError, match=r"the run made no step: anarcho: error: no room$"):
        starting.first_step(command, runs_dir=tmp_path, name="run")


def test_what_a_measurement_has_started_ends_with_it_where_it_is_given_up(tmp_path: Path) -> None:
    file = tmp_path / "process"
    program = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(file)!r}).write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    case = small_case(Kind.start_up, backend="torch")
    (row,) = run_cases([case], timeout_seconds=1, available_bytes=2**40, command=python(program))
    assert "did not end within 1 s" in row["error"]
    child = int(file.read_text())
    deadline = time.monotonic() + 30
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(child)


def _runs(process: int) -> bool:
    """Whether a process does anything; one that nobody has waited for is a zombie."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_shares_are_of_the_step_of_the_same_preset_and_place() -> None:
    def training(backend: str, seconds: float, preset: str = "small") -> dict[str, Any]:
        return {"kind": "training", "preset": preset, "backend": backend, "device": "cpu", "step_seconds": seconds}

    def update(backend: str) -> dict[str, Any]:
        return {"kind": "optimizer", "preset": "small", "backend": backend, "device": "cpu", "update_seconds": 0.1}

    data = {"kind": "data", "preset": "small", "read_seconds": 0.01}
    failed = {"kind": "training", "preset": "small", "backend": "mlx", "device": "mps", "error": "no room"}
    rows = [training("torch", 1.0), training("mlx", 2.0), training("torch", 9.0, "large"), failed, data]
    *_, of_data = with_shares(rows)
    assert of_data["shares_of_step"] == {"torch cpu": 0.01, "mlx cpu": 0.005}
    *_, torch, mlx = with_shares([training("torch", 0.5), update("torch"), update("mlx")])
    assert (torch["share_of_step"], mlx["share_of_step"]) == (0.2, None)


def test_the_parts_are_told_in_tables_and_each_package_once(capsys: pytest.CaptureFixture[str]) -> None:
    rates = {"documents_per_second": 1234.0, "bytes_per_second": 5.6e6, "tokens_per_second": 2e6}
    place = {"preset": "small", "device": "cpu"}
    imports = {
        name: {"package": name, "after": "", "seconds": 0.0123} for name in ("anarcho_model", "torch", "mlx.core")
    }
    rows = [
        {"kind": "optimizer", "backend": "torch", **place, "update_seconds": 0.02, "share_of_step": 0.25}
        | {"peers": {"AdamW": {"update_seconds": 0.005, "ratio": 4.0}}},
        {"kind": "data", "preset": "small", "source": "embedded", "preparing": rates, "reading": rates}
        | {"shares_of_step": {"torch cpu": 0.125, "mlx mps": 0.002}},
        *(
            {"kind": "start-up", "backend": backend, **place, "first_step_seconds": 3.21, "first_run_seconds": 6.0}
            | {"imports": [imports[framework], imports["anarcho_model"]]}
            for backend, framework in (("torch", "torch"), ("mlx", "mlx.core"))
        ),
    ]
    print_report(rows, MACHINE)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "small torch cpu 20.0 ms 5.0 ms (4.00 x) 25%" in lines
    assert "small embedded preparing 1,234 5.6 MB/s 2,000,000" in lines
    assert "small embedded reading 1,234 5.6 MB/s 2,000,000 torch cpu 12%, mlx mps 0.2%" in lines
    assert "small mlx cpu 3.2 s 6.0 s" in lines
    assert lines.count("anarcho_model 12.3 ms") == 1


def test_the_mac_report_and_the_default_leave_out_what_takes_long() -> None:
    from anarcho_cli.commands.bench import DEFAULT_KINDS, KINDS, MAC_KINDS

    assert set(KINDS) == {kind.value for kind in Kind}
    assert set(MAC_KINDS) < set(DEFAULT_KINDS) == set(KINDS) - {"start-up"}


def test_a_case_of_the_new_kinds_reaches_its_process_unchanged() -> None:
    for case in (small_case(Kind.start_up, backend="mlx", device="mps"), small_case(Kind.data)):
        assert Case.from_json(case.to_json()) == case
