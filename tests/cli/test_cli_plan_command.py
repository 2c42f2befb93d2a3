"""`anarcho plan` says what a run takes, what the machine has for it, and the largest model that trains there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from anarcho_cli import outlook
from anarcho_cli.config import resolve
from anarcho_cli.fitting.budget import USED_SHARE, forecast_bytes
from anarcho_cli.plan import plan_run

GIB = 2**30


@pytest.mark.parametrize("budget", [2 * GIB, 16 * GIB])
def test_the_largest_model_fits_and_the_next_one_does_not(budget: int) -> None:
    config = resolve(preset="small-15m")
    place = {"backend": "torch", "device": "cpu"}
    found = outlook.largest_model(config, **place, budget_bytes=budget)
    assert found is not None
    layers = found.model.num_layers

    def needed(number: int) -> int:
        options = [f"model.num_layers={number}", f"model.dim={64 * number}", f"model.num_heads={number}"]
        larger = resolve(preset="small-15m", overrides=options)
        return forecast_bytes(larger, micro_batch=1, checkpointing=True, **place)

    assert needed(layers) <= USED_SHARE * budget < needed(layers + 2)
    assert found.model.context_length == config.model.context_length
    assert found.model.vocab_size == config.model.vocab_size


def test_where_no_model_fits_the_plan_says_so(tmp_path: Path) -> None:
    plan = plan_run(resolve(preset="quickstart"), device="cpu")
    found = outlook.look_out(plan, runs_dir=tmp_path, flops_per_second=lambda: 1e11, budget_bytes=GIB // 4)
    assert not found.fits
    assert found.largest is None
    text = "\n".join(found.lines())
    assert "it does not fit" in text
    assert "no model trains in this memory" in text


def test_time_is_the_work_over_a_range_of_the_measured_rate(tmp_path: Path) -> None:
    plan = plan_run(resolve(preset="quickstart"), device="cpu")
    found = outlook.look_out(plan, runs_dir=tmp_path / "not" / "there", flops_per_second=lambda: 1e11)
    assert found.seconds == pytest.approx((plan.flops / 5e10, plan.flops / 1e10))
    assert found.checkpoints == 4
    assert found.free_bytes > 0


def test_the_plan_of_several_processes_is_that_of_each(anarcho, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("anarcho_cli.benching.subject.ceiling", lambda *place, **wanted: 2e11)
    monkeypatch.setattr("anarcho_cli.fitting.budget.memory_budget", lambda *place: 64 * GIB)
    options = ["--preset", "medium-45m", "--device", "cpu", "--runs-dir", str(tmp_path / "runs"), "--json"]
    alone = json.loads(anarcho("plan", *options).stdout)
    found = {
        strategy: json.loads(
            anarcho(
                "plan", *options, "--processes", "4", "--machines", "2", "--set", f"train.strategy={strategy}"
            ).stdout
        )
        for strategy in ("auto", "ddp", "hybrid", "fsdp")
    }
    # What is free on the disk may change meanwhile.
    auto, ddp = (
        {key: found[name][key] for key in found[name].keys() - {"config", "disk_bytes"}} for name in ("auto", "ddp")
    )
    assert auto == ddp
    whole, parts = alone["memory_bytes"], {name: plan["memory_bytes"] for name, plan in found.items()}
    for part in ("weights", "optimizer"):
        assert [parts[name][part] for name in ("ddp", "hybrid", "fsdp")] == [whole[part] // n for n in (1, 2, 4)]
    assert parts["ddp"]["total"] > parts["hybrid"]["total"] > parts["fsdp"]["total"]
    assert found["fsdp"]["budget_bytes"] == alone["budget_bytes"] // 2
    text = anarcho("plan", *options[:-1], "--processes", "4", "--set", "train.strategy=fsdp").stdout
    assert "processes   4, each with one of 4 shards of the model (fsdp)" in text
    assert "in each process; of this" in text


def test_processes_that_no_machines_have_and_those_of_another_framework_are_refused(refused) -> None:
    uneven = refused("plan", "--device", "cpu", "--processes", "3", "--machines", "2")
    assert "3 processes cannot be on 2 machines" in uneven
    assert "not of mlx" in refused("plan", "--backend", "mlx", "--device", "cpu", "--processes", "2")


def test_the_command_prints_plan_and_outlook_and_writes_nothing(
    anarcho, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anarcho_cli.benching.subject.ceiling", lambda *place, **wanted: 2e11)
    options = ["--device", "cpu", "--runs-dir", str(tmp_path / "runs"), "--set", "train.micro_batch=auto"]
    shown = json.loads(anarcho("plan", *options, "--json").stdout)
    assert shown["fits"]
    assert shown["matmul_flops_per_second"] == 2e11
    assert shown["micro_batch"] in (1, 2, 4, 8, 16)
    assert shown["disk_bytes"]["at_once"] == 4 * shown["disk_bytes"]["checkpoint"]
    assert shown["largest_model"]["parameters"] > shown["parameters"]
    text = anarcho("plan", *options).stdout
    assert [line.split()[0] for line in text.splitlines() if line[0] != " "] == [
        *("back-end", "parameters", "steps", "tokens", "at", "memory", "FLOPs"),
        *("machine", "largest", "disk", "time"),
    ]
    assert not (tmp_path / "runs").exists()


def test_a_forecast_for_epochs_says_how_many_steps_it_stands_for(anarcho, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anarcho_cli.benching.subject.ceiling", lambda *place, **wanted: 2e11)
    said = "an epoch's steps depend on the text: this is for 1,000"
    assert said in anarcho("plan", "--device", "cpu", "--set", "train.epochs=2").stderr
    assert said not in anarcho("plan", "--device", "cpu").stderr
