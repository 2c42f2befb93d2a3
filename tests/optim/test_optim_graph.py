"""Where a step cannot be recorded, its kernels are launched as before; with a GPU, `test_optim_cuda` does so with real graphs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from anarcho_optim.torch import fused as fused_module  # noqa: E402
from anarcho_optim.torch.fused import FusedStep  # noqa: E402


class Launches(FusedStep):
    done = 0

    def _launch(self, plan: Any) -> None:
        self.done += 1


def make_plan() -> Any:
    return SimpleNamespace(graph=None, runs=0, settings=SimpleNamespace(device="cuda:0"))


def test_what_is_given_to_make_a_graph_makes_it_once_until_it_is_given_again():
    made: list[Callable[[], None]] = []

    def record(work: Callable[[], None]) -> Any:
        made.append(work)
        return SimpleNamespace(replay=work)

    plan, step = make_plan(), Launches(cuda_graph=False, process_group=None)
    step._plan = plan
    step.use_graph(record)
    for _ in range(3):
        step._run(plan)
    assert (len(made), step.done, plan.runs) == (1, 3, 3)
    step.use_graph(record)
    step._run(plan)
    assert (len(made), step.done) == (2, 4)
    step.use_graph(None)
    step._run(plan)
    assert (len(made), step.done, plan.graph) == (2, 5, None)


def test_a_step_that_cannot_be_recorded_is_launched_from_then_on():
    tried: list[str] = []

    def fails(name: str) -> Callable[[Any], Any]:
        def record(work: Any) -> Any:
            tried.append(name)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore of it")

        return record

    plan, step = make_plan(), Launches(cuda_graph=False, process_group=None)
    step.use_graph(fails("first"))
    step._run(plan)
    with pytest.warns(
        UserWarning, match=r"could not be recorded as a CUDA graph \(CUDA out of memory. Tried to allocate\);"
    ):
        step._run(plan)
    step.use_graph(fails("second"))
    step._run(plan)
    assert tried == ["first"]
    assert (step.done, plan.runs, plan.graph) == (3, 3, None)


def test_a_graph_that_was_asked_for_by_name_is_not_given_up(monkeypatch):
    tried: list[str] = []

    def fails(work: Any, *, device: str) -> Any:
        tried.append(device)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fused_module, "_capture", fails)
    plan, step = make_plan(), Launches(cuda_graph=True, process_group=None)
    step._run(plan)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            step._run(plan)
    assert tried == ["cuda:0"] * 2
    assert (step.done, plan.runs, plan.graph) == (1, 1, None)
