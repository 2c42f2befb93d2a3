"""Faults in loss and gradient: nothing is learned from them, each policy does what it says, and resuming in their midst changes nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anarcho_train import (
    CheckpointStore,
    Loop,
    RecoveryConfig,
    StepMetrics,
    StepSchedule,
    TrainConfig,
    TrainingDiverged,
)
from anarcho_train.recovery import ROLLBACKS_FILE, Recovery

from .conftest import LENGTH, Bigram, CountingText, Patience, Record, Rows, make_step

PER_STEP = 8
NOT_A_NUMBER, HUGE = 12, 11
"""Tokens: a row of this alone makes the loss NaN, or fifty times as large."""
FINITE = {"weight": 1.0, "grad_norm": 1.0}


class FaultyText(CountingText):
    """A text with samples that break the model of `fragile_step`, and some that count nothing."""

    def __init__(self, faults: dict[int, int], empty: range = range(0)) -> None:
        super().__init__()
        self.faults, self.empty = faults, empty

    def rows(self, samples: range) -> Rows:
        rows = super().rows(samples)
        for row, sample in enumerate(samples):
            if sample in self.faults:
                rows.tokens[row] = self.faults[sample]
            if sample in self.empty:
                rows.weights[row] = 0
        return rows


class Fragile(Bigram):
    """A model whose loss is not a number, or huge, on chosen rows."""

    def token_logprobs(self, tokens: torch.Tensor, targets: torch.Tensor, **_: Any) -> torch.Tensor:
        factors = torch.ones(len(tokens), 1)
        factors[(tokens == NOT_A_NUMBER).all(-1)] = float("nan")
        factors[(tokens == HUGE).all(-1)] = 50
        return super().token_logprobs(tokens, targets) * factors


def torch_step(**settings: Any) -> Any:
    torch.manual_seed(0)
    return make_step(Fragile(), **settings)


def mlx_step(**settings: Any) -> Any:
    mx = pytest.importorskip("mlx.core")
    from . import mlx_bigram

    class FragileMlx(mlx_bigram.Bigram):
        def token_logprobs(self, tokens: Any, targets: Any, **_: Any) -> Any:
            factors = mx.where((tokens == NOT_A_NUMBER).all(-1), float("nan"), 1.0)
            factors = mx.where((tokens == HUGE).all(-1), 50.0, factors)
            return super().token_logprobs(tokens, targets) * factors[:, None]

    mx.random.seed(0)
    model = FragileMlx()
    mx.eval(model.parameters())
    return mlx_bigram.make_step(model, **settings)


def bits(step: Any) -> dict[str, bytes]:
    if isinstance(step.model, torch.nn.Module):
        return {name: p.detach().numpy().tobytes() for name, p in step.model.named_parameters()}
    from .mlx_bigram import flat

    return {name: np.array(p).tobytes() for name, p in flat(step.model.parameters()).items()}


@pytest.fixture(params=[torch_step, mlx_step], ids=["torch", "mlx"])
def make_fragile(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return request.param


def make_run(
    directory: Path, *, faults: dict[int, int], step: Any = None, empty: range = range(0), **options: Any
) -> Any:
    recovery = RecoveryConfig(**options.pop("recovery", {}))
    defaults = {"steps": 14, "micro_batch": 4, "eval_every": 0, "checkpoint_every": 3, "log_every": 1}
    config = TrainConfig(**{**defaults, "batch_tokens": PER_STEP * LENGTH, **options})
    text, sink, store = FaultyText(faults, empty), Record(), CheckpointStore(directory, keep_last=config.keep_last)
    loop = Loop(
        step=step or torch_step(),
        batches=text,
        validation=None,
        schedule=lambda number: StepSchedule(lr_scale=max(0.2, 1 - number / 24), number=number),
        config=config,
        sequence_length=LENGTH,
        checkpoints=store,
        sink=sink,
        early_stopping=Patience(0),
        recovery=recovery,
    )
    return SimpleNamespace(loop=loop, text=text, sink=sink, store=store, step=loop.step)


def fault_events(run: Any) -> list[dict[str, Any]]:
    return [line for line in run.sink.of("event") if "fault" in line]


# ---- skipping


@pytest.mark.parametrize(
    ("fault", "recovery", "what"),
    [
        (NOT_A_NUMBER, {}, "non_finite"),
        (HUGE, {"spikes": "skip", "spike_window": 4}, "spike"),
    ],
)
def test_a_skipped_step_changes_no_weight_and_names_its_samples(make_fragile, tmp_path, fault, recovery, what):
    run = make_run(tmp_path, faults={50: fault}, step=make_fragile(), recovery=recovery)
    seen = []
    train = run.step.train

    def watched(micro_batches, *, schedule):
        before = bits(run.step)
        metrics = train(micro_batches, schedule=schedule)
        seen.append(bits(run.step) == before)
        return metrics

    run.step.train = watched
    assert run.loop.run().step == 14
    assert [number for number, same in enumerate(seen) if same] == [6]
    (event,) = fault_events(run)
    assert (event["fault"], event["action"], event["step"]) == (what, "skip", 7)
    assert (event["first_sample"], event["last_sample"]) == (48, 55)
    assert "no update at step 7" in event["message"]
    assert "samples 48 to 55" in event["message"]
    assert run.text.consumed == list(range(14 * PER_STEP))


def test_by_default_a_spike_is_reported_and_learned_from(tmp_path):
    window = {"spike_window": 4}
    run = make_run(tmp_path / "a", faults={50: HUGE}, recovery=window)
    run.loop.run()
    (event,) = fault_events(run)
    assert (event["fault"], event["action"], event["step"]) == ("spike", "report", 7)
    assert event["loss"] > event["limit"]
    unwatched = make_run(tmp_path / "b", faults={50: HUGE}, recovery={"spike_window": 1000})
    unwatched.loop.run()
    assert bits(run.step) == bits(unwatched.step)
    assert fault_events(unwatched) == []


def test_a_step_of_which_nothing_counts_is_no_divergence(make_fragile, tmp_path):
    run = make_run(
        tmp_path, faults={}, empty=range(32, 64), step=make_fragile(), recovery={"non_finite": "stop", "max_skips": 1}
    )
    assert run.loop.run().step == 14
    assert [(event["fault"], event["step"]) for event in fault_events(run)] == [
        ("empty", step) for step in (5, 6, 7, 8)
    ]


def recovery_of(losses: list[float], **settings: Any) -> tuple[Recovery, list[str | None]]:
    recovery = Recovery(RecoveryConfig(**settings), samples_per_step=PER_STEP)
    faults = [
        recovery.judge(StepMetrics(loss=loss, **FINITE), step=step, can_roll_back=lambda: False)
        for step, loss in enumerate(losses)
    ]
    return recovery, [fault and fault.kind for fault in faults]


def test_a_spike_is_beyond_six_deviations_of_a_full_window():
    noise = [2 + 0.1 * (-1) ** i for i in range(128)]  # mean 2, deviation 0.1
    assert recovery_of(noise)[0].limit == pytest.approx(2.6)
    assert recovery_of(noise[1:])[0].limit is None
    assert recovery_of([*noise, 2.59])[1][-1] is None
    assert recovery_of([*noise, 2.61])[1][-1] == "spike"
    assert recovery_of([*noise, 2.61], spike_sigma=7)[1][-1] is None
    assert recovery_of([2.0] * 128 + [2.001])[1][-1] is None, "rounding is no spike"


def test_a_level_that_stays_is_taken_for_the_new_one():
    noise = [2 + 0.1 * (-1) ** i for i in range(128)]
    recovery, faults = recovery_of([*noise, *[5.0] * 20], spikes="skip")
    assert 1 <= faults.count("spike") <= 5
    assert recovery.skips == 0


# ---- stopping


def test_stop_saves_the_state_and_a_resumed_run_goes_on_after_the_samples(tmp_path):
    run = make_run(tmp_path, faults={50: NOT_A_NUMBER}, recovery={"non_finite": "stop"})
    with pytest.raises(
        TrainingDiverged, match=r"step 7 stopped the run, as recovery.non_finite = 'stop'.*samples 48 to 55"
    ):
        run.loop.run()
    again = make_run(tmp_path, faults={50: NOT_A_NUMBER}, recovery={"non_finite": "stop"})
    again.loop.resume(again.store.latest_valid())
    assert again.loop.run().step == 14
    assert again.text.consumed == list(range(56, 14 * PER_STEP))
    skipped = make_run(tmp_path / "skipped", faults={50: NOT_A_NUMBER})
    skipped.loop.run()
    assert bits(again.step) == bits(skipped.step)


def test_skips_in_a_row_become_rollbacks_and_these_are_limited(tmp_path):
    run = make_run(
        tmp_path,
        faults=dict.fromkeys(range(48, 1000), NOT_A_NUMBER),
        recovery={"max_skips": 3, "max_rollbacks": 2},
    )
    with pytest.raises(TrainingDiverged, match=r"3 steps in a row up to step 9 after 2 roll-backs .*lower optim.lr"):
        run.loop.run()
    actions = [event["action"] for event in fault_events(run)]
    assert actions == ["skip", "skip", "rollback"] * 2 + ["skip", "skip", "stop"]
    assert run.text.consumed == list(range(15 * PER_STEP)), "no sample is gone through twice"
    assert run.store.latest_valid().name == "step-00000006"


def test_without_a_checkpoint_a_rollback_is_a_skip_until_there_are_too_many(tmp_path):
    run = make_run(tmp_path, faults={2: NOT_A_NUMBER}, recovery={"non_finite": "rollback"})
    run.loop.run()
    assert [event["action"] for event in fault_events(run)] == ["skip"]


# ---- rolling back


@pytest.mark.parametrize(
    ("fault", "recovery"),
    [
        (NOT_A_NUMBER, {"non_finite": "rollback"}),
        (HUGE, {"spikes": "rollback", "spike_window": 4}),
    ],
)
def test_a_rolled_back_run_goes_on_with_the_samples_after_the_fault(make_fragile, tmp_path, fault, recovery):
    run = make_run(tmp_path, faults={67: fault}, step=make_fragile(), recovery=recovery)
    result = run.loop.run()
    assert result.step == 14
    assert result.tokens == 14 * PER_STEP * LENGTH
    # Step 9 is at fault: back to step 6, which goes on with step 10's samples.
    assert run.text.consumed == list(range(17 * PER_STEP))
    (event,) = fault_events(run)
    assert (event["action"], event["step"], event["rolled_back_to"], event["next_sample"]) == ("rollback", 6, 6, 72)
    assert "rolled back from step 9 to step 6" in event["message"]
    state = run.store.read_state(run.store.latest_valid())
    assert state["samples"] == 17 * PER_STEP
    # What was trained on the way is gone: the same as if the text had never had these samples.
    clean = make_run(tmp_path / "clean", faults={}, step=make_fragile())
    rows = clean.text.rows
    clean.text.rows = lambda samples: rows(samples if samples[0] < 48 else range(samples[0] + 24, samples[-1] + 25))
    clean.loop.run()
    assert bits(run.step) == bits(clean.step)


FAULTS = {67: NOT_A_NUMBER, 110: NOT_A_NUMBER, 130: HUGE, 133: NOT_A_NUMBER}
ROLLBACK = {"non_finite": "rollback", "spikes": "skip", "spike_window": 4}


def uninterrupted(tmp_path: Path, make_fragile: Any) -> Any:
    whole = make_run(tmp_path / "whole", faults=FAULTS, step=make_fragile(), recovery=ROLLBACK, keep_last=1)
    whole.loop.run()
    return whole


def finished(directory: Path, make_fragile: Any) -> Any:
    """The run in ``directory``, gone on with to its end."""
    run = make_run(directory, faults=FAULTS, step=make_fragile(), recovery=ROLLBACK, keep_last=1)
    run.store.sweep()
    if checkpoint := run.store.latest_valid():
        run.loop.resume(checkpoint)
    assert run.loop.run().step == 14
    return run


def require_equal(run: Any, whole: Any) -> None:
    assert bits(run.step) == bits(whole.step)
    states = [handle.store.read_state(handle.store.latest_valid()) for handle in (run, whole)]
    assert states[0] == states[1]
    assert [info.step for info in run.store.list()] == [info.step for info in whole.store.list()]


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("wanted", ["kill", "stop"])
def test_killed_or_stopped_at_any_step_around_faults_and_resumed_a_run_ends_bitwise_alike(
    make_fragile, tmp_path, wanted
):
    whole = uninterrupted(tmp_path, make_fragile)
    assert [event["action"] for event in fault_events(whole)].count("rollback") >= 2
    steps = len(whole.text.consumed) // PER_STEP
    # Not each step in each way and framework, so that all are quick; each instant is one of some.
    stride = {"kill": 3, "stop": 4}[wanted] * (1 if make_fragile is torch_step else 3)
    for number in range(0, steps, stride):
        run = make_run(tmp_path / f"{number}", faults=FAULTS, step=make_fragile(), recovery=ROLLBACK, keep_last=1)
        train = run.step.train

        def interrupted(micro_batches, *, schedule, run=run, train=train, number=number):
            if len(run.text.consumed) == PER_STEP * (number + 1):
                if wanted == "kill":
                    raise Killed
                os.kill(os.getpid(), signal.SIGTERM)
            return train(micro_batches, schedule=schedule)

        run.step.train = interrupted
        if wanted == "kill":
            with pytest.raises(Killed):
                run.loop.run()
        else:
            run.loop.run()
        require_equal(finished(tmp_path / f"{number}", make_fragile), whole)


@pytest.mark.parametrize("instant", ["discard_after", "roll_back", "noted", "load"])
def test_killed_within_a_rollback_and_resumed_a_run_ends_bitwise_alike(tmp_path, instant, monkeypatch):
    whole = uninterrupted(tmp_path, torch_step)
    run = make_run(tmp_path / "killed", faults=FAULTS, recovery=ROLLBACK, keep_last=1)

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    if instant == "discard_after":
        run.store.discard_after = die
    elif instant == "load":
        run.step.load = die
    elif instant == "roll_back":
        monkeypatch.setattr("anarcho_train.recovery.replace_json", die)
    else:
        note = run.loop.policies.roll_back
        run.loop.policies.roll_back = lambda **values: (note(**values), die())
    with pytest.raises(Killed):
        run.loop.run()
    monkeypatch.undo()
    require_equal(finished(tmp_path / "killed", torch_step), whole)


def test_what_was_rolled_back_is_known_to_a_run_that_goes_on_from_an_older_checkpoint(tmp_path):
    whole = uninterrupted(tmp_path, torch_step)
    run = make_run(tmp_path / "old", faults=FAULTS, recovery=ROLLBACK, keep_last=5)
    run.loop.run()
    for info in run.store.list()[1:]:
        (info.path / "model.safetensors").write_bytes(b"damaged")
    again = make_run(tmp_path / "old", faults=FAULTS, recovery=ROLLBACK, keep_last=5)
    again.loop.resume(again.store.latest_valid())
    again.loop.run()
    assert bits(again.step) == bits(whole.step)
    assert not set(again.text.consumed) & set(range(64, 72)), "samples at fault are not gone through again"


def test_a_step_of_another_size_goes_on_with_the_next_sample(tmp_path):
    first = make_run(tmp_path, faults={}, steps=6)
    first.loop.run()
    second = make_run(tmp_path, faults={}, steps=9, batch_tokens=4 * LENGTH)
    second.loop.resume(second.store.latest_valid())
    second.loop.run()
    assert second.text.consumed == list(range(48, 60))
    third = make_run(tmp_path, faults={}, steps=12, batch_tokens=4 * LENGTH)
    third.loop.resume(third.store.latest_valid())
    third.loop.run()
    assert third.text.consumed == list(range(60, 72))


def test_batches_of_changing_shape_are_left_behind_alike(tmp_path):
    run = make_run(tmp_path, faults={17: NOT_A_NUMBER}, recovery={"non_finite": "rollback"})
    loop = replace(run.loop, samples_per_step=2)
    assert loop.run().step == 14
    # Step 9 is at fault, samples 16 and 17: back to step 6, which goes on with sample 18.
    assert run.text.consumed == list(range(28 + 6))
    (event,) = fault_events(run)
    assert (event["first_sample"], event["last_sample"], event["next_sample"]) == (16, 17, 18)


@pytest.mark.parametrize("method", ["state", "batch"])
@pytest.mark.parametrize("error", [OSError("the source cannot be reached"), ValueError("shard-00001.bin is damaged")])
def test_data_that_fails_for_good_costs_no_step_that_was_made(tmp_path, method, error):
    whole = make_run(tmp_path / "whole", faults={})
    whole.loop.run()
    run = make_run(tmp_path / "parts", faults={})
    inner = getattr(run.text, method)

    def failing(first_sample: int, count: int) -> Any:
        if first_sample >= 8 * PER_STEP:
            raise error
        return inner(first_sample, count)

    setattr(run.text, method, failing)
    with pytest.raises(type(error), match=str(error)):
        run.loop.run()
    assert run.store.latest_valid().name == "step-00000008"
    again = make_run(tmp_path / "parts", faults={})
    again.loop.resume(again.store.latest_valid())
    again.loop.run()
    assert again.text.consumed == list(range(8 * PER_STEP, 14 * PER_STEP))
    assert bits(again.step) == bits(whole.step)


def test_a_damaged_note_of_rollbacks_is_named(tmp_path):
    run = make_run(tmp_path, faults={})
    run.loop.run()
    (tmp_path / ROLLBACKS_FILE).write_text("{")
    again = make_run(tmp_path, faults={})
    with pytest.raises(ValueError, match=rf"{ROLLBACKS_FILE} cannot be read"):
        again.loop.resume(again.store.latest_valid())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("non_finite", "report"),
        ("spikes", "off"),
        ("max_skips", 0),
        ("spike_sigma", 0.0),
        ("spike_sigma", float("inf")),
        ("spike_window", 1),
        ("max_rollbacks", -1),
        ("max_failed_saves", 0),
        ("max_restarts", -1),
    ],
)
def test_settings_without_meaning_are_refused_by_name(key, value):
    with pytest.raises(ValueError, match=rf"recovery.{key} is {value!r}; expected"):
        replace(RecoveryConfig(), **{key: value})
