"""Where a step cannot be captured, its kernels are launched as before; with a GPU, `test_optim_cuda` does so with real graphs."""

from __future__ import annotations

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


def fail(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    tried: list[Any] = []

    def fails(work: Any, *, device: Any, pool: Any) -> Any:
        tried.append(pool)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore of it")

    monkeypatch.setattr(fused_module, "capture", fails)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "own pool")
    return tried


def test_a_step_that_cannot_be_captured_is_launched_from_then_on(monkeypatch):
    tried, plan = fail(monkeypatch), make_plan()
    step = Launches(cuda_graph=False, process_group=None)
    step.use_graph("pool")
    step._run(plan)
    with pytest.warns(
        UserWarning, match=r"could not be recorded as a CUDA graph \(CUDA out of memory. Tried to allocate\);"
    ):
        step._run(plan)
    step.use_graph("another pool")
    step._run(plan)
    assert tried == ["pool"]
    assert (step.done, plan.runs, plan.graph) == (3, 3, None)


def test_a_graph_that_was_asked_for_by_name_is_not_given_up(monkeypatch):
    tried, plan = fail(monkeypatch), make_plan()
    step = Launches(cuda_graph=True, process_group=None)
    step._run(plan)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            step._run(plan)
    assert tried == ["own pool"] * 2
    assert (step.done, plan.runs, plan.graph) == (1, 1, None)
