"""Recorded passes: what they are given, where their gradients lie, when they are made and given up.

A CUDA graph needs a GPU (`tests/integration/test_cuda_steps.py`); here a recording does its work again on the tensors that it was given,
and overwrites the result and the gradients that it left then, as a graph does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anarcho_model import ModelConfig
from anarcho_model.torch import GPT
from anarcho_optim import OptimConfig
from anarcho_optim.torch import MuonAdamW, param_groups
from anarcho_tokenize import Batch
from anarcho_train import StepSchedule, TrainConfig
from anarcho_train.draws import TrainingDraws
from anarcho_train.out_of_memory import OutOfMemory
from anarcho_train.steps import torch_graphs
from anarcho_train.steps.torch import TorchStep
from anarcho_train.steps.torch_graphs import WARM, Recordings, shape_of
from torch import Tensor, nn

LENGTH = 16


def leaves(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [value.values]


class Repeated(Recordings):
    """Recordings whose work is done again, in place of a graph."""

    recorded = 0

    def _captured(self, work: Any, inputs: Any) -> Any:
        self.recorded += 1
        parameters = self._parameters
        before = [p.grad for p in parameters]
        first = [None if g is None else g.clone() for g in before]
        output = work(dict(inputs))
        places = [p.grad for p in parameters]
        for old, was in zip(before, first, strict=True):
            if old is not None and was is not None:
                old.copy_(was)

        def replay() -> None:
            now = [p.grad for p in parameters]
            for parameter, old in zip(parameters, before, strict=True):
                parameter.grad = old
            again = work(dict(inputs))
            for place, new in zip(leaves(output), leaves(again), strict=True):
                place.copy_(new.detach())
            for place, parameter in zip(places, parameters, strict=True):
                if place is not None and place is not parameter.grad:
                    place.copy_(parameter.grad)
            for parameter, gradient in zip(parameters, now, strict=True):  # which a graph does not know of
                parameter.grad = gradient

        return replay, output


def make_step(cuda_graphs: Any = "auto", **settings: Any) -> TorchStep:
    model = GPT(ModelConfig(vocab_size=64, context_length=LENGTH, num_layers=2, dim=32, num_heads=2))
    model.init_weights(seed=0)
    return TorchStep(
        model,
        MuonAdamW(param_groups(model, config=OptimConfig())),
        config=TrainConfig(precision="float32", compile="off", cuda_graphs=cuda_graphs),
        save_model=lambda model, directory: torch.save(model.state_dict(), directory / "model.pt"),
        load_model=lambda model, directory: model.load_state_dict(torch.load(directory / "model.pt")),
        **settings,
    )


def recording(step: TorchStep, said: list[str] | None = None) -> Repeated:
    step._recordings = Repeated(step.model, choice=True, notify=[].append if said is None else said.append)
    return step._recordings


def batches(number: int, *, count: int = 1, rows: int = 4, length: int = LENGTH) -> list[Batch]:
    drawn = np.random.default_rng(number).integers(0, 64, (rows, length + 1)).astype(np.int32)
    weights = np.random.default_rng(number + 1000).integers(0, 2, (rows, length)).astype(np.float32)
    return [
        Batch(tokens=part[:, :-1], targets=part[:, 1:], weights=weight)
        for part, weight in zip(np.split(drawn, count), np.split(weights, count), strict=True)
    ]


def losses(step: TorchStep, numbers: range, **shape: Any) -> list[float]:
    return [step.train(batches(n, **shape), schedule=StepSchedule(lr_scale=1.0, number=n)).loss for n in numbers]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_recorded_passes_train_as_others_do(count):
    plain, recorded = make_step(), make_step()
    kept = recording(recorded)
    assert losses(recorded, range(10), count=count) == pytest.approx(losses(plain, range(10), count=count), rel=1e-5)
    assert kept.recorded == len(kept) == min(count, 2)
    for a, b in zip(plain.model.parameters(), recorded.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_shape_is_recorded_when_it_has_come_often_and_serves_its_own_batches_alone():
    step = make_step()
    kept = recording(step)
    losses(step, range(WARM))
    assert kept.recorded == 0
    losses(step, range(WARM, WARM + 2))
    assert kept.recorded == 1
    losses(step, range(WARM), rows=2)
    assert kept.recorded == 1
    losses(step, range(1), rows=2)
    assert kept.recorded == 2


def test_what_is_random_is_drawn_for_each_step():
    draws = TrainingDraws(seed=1, dim=32, neftune_alpha=10.0)
    plain, recorded = make_step(draws=draws), make_step(draws=draws)
    kept = recording(recorded)
    assert losses(recorded, range(8)) == pytest.approx(losses(plain, range(8)), rel=1e-5)
    assert kept.recorded == 1


def test_evaluations_are_recorded_and_see_the_weights_of_the_moment():
    plain, recorded = make_step(), make_step()
    kept = recording(recorded)
    for number in range(6):
        (batch,) = batches(100 + number)
        assert recorded.evaluate(batch).loss == pytest.approx(plain.evaluate(batch).loss, rel=1e-5)
        losses(plain, range(number, number + 1))
        losses(recorded, range(number, number + 1))
    assert kept.recorded == 2


def test_loaded_weights_are_read_where_they_lie(tmp_path):
    step = make_step()
    kept = recording(step)
    losses(step, range(5))
    (tmp_path / "saved").mkdir()
    step.save(tmp_path / "saved")
    after = losses(step, range(5, 8))
    step.load(tmp_path / "saved")
    assert losses(step, range(5, 8)) == pytest.approx(after, rel=1e-6)
    assert kept.recorded >= 1


def test_weights_that_have_moved_are_recorded_anew():
    step = make_step()
    kept = recording(step)
    losses(step, range(5))
    for parameter in step.model.parameters():
        parameter.data = parameter.data.clone()
    plain = make_step()
    plain.model.load_state_dict(step.model.state_dict())
    (batch,) = batches(5)
    wanted = plain.evaluate(batch).loss / batch.weights.sum()
    assert losses(step, range(5, 6)) == pytest.approx([wanted], rel=1e-5)
    assert kept.recorded == 2


def test_where_recording_fails_training_goes_on_and_says_so(monkeypatch):
    plain, step = make_step(), make_step()
    said: list[str] = []
    kept = recording(step, said)

    def fails(work: Any, inputs: Any) -> Any:
        work(dict(inputs))
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(kept, "_captured", fails)
    assert losses(step, range(6), count=2) == pytest.approx(losses(plain, range(6), count=2), rel=1e-6)
    assert len(said) == 1
    assert "could not be recorded as a CUDA graph (operation not permitted when stream is capturing); " in said[0]


def test_memory_that_runs_out_is_tried_again_without_recordings():
    said: list[str] = []
    step = make_step(notify=said.append)
    kept = recording(step)
    losses(step, range(5))
    assert len(kept) == 1
    forward, calls = step._passes.logprobs, []

    def runs_out(*arguments: Any, **named: Any) -> Tensor:
        calls.append(len(kept))
        if len(kept):
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return forward(*arguments, **named)

    step._passes.logprobs = runs_out
    (found,) = losses(step, range(5, 6), rows=2)
    assert np.isfinite(found)
    assert calls == [1, 0]
    assert said == [
        "memory ran out beside recorded passes (CUDA out of memory. Tried to allocate); they are given up, and it is tried again without"
    ]
    losses(step, range(6, 12))
    assert len(kept) == 0


def test_memory_that_runs_out_beside_a_recording_just_made_is_tried_again():
    said: list[str] = []
    step = make_step(notify=said.append)
    kept = recording(step)
    losses(step, range(WARM))
    norm = step._norm

    def runs_out() -> Tensor:
        if len(kept):
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return norm()

    step._norm = runs_out
    assert np.isfinite(losses(step, range(WARM, WARM + 2))).all()
    assert kept.recorded == 1
    assert len(said) == 1
    step._norm = lambda: torch.empty(2**60)
    with pytest.raises(OutOfMemory):  # Nothing is left to be given up.
        losses(step, range(1))


class Cuda:
    """The stream of a thread, and who allocates to which pool; ``tidy`` as PyTorch 2.15 is, else as 2.11."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, tidy: bool) -> None:
        self.stream, self.tidy, self.under_way, self.users, self.state = "default", tidy, False, 0, "fresh"
        cuda, library = torch.cuda, torch._C
        monkeypatch.setattr(cuda, "CUDAGraph", lambda: Graph(self))
        monkeypatch.setattr(torch_graphs, "_capture_stream", lambda device: SimpleNamespace(device=device))
        monkeypatch.setattr(cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(cuda, "stream", self.on_stream)
        monkeypatch.setattr(cuda, "synchronize", lambda: None)
        monkeypatch.setattr(cuda, "default_generators", {1: self}, raising=False)
        monkeypatch.setattr(library, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(library, "_cuda_releasePool", self.release, raising=False)

    @contextmanager
    def on_stream(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, str(stream.device)
        try:
            yield
        finally:
            self.stream = before

    def end(self, device: int, pool: str) -> None:
        assert (device, pool) == (1, "pool")
        if not self.under_way:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.under_way = False

    def release(self, device: int, pool: str) -> None:
        assert (device, pool) == (1, "pool")
        self.users -= 1

    def clone_state(self) -> str:
        return "fresh"

    def graphsafe_set_state(self, state: str) -> None:
        self.state = state


class Graph:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.ended, self.valid = cuda, False, True

    def capture_begin(self, *, pool: str, capture_error_mode: str) -> None:
        assert self.cuda.stream == "cuda:1"
        self.cuda.under_way, self.cuda.state = True, "capturing"
        self.cuda.users += 1

    def capture_end(self) -> None:
        if not self.valid:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.cuda.under_way, self.cuda.state, self.ended = False, "fresh", True

    def reset(self) -> None:
        if self.ended or self.cuda.tidy:
            self.cuda.users -= 1
            self.cuda.under_way, self.cuda.state, self.ended = False, "fresh", False


@pytest.mark.parametrize("tidy", [False, True], ids=["2.11", "2.15"])
@pytest.mark.parametrize("invalid", [False, True], ids=["other failure", "invalidated"])
def test_a_capture_that_fails_leaves_everything_as_before_and_says_what_failed_first(monkeypatch, tidy, invalid):
    cuda = Cuda(monkeypatch, tidy=tidy)
    made: list[Graph] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(Graph(cuda)) or made[-1])

    def fails() -> None:
        assert cuda.stream == "cuda:1"
        made[0].valid = not invalid
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="operation not permitted"):
        torch_graphs._capture(fails, device=torch.device("cuda:1"), pool="pool")
    assert (cuda.stream, cuda.under_way, cuda.users, cuda.state) == ("default", False, 0, "fresh")


def test_a_capture_runs_on_a_stream_of_its_own_device(monkeypatch):
    cuda = Cuda(monkeypatch, tidy=True)
    graph, output = torch_graphs._capture(lambda: cuda.stream, device=torch.device("cuda:1"), pool="pool")
    assert output == "cuda:1"
    assert graph.ended
    assert (cuda.stream, cuda.users) == ("default", 1)


@pytest.mark.parametrize("float8", [False, True])
def test_what_is_lost_with_compilation_is_said(float8):
    said: list[str] = []
    step = make_step(notify=said.append)
    step.model.float8 = float8
    step._leave_compilation(RuntimeError("no compiler\nmore"))
    lost = ", and without 8-bit products" if float8 else ""
    assert said == [f"torch.compile failed here (no compiler); training goes on without it{lost}"]


def use_events(monkeypatch: pytest.MonkeyPatch, *, milliseconds: float) -> None:
    """The device takes so long for each pass."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "stream of cpu"

        def query(self) -> bool:
            return True

        def elapsed_time(self, end: Event) -> float:
            return milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")


@pytest.mark.parametrize(("milliseconds", "host_bound"), [(1e-6, True), (1e6, False)])
def test_auto_records_what_the_host_slows_down(monkeypatch, milliseconds, host_bound):
    use_events(monkeypatch, milliseconds=milliseconds)
    found = Recordings(nn.Linear(2, 2), choice="auto", notify=print)
    for _ in range(WARM):
        assert not found.wants("kind")
        with found.watched("kind"):
            pass
    assert found.wants("kind") == host_bound


def test_auto_keeps_what_it_has_measured_of_each_kind(monkeypatch):
    use_events(monkeypatch, milliseconds=1e-6)
    found = Recordings(nn.Linear(2, 2), choice="auto", notify=print)
    for _ in range(WARM):
        for kind in ("training", "evaluation"):
            assert not found.wants(kind)
            with found.watched(kind):
                pass
    assert found.wants("training")
    assert found.wants("evaluation")


def test_passes_without_gradients_neither_keep_those_of_others_nor_set_them():
    step = make_step()
    kept = recording(step)
    losses(step, range(2))
    (batch,) = batches(100)
    for _ in range(WARM + 1):
        step.evaluate(batch)
    assert kept.recorded == 1
    assert [made.gradients for made in kept._recorded.values()] == [[]]
    losses(step, range(2, 5))
    (training,) = (made.gradients for made in kept._recorded.values() if made.gradients)
    assert [id(parameter) for parameter, _ in training] == [id(parameter) for parameter in step.model.parameters()]
    step.optimizer.zero_grad(set_to_none=True)
    step.evaluate(batch)
    assert all(parameter.grad is None for parameter in step.model.parameters())


def test_what_makes_graphs_is_lent_anew_with_each_recording(monkeypatch):
    """Or the update's graph, recorded before, would write where the gradients of a new kind of passes lie."""
    lent: list[Any] = []
    step = make_step()
    kept = recording(step)
    kept._lend, kept._pool = lent.append, "pool"
    losses(step, range(WARM + 1), count=2)
    assert len(lent) == 2
    losses(step, range(WARM + 1), rows=2)
    assert len(lent) == 3
    monkeypatch.setattr(
        torch_graphs, "_capture", lambda work, *, device, pool: (f"graph in the {pool} of {device}", work())
    )
    assert [record(lambda: None) for record in lent] == ["graph in the pool of cpu"] * 3
    losses(step, range(5, 8), rows=2)
    kept.stop()
    assert lent[3:] == [None]


def test_a_run_of_many_shapes_records_the_first_few(monkeypatch):
    monkeypatch.setattr(torch_graphs, "MAX_KINDS", 2)
    found = Recordings(nn.Linear(2, 2), choice=True, notify=print)
    for kind in "abc":
        for _ in range(WARM):
            with found.watched(kind):
                pass
    assert [found.wants(kind) for kind in "abcab"] == [True, True, False, True, True]


def test_kinds_that_keep_many_gradients_are_few(monkeypatch):
    monkeypatch.setattr(torch_graphs, "MAX_GRADIENT_BYTES", 1)
    step = make_step()
    kept = recording(step)
    for rows in (4, 2):
        losses(step, range(WARM + 2), rows=rows)
    assert kept.recorded == 1


def test_a_wish_that_cannot_be_fulfilled_is_answered_in_one_sentence():
    said: list[str] = []
    make_step(notify=said.append)
    assert not said
    make_step(notify=said.append, cuda_graphs=True)
    assert len(said) == 1
    assert said[0].startswith("train.cuda_graphs is true, but the device is cpu")


def test_the_choice_is_checked():
    with pytest.raises(ValueError, match=r"train\.cuda_graphs is 'on'; expected true, false or 'auto'"):
        TrainConfig(cuda_graphs="on")


def test_arrays_of_one_shape_have_one_recording():
    a, b = np.zeros((2, 3), np.int32), np.ones((2, 3), np.int32)
    assert shape_of({"tokens": a}) == shape_of({"tokens": b}) != shape_of({"tokens": a.astype(np.int64)})
    assert shape_of({"tokens": a}) != shape_of({"tokens": a, "segments": b})
