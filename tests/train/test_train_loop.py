"""The loop: order of things, exact resumption at every step, early stopping, clean stops, divergence."""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from anarcho_train import LossSum, TrainConfig, TrainingDiverged, evaluate

from .conftest import Bigram, CountingText, make_step, run_until


def weights(handle) -> list[torch.Tensor]:
    return [p.detach().clone() for p in handle.loop.step.model.parameters()]


def test_a_run_learns_and_reports_what_it_did(make_loop):
    run = make_loop(steps=60)
    run.loop.gauges = lambda: {"used_bytes": 1.0}
    run.loop.throughput = SimpleNamespace(
        begin=lambda first_step: stretches.append(("begin", first_step)),
        finish_step=lambda tokens: stretches.append(tokens),
        waiting=nullcontext,
        pause=lambda name, every=None: nullcontext(stretches.append(name)),
        metrics=lambda: {"tokens_per_second": 9.0},
    )
    stretches: list = []
    result = run.loop.run()
    assert run.sink.lines[0] == {"kind": "start", "step": 0, "tokens": 0}
    assert stretches[0] == ("begin", 0)
    assert stretches.count(32) == 60
    assert stretches.count("validation") == 15
    losses = [line["loss"] for line in run.sink.of("train")]
    assert len(losses) == 60
    assert losses[-1] < 0.5 * losses[0]
    assert result.step == 60
    assert result.tokens == 60 * 32
    assert result.bits_per_byte == run.sink.of("validation")[-1]["bits_per_byte"]
    assert [line["step"] for line in run.sink.of("validation")] == list(range(4, 61, 4))
    assert run.text.consumed == list(range(60 * 8))
    assert {"loss", "loss_max", "grad_norm", "lr_group_0", "used_bytes", "tokens_per_second"} <= run.sink.of("train")[
        0
    ].keys()


@pytest.mark.parametrize("stop_after", range(1, 12))
def test_a_run_interrupted_at_any_step_and_resumed_is_bitwise_the_uninterrupted_one(make_loop, tmp_path, stop_after):
    whole = make_loop(tmp_path / "whole")
    whole.loop.run()

    first = make_loop(tmp_path / "parts", checkpoint_every=1)
    run_until(first.loop, stop_after)

    torch.manual_seed(1)
    second = make_loop(tmp_path / "parts", step=make_step(Bigram()))
    second.loop.resume(second.store.latest_valid())
    result = second.loop.run()
    assert second.text.consumed == list(range(8 * stop_after, 8 * 12))
    assert result.step == 12
    assert second.stopping.state_dict() == whole.stopping.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_saves_and_says_which_it_was(make_loop, number):
    run = make_loop(checkpoint_every=0, eval_every=0)
    inner = run.loop.step.train

    def train_and_signal(micro_batches, *, schedule):
        if run.loop.progress.result.step == 4:
            os.kill(os.getpid(), number)
        return inner(micro_batches, schedule=schedule)

    run.loop.step.train = train_and_signal
    before = signal.getsignal(number)
    result = run.loop.run()
    assert result.stopped_by == number
    assert result.step == 5
    assert run.store.latest_valid().name == "step-00000005"
    assert signal.getsignal(number) is before


def test_early_stopping_ends_the_run_with_a_checkpoint_and_keeps_the_best(make_loop):
    run = make_loop(steps=100, patience=2, eval_every=2, checkpoint_every=0, keep_last=1)
    losses = iter([3.0, 2.0, 2.5, 2.4, 1.0])
    run.loop.step.evaluate = lambda batch: LossSum(loss=next(losses) * 24, weight=24.0)
    run.loop.validation.batches = lambda size, max_windows=None: iter([CountingText().rows(range(1))])
    result = run.loop.run()
    assert result.step == 8
    assert result.best_step == 4
    assert [info.step for info in run.store.list()] == [4, 8]
    assert run.store.best().name == "step-00000004"
    assert "early stopping" in run.sink.of("event")[0]["message"]


def test_a_run_that_stopped_early_stays_stopped_when_it_is_resumed(make_loop):
    first = make_loop(steps=100, patience=1, eval_every=2, checkpoint_every=0)
    losses = iter([2.0, 3.0])
    first.loop.step.evaluate = lambda batch: LossSum(loss=next(losses) * 24, weight=24.0)
    first.loop.validation.batches = lambda size, max_windows=None: iter([CountingText().rows(range(1))])
    stopped = first.loop.run()
    assert stopped.step == 4
    again = make_loop(steps=100, patience=1, eval_every=2, checkpoint_every=0)
    again.loop.resume(again.store.latest_valid())
    assert again.loop.run().step == 4
    assert again.text.consumed == []
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(again), strict=True))


def test_evaluations_are_compared_on_the_same_text_and_the_last_one_reads_it_all_besides(make_loop):
    run = make_loop(steps=8, eval_every=4, eval_tokens=12, keep_last=1)
    result = run.loop.run()
    records = run.sink.of("validation")
    assert [record["step"] for record in records] == [4, 8, 8]
    state = run.store.read_state(run.store.latest_valid())
    assert state["compared_loss"] == records[1]["loss"] == run.stopping.best_value
    assert result.validation_loss == state["validation_loss"] == records[2]["loss"]


def test_an_improvement_is_saved_when_it_is_measured(make_loop):
    run = make_loop(checkpoint_every=0, keep_last=1)
    run.loop.run()
    best = run.store.best()
    assert best is not None
    assert run.store.read_state(best)["validation_loss"] == min(line["loss"] for line in run.sink.of("validation"))


def test_steps_without_a_finite_gradient_are_reported_with_their_samples_and_end_a_diverged_run(make_loop):
    run = make_loop(steps=40, eval_every=0, checkpoint_every=0)
    with torch.no_grad():
        run.loop.step.model.hidden.weight.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match=r"10 steps in a row .* lower optim.lr"):
        run.loop.run()
    assert "samples 0 to 7" in run.sink.of("event")[0]["message"]


def test_a_micro_batch_that_does_not_divide_the_batch_is_refused_with_the_nearest(make_loop):
    with pytest.raises(
        ValueError, match=r"train.micro_batch is 3, which does not divide the 8 sequences of a step; use 2"
    ):
        make_loop(micro_batch=3)


def test_the_nearest_micro_batch_is_found_however_large_the_step_is():
    config = TrainConfig(batch_tokens=64 * 10**17, micro_batch=77)
    with pytest.raises(ValueError, match=r"train.micro_batch is 77, which does not divide .* of a step; use 80"):
        config.batch_sequences(64)


def test_bits_per_byte_counts_the_bytes_of_the_text():
    step, text = make_step(), CountingText()
    loss, bits = evaluate(step, text, batch_size=3, sequence_length=4)
    assert bits == pytest.approx(loss / 0.6931471805599453 * text.num_tokens / text.num_bytes)
    limited, limited_bits = evaluate(step, text, batch_size=3, sequence_length=4, max_tokens=12)
    assert limited_bits / limited == pytest.approx(bits / loss)


def test_resuming_a_finished_run_does_nothing_more(make_loop, tmp_path):
    first = make_loop()
    done = first.loop.run()
    again = make_loop()
    again.loop.resume(again.store.latest_valid())
    result = again.loop.run()
    assert again.text.consumed == []
    assert (result.step, result.bits_per_byte) == (done.step, done.bits_per_byte)
    assert TrainConfig().steps == 1000
