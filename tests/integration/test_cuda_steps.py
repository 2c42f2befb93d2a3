"""On CUDA, steps follow each other without waiting for the device but where their numbers are read, and without compiling again."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from anarcho_model import ModelConfig
from anarcho_model.torch import GPT
from anarcho_optim import OptimConfig, schedules
from anarcho_optim.torch import MuonAdamW, param_groups
from anarcho_optim.torch.fused import FusedStep
from anarcho_tokenize import Batch
from anarcho_train import StepSchedule, TrainConfig
from anarcho_train.steps.torch import TorchStep
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

STEPS, PROFILED, WARM, LENGTH = 500, 50, 5, 64
OPTIM = OptimConfig(warmup_steps=100)


def make_step(device: str = "cuda", **settings: Any) -> TorchStep:
    model = GPT(ModelConfig(vocab_size=512, context_length=LENGTH, num_layers=2, dim=64, num_heads=2))
    model.init_weights(seed=0)
    model.gradient_checkpointing = settings.pop("checkpointing", False)
    model.to(device, torch.bfloat16 if settings.get("lean") else torch.float32)
    narrow = {"state_dtype": torch.bfloat16, "stochastic_rounding": True} if settings.get("lean") else {}
    options = {"precision": "bfloat16", "compile": "on", "batch_tokens": 8 * LENGTH, "cuda_graphs": False, **settings}
    return TorchStep(
        model,
        MuonAdamW(param_groups(model, config=OPTIM), **narrow),
        config=TrainConfig(**options),
        save_model=lambda model, directory: None,
        load_model=lambda model, directory: None,
    )


def train(step: TorchStep, numbers: range, *, micro_batches: int) -> list[float]:
    losses = []
    for number in numbers:
        drawn = np.random.default_rng(number).integers(0, 512, (8, LENGTH + 1)).astype(np.int32)
        parts = [
            Batch(tokens=rows[:, :-1], targets=rows[:, 1:], weights=np.ones((len(rows), LENGTH), np.float32))
            for rows in np.split(drawn, micro_batches)
        ]
        schedule = StepSchedule(
            lr_scale=schedules.lr_scale(OPTIM, number, total_steps=STEPS),
            momentum=schedules.momentum(OPTIM, number),
            number=number,
            max_loss=100.0,
        )
        losses.append(step.train(parts, schedule=schedule).loss)
    return losses


@pytest.mark.parametrize(
    ("settings", "micro_batches"),
    [
        ({}, 1),
        ({}, 2),
        ({"checkpointing": True}, 1),
        ({"compile": "off"}, 1),
        ({"lean": True}, 1),
        ({"update_in_backward": True, "grad_clip": 0.0}, 1),
        ({"cuda_graphs": True}, 1),
        ({"cuda_graphs": True, "checkpointing": True}, 2),
        ({"cuda_graphs": True, "compile": "off", "lean": True}, 2),
    ],
    ids=[
        "one micro-batch",
        "two",
        "checkpointing",
        "uncompiled",
        "lean",
        "in backward",
        "recorded",
        "recorded two, checkpointing",
        "recorded two, uncompiled, lean",
    ],
)
def test_500_steps_wait_for_nothing_but_their_numbers_and_compile_nothing(settings, micro_batches):
    torch._dynamo.reset()
    step = make_step(**settings)
    train(step, range(WARM), micro_batches=micro_batches)
    graphs = counters["stats"]["unique_graphs"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = train(step, range(WARM, WARM + STEPS), micro_batches=micro_batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.isfinite(losses).all()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        train(step, range(PROFILED), micro_batches=micro_batches)
        torch.cuda.synchronize()
    called = Counter(event.key for event in profiler.events())
    # The profiler itself waits for the device where it begins and ends.
    assert called["cudaStreamSynchronize"] == 0
    assert called["cudaDeviceSynchronize"] <= 3
    assert called["cudaEventSynchronize"] <= PROFILED
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"checkpointing": True}, {"compile": "off"}], ids=["whole", "parts", "eager"])
def test_recorded_passes_compute_what_others_do(settings, micro_batches):
    torch._dynamo.reset()
    plain, recorded = (make_step(**settings, cuda_graphs=choice) for choice in (False, True))
    for numbers in (range(3), range(3, 30)):
        wanted, found = (train(step, numbers, micro_batches=micro_batches) for step in (plain, recorded))
        assert found == pytest.approx(wanted, rel=1e-4)
    assert len(recorded._recordings) == micro_batches
    for a, b in zip(plain.model.parameters(), recorded.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_gradients_of_passes_that_are_recorded_late_are_not_written_over_by_the_update():
    torch._dynamo.reset()
    plain, recorded = (make_step(cuda_graphs=choice) for choice in (False, True))
    for numbers, micro_batches in ((range(8), 1), (range(8, 16), 2), (range(16, 24), 4), (range(24, 32), 2)):
        wanted, found = (train(step, numbers, micro_batches=micro_batches) for step in (plain, recorded))
        assert found == pytest.approx(wanted, rel=1e-4)
    assert len(recorded._recordings) == 5
    for a, b in zip(plain.model.parameters(), recorded.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_evaluations_beside_recorded_steps_see_the_weights_of_the_moment():
    torch._dynamo.reset()
    plain, recorded = (make_step(cuda_graphs=choice) for choice in (False, True))
    tokens = np.random.default_rng(1).integers(0, 512, (8, LENGTH + 1)).astype(np.int32)
    held_out = Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:], weights=np.ones((8, LENGTH), np.float32))
    for number in range(12):
        for step in (plain, recorded):
            train(step, range(number, number + 1), micro_batches=1)
        assert recorded.evaluate(held_out).loss == pytest.approx(plain.evaluate(held_out).loss, rel=1e-4)
    assert len(recorded._recordings) == 2


def test_auto_records_small_batches_and_trains_on_after_memory_ran_out():
    torch._dynamo.reset()
    step = make_step(cuda_graphs="auto", checkpointing=True)
    train(step, range(8), micro_batches=1)
    assert len(step._recordings) == 1
    forward, calls = step._parts._logprobs, []

    def runs_out(*tensors: Any, **named: Any) -> Any:
        calls.append(len(step._recordings))
        if len(step._recordings):
            torch.empty(2**50, device="cuda")
        return forward(*tensors, **named)

    step._parts._logprobs = runs_out
    assert np.isfinite(train(step, range(8, 12), micro_batches=2)).all()
    assert calls[:2] == [1, 0]
    assert len(step._recordings) == 0


@pytest.mark.parametrize("settings", [{}, {"lean": True}], ids=["float32", "lean"])
def test_a_loss_that_waits_ends_the_recordings_and_nothing_else(settings):
    plain, recorded = (make_step(**settings, compile="off", cuda_graphs=choice) for choice in (False, True))
    said: list[str] = []
    recorded._recordings._notify = said.append
    for step in (plain, recorded):
        torch.manual_seed(0)
        train(step, range(8), micro_batches=1)
    assert len(recorded._recordings) == 1
    stream, pool = torch.cuda.current_stream(), recorded._recordings._pool
    assert held(pool) > 0
    for step in (plain, recorded):
        loss_of = step._passes.loss_of

        def waits(*tensors: Any, loss_of: Any = loss_of, **named: Any) -> Any:
            loss, measures = loss_of(*tensors, **named)
            assert np.isfinite(loss.item())
            return loss, measures

        step._passes.loss_of = waits
    found = {}
    for step in (plain, recorded):
        torch.manual_seed(1)
        found[step] = train(step, range(8, 20), micro_batches=2)
    assert len(said) == 1
    assert "when stream is capturing" in said[0]
    assert len(recorded._recordings) == 0
    assert torch.cuda.current_stream() == stream
    assert held(pool) == 0
    assert found[recorded] == pytest.approx(found[plain], rel=1e-2 if settings else 1e-4)
    other = make_step(cuda_graphs=True, compile="off")
    train(other, range(8), micro_batches=1)
    assert len(other._recordings) == 1


@pytest.mark.parametrize("settings", [{}, {"lean": True}], ids=["float32", "lean"])
def test_an_update_that_waits_is_launched_as_before_and_passes_stay_recorded(settings, monkeypatch):
    plain, recorded = (make_step(**settings, compile="off", cuda_graphs=choice) for choice in (False, True))
    launch = FusedStep._launch

    def waits(step: Any, plan: Any) -> None:
        launch(step, plan)
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream().synchronize()

    monkeypatch.setattr(FusedStep, "_launch", waits)
    stream, found = torch.cuda.current_stream(), []
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="when stream is capturing"):
        found.append(train(recorded, range(12), micro_batches=1))
    torch.manual_seed(0)
    found.append(train(plain, range(12), micro_batches=1))
    assert len(recorded._recordings) == 1
    assert torch.cuda.current_stream() == stream
    assert found[0] == pytest.approx(found[1], rel=1e-2 if settings else 1e-4)


def held(pool: Any) -> int:
    """Bytes of a pool of graphs that the device has not got back."""
    gc.collect()
    torch.cuda.empty_cache()
    segments = torch.cuda.memory_snapshot()
    return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == tuple(pool))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_a_model_on_another_device_than_the_current_one_is_trained():
    plain, recorded = (make_step("cuda:1", compile="off", cuda_graphs=choice) for choice in (False, True))
    assert torch.cuda.current_device() == 0
    wanted, found = (train(step, range(12), micro_batches=2) for step in (plain, recorded))
    assert len(recorded._recordings) == 2
    assert found == pytest.approx(wanted, rel=1e-4)
