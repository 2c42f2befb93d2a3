"""Speed and remaining time against simulated runs whose truth is known."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from anarcho_monitor import MonitorError, Throughput, peak_flops


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def simulate(
    total: int,
    step_seconds: Callable[[int], float],
    *,
    first_step: int = 0,
    evaluate_every: int = 0,
    evaluate_seconds: float = 0.0,
    save_every: int = 0,
    save_seconds: float = 0.0,
    improves_until: int = 0,
) -> list[tuple[int, float, float]]:
    """(step, estimated, true) remaining seconds after every step of a run."""
    clock = Clock()
    throughput = Throughput(total_steps=total, first_step=first_step, clock=clock)
    seen = []
    for step in range(first_step + 1, total + 1):
        clock.now += step_seconds(step)
        throughput.finish_step(1000)
        if evaluate_every and step % evaluate_every == 0:
            with throughput.pause("validation", every=evaluate_every):
                clock.now += evaluate_seconds
        # The loop saves in a rhythm, and besides after each evaluation that was the best so far.
        best = evaluate_every and step % evaluate_every == 0 and step <= improves_until
        if best or (save_every and step % save_every == 0):
            with throughput.pause("checkpoint"):
                clock.now += save_seconds
        seen.append((step, throughput.eta_seconds, clock.now))
    return [(step, eta, clock.now - at) for step, eta, at in seen if eta is not None]


def noisy(step: int) -> float:
    return 0.5 * random.Random(step).uniform(0.8, 1.2)


SCENARIOS = {
    "steady": {"step_seconds": lambda step: 0.5},
    "slow compilation": {"step_seconds": lambda step: 120.0 if step == 1 else 0.5},
    "noise": {"step_seconds": noisy},
    "stalls": {"step_seconds": lambda step: 5.0 if step % 40 == 0 else 0.5},
    "evaluations": {"step_seconds": noisy, "evaluate_every": 50, "evaluate_seconds": 10.0},
    "checkpoints": {"step_seconds": noisy, "save_every": 50, "save_seconds": 4.0},
    "evaluations and checkpoints": {
        "step_seconds": noisy,
        "evaluate_every": 50,
        "evaluate_seconds": 10.0,
        "save_every": 100,
        "save_seconds": 6.0,
        "improves_until": 1000,
    },
    "evaluations that take most of the time, after a slow start": {
        "step_seconds": lambda step: 90.0 if step == 1 else noisy(step),
        "evaluate_every": 20,
        "evaluate_seconds": 15.0,
        "save_every": 40,
        "save_seconds": 3.0,
    },
    "resumed, with evaluations and checkpoints": {
        "step_seconds": noisy,
        "first_step": 500,
        "evaluate_every": 20,
        "evaluate_seconds": 2.0,
        "save_every": 20,
        "save_seconds": 1.0,
        "improves_until": 1000,
    },
    "micro-batch halved early": {"step_seconds": lambda step: 0.5 if step < 60 else 0.8},
    "resumed": {"step_seconds": lambda step: 60.0 if step == 501 else 0.5, "first_step": 500},
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_remaining_time_is_within_a_tenth_of_the_truth_once_a_fifth_is_done(scenario: str) -> None:
    settings = SCENARIOS[scenario]
    total, first = 1000, settings.get("first_step", 0)
    checked = 0
    for step, eta, truth in simulate(total, **settings):
        # Near the end one stall or evaluation more or less is all that remains, so that a share says nothing.
        if first + (total - first) / 5 <= step <= total * 0.9:
            assert eta == pytest.approx(truth, rel=0.1), f"at step {step}"
            checked += 1
    assert checked >= 100


def test_remaining_time_is_unknown_after_the_compiling_step_and_zero_at_the_end() -> None:
    clock = Clock()
    throughput = Throughput(total_steps=3, clock=clock)
    clock.now += 60
    throughput.finish_step(10)
    assert throughput.eta_seconds is None
    for _ in range(2):
        clock.now += 1
        throughput.finish_step(10)
    assert throughput.eta_seconds == 0


def test_tokens_per_second_ignores_compilation_pauses_and_a_stall() -> None:
    clock = Clock()
    throughput = Throughput(total_steps=100, clock=clock)
    for step in range(20):
        clock.now += {0: 60.0, 10: 30.0}.get(step, 0.5)
        with throughput.pause("checkpoint"):
            clock.now += 7.0
        throughput.finish_step(1000)
    assert throughput.tokens_per_second == pytest.approx(2000)
    assert throughput.step_seconds == pytest.approx(0.5)


def test_the_first_step_counts_while_there_is_no_other() -> None:
    clock = Clock()
    throughput = Throughput(total_steps=2, clock=clock)
    assert throughput.tokens_per_second == 0
    clock.now += 4
    throughput.finish_step(1000)
    assert throughput.tokens_per_second == pytest.approx(250)


def test_data_wait_share_is_the_share_of_time_in_waiting() -> None:
    clock = Clock()
    throughput = Throughput(total_steps=10, clock=clock)
    for _ in range(5):
        with throughput.waiting():
            clock.now += 0.25
        clock.now += 0.75
        throughput.finish_step(1)
    assert throughput.data_wait_share == pytest.approx(0.25)


def test_flop_utilisation_is_model_flops_over_peak_and_left_out_where_unknown() -> None:
    clock = Clock()
    known = Throughput(total_steps=10, flops_per_token=6e8, peak_flops=1e13, clock=clock)
    unknown = Throughput(total_steps=10, flops_per_token=6e8, clock=clock)
    for _ in range(3):
        clock.now += 1
        known.finish_step(5000)
        unknown.finish_step(5000)
    assert known.flop_utilisation == pytest.approx(0.3)
    assert known.metrics()["flop_utilisation"] == pytest.approx(0.3)
    assert "flop_utilisation" not in unknown.metrics()


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("Apple M1", 2.6e12),
        ("Apple M1 Pro", 5.2e12),
        ("Apple M2 Max", None),
        ("Apple M9", None),
        ("", None),
    ],
)
def test_peaks_are_known_by_full_name_and_never_guessed(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(MonitorError, match="window is 0"):
        Throughput(total_steps=1, window=0)
