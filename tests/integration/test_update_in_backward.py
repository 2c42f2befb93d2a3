"""Updates within the backward pass: the same weights, of which one part's gradients exist at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from anarcho_model import ModelConfig
from anarcho_model.torch import GPT
from anarcho_optim.torch import MuonAdamW, param_groups
from anarcho_tokenize import Batch
from anarcho_train import StepSchedule, TrainConfig
from anarcho_train.out_of_memory import OutOfMemory
from anarcho_train.steps.torch import TorchStep

MODEL = ModelConfig(vocab_size=64, context_length=32, num_layers=3, dim=32, num_heads=2, hidden_dim=64)


def make_step(*, at_once: bool, tied: bool = True, checkpointing: bool = False, **options: Any) -> TorchStep:
    model = GPT(ModelConfig(**{**vars(MODEL), "tie_embeddings": tied}))
    model.init_weights(seed=1)
    model.gradient_checkpointing = checkpointing
    settings = {"precision": "bfloat16", "compile": "off", "grad_clip": 0.0, "batch_tokens": 128, **options}
    return TorchStep(
        model,
        MuonAdamW(param_groups(model)),
        config=TrainConfig(**settings, update_in_backward=at_once),
        save_model=lambda model, directory: None,
        load_model=lambda model, directory: None,
    )


def batches(number: int, *, micro: int = 4) -> list[Batch]:
    tokens = np.random.default_rng(number).integers(0, 64, (4, 33))
    whole = [(tokens[i : i + micro, :-1], tokens[i : i + micro, 1:]) for i in range(0, 4, micro)]
    return [Batch(tokens=x, targets=y, weights=np.ones(x.shape, np.float32)) for x, y in whole]


def train(step: TorchStep, *, steps: int = 3, micro: int = 4, **schedule: Any) -> list[Any]:
    return [
        step.train(batches(number, micro=micro), schedule=StepSchedule(lr_scale=1.0, number=number, **schedule))
        for number in range(steps)
    ]


def weights(step: TorchStep) -> list[torch.Tensor]:
    return [p.detach().clone() for p in step.model.parameters()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("tied", "micro"), [(True, 4), (False, 4), (True, 2)])
def test_the_weights_and_what_is_measured_are_those_of_an_update_afterwards(tied, micro, checkpointing):
    kind = {"tied": tied, "checkpointing": checkpointing, "precision": "float32"}
    ours, theirs = make_step(at_once=True, **kind), make_step(at_once=False, **kind)
    for one, other in zip(train(ours, micro=micro), train(theirs, micro=micro), strict=True):
        assert one.loss == other.loss
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
        assert not one.skipped
    for one, other in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert all(p.grad is None for p in ours.model.parameters())


def test_one_parts_gradients_exist_at_a_time():
    step = make_step(at_once=True, tied=False)
    alive: list[int] = []
    optimizer: Any = step.optimizer
    inner = optimizer.step_of

    def step_of(part):
        alive.append(sum(p.grad is not None for p in step.model.parameters()))
        inner(part)

    optimizer.step_of = step_of
    train(step, steps=1)
    largest = max(len(part) for part in step.model.update_parts())
    assert len(alive) == len(step.model.update_parts())
    assert max(alive) <= largest + 1


def test_a_loss_that_is_too_large_or_not_finite_changes_nothing():
    step = make_step(at_once=True)
    before = weights(step)
    (metrics,) = train(step, steps=1, max_loss=0.1)
    assert metrics.skipped
    (batch,) = batches(0)
    batch.weights[0, 0] = np.inf
    assert step.train([batch], schedule=StepSchedule(lr_scale=1.0)).skipped
    assert all(torch.equal(one, other) for one, other in zip(weights(step), before, strict=True))
    assert not train(step, steps=1)[0].skipped


def test_a_gradient_that_is_not_finite_leaves_its_part_alone_and_is_reported():
    step = make_step(at_once=True, precision="float32")
    block = step.model.model.layers[1]
    block.mlp.down_proj.weight.register_hook(lambda gradient: gradient * float("nan"))
    before = [p.detach().clone() for p in block.parameters()]
    (metrics,) = train(step, steps=1)
    assert metrics.skipped
    assert not np.isfinite(metrics.grad_norm)
    assert all(torch.equal(p, old) for p, old in zip(block.parameters(), before, strict=True))
    assert all(p.isfinite().all() for p in step.model.parameters())


def test_memory_that_runs_out_meanwhile_leaves_a_torn_state():
    step = make_step(at_once=True)
    optimizer: Any = step.optimizer
    inner, calls = optimizer.step_of, []

    def step_of(part):
        calls.append(part)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        inner(part)

    optimizer.step_of = step_of
    with pytest.raises(OutOfMemory) as raised:
        train(step, steps=1)
    assert raised.value.torn
    assert not train(step, steps=1)[0].skipped


def test_the_size_of_the_update_is_that_of_one_afterwards():
    found = [train(make_step(at_once=kind), steps=1, measure_update=True)[0].update_ratios for kind in (True, False)]
    assert found[0].keys() == found[1].keys()
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"train\.update_in_backward is true and train\.grad_clip is 1\.0"):
        make_step(at_once=True, grad_clip=1.0)
    model = GPT(MODEL)
    with pytest.raises(ValueError, match=r"SGD has no step_of; expected anarcho_optim's MuonAdamW"):
        TorchStep(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            config=TrainConfig(grad_clip=0.0, update_in_backward=True),
            save_model=lambda model, directory: None,
            load_model=lambda model, directory: None,
        )
