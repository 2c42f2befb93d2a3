"""Measurements of this machine: cases in processes of their own, what becomes of their failures, and how they are told."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter

import pytest
from anarcho_cli.benching.cases import Case, Kind, Target, find_targets
from anarcho_cli.benching.measurement import measure
from anarcho_cli.benching.processes import describe, run_cases
from anarcho_cli.benching.subject import is_installed
from anarcho_cli.benching.timing import best_rate, time_steps
from anarcho_cli.config import resolve
from anarcho_cli.devices import Accelerators, Backend, Device, DeviceError

SMALL = [
    "model.num_layers=1",
    "model.dim=32",
    "model.num_heads=2",
    "model.hidden_dim=64",
    "tokenizer.vocab_size=400",
    "train.batch_tokens=64",
    "train.compile=off",
]
OPTIONS = [item for value in SMALL for item in ("--set", value)] + ["--context", "16", "--micro-batch", "2"]


def small_case(kind: Kind = Kind.training, *, backend: str = "torch") -> Case:
    overrides = [*SMALL, "model.context_length=16", "train.sequence_length=16", "train.micro_batch=2"]
    config = resolve(preset="quickstart", overrides=overrides)
    return Case(kind=kind, preset="quickstart", config=config, steps=2, backend=backend)


def test_the_training_step_of_every_framework_here_is_measured_in_a_process_of_its_own(anarcho) -> None:
    result = anarcho("bench", *OPTIONS, "--steps", 2, "--only", "training", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["machine"]["memory_bytes"] > 0
    expected = [name for name in ("torch", "mlx") if is_installed(name)]
    assert [row["backend"] for row in report["results"]] == expected
    for row in report["results"]:
        assert "error" not in row, row
        assert row["finite"] is True
        assert row["tokens_per_second"] == pytest.approx(64 / row["step_seconds"])
        assert row["step_seconds"] == pytest.approx(2 * row["micro_batch_seconds"] + row["update_seconds"])
        assert row["ceiling_flops"] > row["tokens_per_second"] * row["flops_per_token"]
        assert 0 < row["peak_bytes"] < 2**31
        assert row["peak_flops"] is None
    # This process has long loaded more than the children do: each has read its own memory, not its parent's.
    assert len({row["peak_bytes"] for row in report["results"]}) == len(expected)


@pytest.mark.parametrize("backend", [name for name in ("torch", "mlx") if is_installed(name)])
def test_generation_is_measured_after_its_first_token(backend: str) -> None:
    result = measure(small_case(Kind.generation, backend=backend))
    assert result["prompt_tokens"] + result["new_tokens"] == 16
    assert result["tokens_per_second"] > 0
    assert result["first_token_seconds"] > 0


def test_the_tokenizer_is_measured_in_bytes_a_second_of_text_that_it_has_not_seen_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from anarcho_cli.benching import tokenizing

    monkeypatch.setattr(tokenizing, "LEARN_BYTES", 30_000)
    monkeypatch.setattr(tokenizing, "ENCODE_BYTES", 60_000)
    result = measure(small_case(Kind.tokenizer))
    assert result["bytes_per_second"] > 10_000
    assert result["learning_bytes_per_second"] > 1_000
    assert 1 < result["bytes_per_token"] < 6
    assert result["tokens_per_second"] * result["bytes_per_token"] == pytest.approx(result["bytes_per_second"])


def test_a_case_reaches_its_process_unchanged() -> None:
    case = small_case(Kind.generation)
    assert Case.from_json(case.to_json()) == case


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os; os.abort()", "the process ended by SIGABRT"),
        ("import sys; sys.exit('out of memory')", "the process ended with status 1: out of memory"),
        ("import time; time.sleep(60)", "it did not end within 1 s"),
    ],
)
def test_a_measurement_that_crashes_or_hangs_is_a_row_with_its_reason_and_the_next_one_goes_on(
    program: str, reason: str
) -> None:
    broken = run_cases([small_case()], timeout_seconds=1, available_bytes=2**40, command=python(program))
    whole = run_cases(
        [small_case()], timeout_seconds=60, available_bytes=2**40, command=python("print('noise\\n{\"figure\": 1}')")
    )
    (failed,), (measured,) = list(broken), list(whole)
    assert failed["error"].startswith(reason), failed
    assert {**describe(small_case()), "figure": 1}.items() <= measured.items()
    assert measured["forecast_bytes"] > 0


def test_what_does_not_fit_by_its_forecast_is_left_out_before_it_runs() -> None:
    begun: list[Case] = []
    rows = run_cases([small_case()], timeout_seconds=1, available_bytes=2**20, begin=begun.append)
    assert "left out: it needs" in next(rows)["error"]
    assert not begun


def test_an_error_of_the_project_reaches_the_row_as_its_sentence(anarcho) -> None:
    options = ["--context", 2, "--only", "generation", "--backend", "torch", "--device", "cpu", "--steps", 1]
    result = anarcho("bench", *options)
    assert result.exit_code == 1
    assert "generation of quickstart on torch cpu: model.context_length is 2; expected at least 4" in result.stdout


def test_all_frameworks_and_devices_are_found_and_names_choose_among_them() -> None:
    mac = {"torch": Accelerators(mps=True), "mlx": Accelerators(mps=True)}
    linux = {"torch": Accelerators(cuda=("NVIDIA H100",)), "mlx": Accelerators()}

    def targets(machine: dict[str, Accelerators], backend: Backend | None = None, device: Device | None = None):
        found = find_targets(backend, device, installed=lambda name: True, find=machine.__getitem__)
        return [(target.backend, target.device) for target in found]

    assert targets(mac) == [("torch", "mps"), ("torch", "cpu"), ("mlx", "mps")]
    assert targets(linux) == [("torch", "cuda"), ("torch", "cpu"), ("mlx", "cpu")]
    assert targets(mac, Backend.mlx, Device.cpu) == [("mlx", "cpu")]
    assert targets(linux, None, Device.cuda) == [("torch", "cuda")]
    with pytest.raises(DeviceError, match="--device mps is not here for torch or mlx"):
        targets(linux, None, Device.mps)
    only_torch = find_targets(None, None, installed=lambda name: name == "torch", find=mac.__getitem__)
    assert {target.backend for target in only_torch} == {"torch"}
    with pytest.raises(DeviceError, match="neither PyTorch nor MLX"):
        find_targets(None, None, installed=lambda name: False)
    assert Target(backend="torch", device="cpu") in only_torch


def test_a_step_of_many_micro_batches_is_put_together_from_steps_of_one_and_two() -> None:
    def run(micro_batches: int) -> None:
        time.sleep(0.01 * micro_batches + 0.02)

    times = time_steps(run, repetitions=5, accumulated=True)
    assert times.micro_batch == pytest.approx(0.01, rel=0.5)
    assert times.step(8) == pytest.approx(0.1, rel=0.5)
    whole = time_steps(run, repetitions=3, accumulated=False)
    assert whole.update == 0
    assert whole.step(1) == pytest.approx(0.03, rel=0.5)


@pytest.mark.parametrize("accumulated", [False, True])
def test_steps_that_prepare_those_that_follow_are_not_timed(accumulated) -> None:
    """As those that PyTorch records as CUDA graphs, each kind for itself."""
    done: Counter[int] = Counter()

    def run(micro_batches: int) -> None:
        done[micro_batches] += 1
        time.sleep(0.2 if done[micro_batches] <= 4 else 0.001)

    assert time_steps(run, repetitions=1, accumulated=accumulated, warm=4).step(1) < 0.1


def test_the_ceiling_is_the_best_rate_and_no_size_follows_a_slow_one() -> None:
    rates = {64: 1e9, 128: 4e9, 256: 2e6, 512: 1e15}
    asked: set[int] = set()

    def product(size: int, count: int) -> float:
        asked.add(size)
        return 2 * size**3 * count / rates[size]

    assert best_rate(product, sizes=tuple(rates)) == pytest.approx(4e9)
    assert asked == {64, 128, 256}


def test_unknown_kinds_are_refused_by_name(refused) -> None:
    expected = "--only is 'speed'; expected training, optimizer, generation, tokenizer, data or start-up"
    assert expected in refused("bench", "--only", "speed")


def test_the_configuration_of_the_options_is_checked_as_a_run_would(refused) -> None:
    message = refused("bench", "--preset", "quickstart", "--context", 100)
    assert "train.batch_tokens" in message
