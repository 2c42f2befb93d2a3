"""A compiled run compiles in its first step and its first evaluation, and never again."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from anarcho_model import ModelConfig
from anarcho_model.torch import GPT
from anarcho_optim import OptimConfig, schedules
from anarcho_optim.torch import MuonAdamW, param_groups
from anarcho_tokenize import Batch
from anarcho_train import CheckpointStore, Loop, StepSchedule, TrainConfig
from anarcho_train.steps.torch import TorchStep

STEPS, EVALUATIONS, LENGTH = 40, 10, 16
OPTIM = OptimConfig(warmup_steps=10)


class Text:
    """Random tokens; an evaluation ends with a batch that is not full."""

    num_windows, num_tokens, num_bytes = 5, 5 * LENGTH, 20 * LENGTH

    def batch(self, first_sample: int, count: int) -> Batch:
        drawn = np.random.default_rng(first_sample).integers(0, 50, (count, LENGTH + 1)).astype(np.int32)
        return Batch(tokens=drawn[:, :-1], targets=drawn[:, 1:], weights=np.ones((count, LENGTH), np.float32))

    def position(self, sample: int) -> dict[str, int]:
        return {"cursor": sample}

    def state(self, first_sample: int, count: int) -> Literal["ready"]:
        return "ready"

    def batches(self, batch_size: int, *, max_windows: int | None = None) -> Iterator[Batch]:
        for first in range(0, self.num_windows, batch_size):
            yield self.batch(first, min(batch_size, self.num_windows - first))


class Record:
    """A sink that notes how many graphs had been compiled at each line of metrics."""

    def __init__(self, graphs: list[Any]) -> None:
        self.graphs, self.seen = graphs, []

    def write(self, kind: str, *, step: int, tokens: int, **values: Any) -> None:
        self.seen.append((kind, step, len(self.graphs)))


class Never:
    def __init__(self) -> None:
        self.best_value: float | None = None
        self.best_step: int | None = None

    def update(self, value: float, step: int) -> bool:
        return False

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def test_nothing_is_compiled_after_the_first_step_and_the_first_evaluation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    model = GPT(ModelConfig(vocab_size=50, context_length=LENGTH, num_layers=1, dim=16, num_heads=2, qk_norm=True))
    model.init_weights(seed=0)
    config = TrainConfig(
        steps=STEPS,
        batch_tokens=8 * LENGTH,
        micro_batch=4,
        eval_every=STEPS // EVALUATIONS,
        checkpoint_every=STEPS // 2,
        log_every=1,
        precision="bfloat16",
        compile="on",
    )
    record = Record(graphs)
    step = TorchStep(
        model,
        MuonAdamW(param_groups(model, config=OPTIM)),
        config=config,
        save_model=lambda model, directory: torch.save(model.state_dict(), directory / "model.pt"),
        load_model=lambda model, directory: None,
    )
    result = Loop(
        step=step,
        batches=Text(),
        validation=Text(),
        schedule=lambda number: StepSchedule(
            lr_scale=schedules.lr_scale(OPTIM, number, total_steps=STEPS),
            momentum=schedules.momentum(OPTIM, number),
            number=number,
        ),
        config=config,
        sequence_length=LENGTH,
        checkpoints=CheckpointStore(tmp_path),
        sink=record,
        early_stopping=Never(),
    ).run()
    assert result.step == STEPS
    evaluations = [(number, compiled) for kind, number, compiled in record.seen if kind == "validation"]
    assert len(evaluations) >= EVALUATIONS
    assert graphs
    assert len(graphs) == evaluations[0][1]
    assert len(graphs) <= 2, "a graph for training and one for the batch that is not full"
