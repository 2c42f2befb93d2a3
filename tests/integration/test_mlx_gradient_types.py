"""In half precision, gradients of cast weights stay in that type until they are used: nothing is lost, and updates are the same bits."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("mlx.core")

import mlx.core as mx
from anarcho_model import ModelConfig
from anarcho_model.mlx import GPT
from anarcho_optim import OptimConfig
from anarcho_optim.mlx import MuonAdamW, param_groups
from anarcho_train import OutOfMemory, StepSchedule, TrainConfig
from anarcho_train.steps import mlx as steps
from mlx.utils import tree_flatten

LENGTH, ROWS, VOCABULARY = 8, 2, 29
CONFIG = ModelConfig(
    vocab_size=VOCABULARY, context_length=LENGTH, num_layers=2, dim=16, num_heads=2, tie_embeddings=False
)


class Rows(NamedTuple):
    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    positions: None = None
    segments: None = None


def batches(number: int) -> list[Rows]:
    ids = np.random.default_rng(number).integers(0, VOCABULARY, (number, ROWS, LENGTH + 1), dtype=np.int32)
    return [Rows(rows[:, :-1], rows[:, 1:], np.ones((ROWS, LENGTH), np.float32)) for rows in ids]


def new_step(*, layers: int = 2, compiled: str = "off") -> steps.MlxStep:
    model = GPT(dataclasses.replace(CONFIG, num_layers=layers))
    model.init_weights(seed=1)
    return steps.MlxStep(
        model,
        MuonAdamW(param_groups(model, config=OptimConfig(lr=0.01, ns_dtype="float32"))),
        config=TrainConfig(precision="bfloat16", compile=compiled),
        save_model=lambda model, directory: None,
        load_model=lambda model, directory: None,
    )


def numbers(step: steps.MlxStep) -> dict[str, np.ndarray]:
    trees: Any = (step.model.parameters(), step.optimizer.state)
    return {
        f"{index}.{name}": np.array(array) for index, tree in enumerate(trees) for name, array in tree_flatten(tree)
    }


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_update_is_that_of_gradients_in_float32(micro_batches: int) -> None:
    step, wide = new_step(), new_step()
    wide._narrowed = lambda parameters: parameters
    for number in range(2):
        schedule = StepSchedule(lr_scale=1.0, number=number)
        ours, theirs = (each.train(batches(micro_batches), schedule=schedule) for each in (step, wide))
        assert (ours.loss, ours.grad_norm) == (theirs.loss, theirs.grad_norm)
    mine, others = numbers(step), numbers(wide)
    assert all(np.array_equal(mine[name], others[name]) for name in others)
    assert mine["0.model.layers.0.mlp.up_proj.weight"].dtype == np.float32


@pytest.mark.parametrize("compiled", ["on", "off"])
def test_a_backward_that_finds_no_memory_leaves_weights_and_state(
    compiled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = new_step(layers=1, compiled=compiled)
    step.train(batches(1), schedule=StepSchedule(lr_scale=1.0))
    before, submit = numbers(step), mx.async_eval

    def fail(*arrays: Any) -> None:
        if len(arrays) == 3:  # norm, decision and gradients, when the update has been put together
            raise RuntimeError("[malloc] Unable to allocate 99 bytes.")
        submit(*arrays)

    monkeypatch.setattr(steps.mx, "async_eval", fail)
    with pytest.raises(OutOfMemory):
        step.train(batches(1), schedule=StepSchedule(lr_scale=1.0, number=1))
    monkeypatch.undo()
    after = numbers(step)
    assert all(np.array_equal(after[name], before[name]) for name in before)
    again, straight = (
        step.train(batches(1), schedule=StepSchedule(lr_scale=1.0, number=1)),
        new_step(layers=1, compiled=compiled),
    )
    for number in range(2):
        expected = straight.train(batches(1), schedule=StepSchedule(lr_scale=1.0, number=number))
    assert again.loss == expected.loss
    assert all(np.array_equal(array, numbers(straight)[name]) for name, array in numbers(step).items())
