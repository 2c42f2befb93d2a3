"""Gradients in the compute type: the same numbers in half the memory, where a step has one micro-batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from anarcho_model import ModelConfig
from anarcho_model.torch import GPT
from anarcho_optim.torch import MuonAdamW, param_groups
from anarcho_tokenize import Batch
from anarcho_train import StepSchedule, TrainConfig
from anarcho_train.steps.torch import TorchStep
from anarcho_train.steps.torch_gradients import total_norm

MODEL = ModelConfig(vocab_size=64, context_length=32, num_layers=2, dim=32, num_heads=2, hidden_dim=64)


def make_step(*, precision: str = "bfloat16", grad_clip: float = 0.0, checkpointing: bool = True) -> TorchStep:
    model = GPT(MODEL)
    model.init_weights(seed=1)
    model.gradient_checkpointing = checkpointing
    return TorchStep(
        model,
        MuonAdamW(param_groups(model)),
        config=TrainConfig(precision=precision, compile="off", batch_tokens=128, grad_clip=grad_clip),
        save_model=lambda model, directory: None,
        load_model=lambda model, directory: None,
    )


def batches(number: int, *, micro: int = 4) -> list[Batch]:
    tokens = np.random.default_rng(number).integers(0, 64, (4, 33))
    whole = [(tokens[i : i + micro, :-1], tokens[i : i + micro, 1:]) for i in range(0, 4, micro)]
    return [Batch(tokens=x, targets=y, weights=np.ones(x.shape, np.float32)) for x, y in whole]


def gradient_types(step: TorchStep) -> set[tuple[torch.dtype, bool]]:
    named = {id(p) for p in step.model.product_weights()}
    return {(p.grad.dtype, id(p) in named) for p in step.model.parameters() if p.grad is not None}


def train(step: TorchStep, *, steps: int = 3, micro: int = 4) -> list[torch.Tensor]:
    for number in range(steps):
        step.train(batches(number, micro=micro), schedule=StepSchedule(lr_scale=1.0, number=number))
    return [p.detach().clone() for p in step.model.parameters()]


def test_narrow_gradients_give_the_very_weights_of_wide_ones():
    narrow, wide = make_step(), make_step()
    wide._gradients._weights = []
    for ours, theirs in zip(train(narrow), train(wide), strict=True):
        assert torch.equal(ours, theirs)
    assert gradient_types(narrow) == {(torch.bfloat16, True), (torch.float32, False)}
    assert {dtype for dtype, _ in gradient_types(wide)} == {torch.float32}


def test_sums_over_micro_batches_stay_wide_and_so_do_float32_products_and_a_cpu_that_saves_no_memory():
    step = make_step()
    train(step, steps=1)
    train(step, steps=1, micro=2)
    assert {dtype for dtype, _ in gradient_types(step)} == {torch.float32}
    for other in (make_step(precision="float32"), make_step(checkpointing=False)):
        train(other, steps=1)
        assert {dtype for dtype, _ in gradient_types(other)} == {torch.float32}


def test_clipping_bounds_the_update_alike_and_leaves_narrow_gradients_as_they_are():
    narrow, wide = make_step(grad_clip=0.01), make_step(grad_clip=0.01)
    wide._gradients._weights = []
    for ours, theirs in zip(train(narrow), train(wide), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    norm = total_norm([p.grad for p in narrow.model.parameters()])
    assert norm > 0.05
    assert total_norm([p.grad for p in wide.model.parameters()]) == pytest.approx(0.01, rel=1e-3)


def test_the_norm_of_narrow_gradients_is_a_float32_number():
    gradients = [torch.randn(300, 300).bfloat16(), torch.randn(50)]
    expected = sum(float((g.double() ** 2).sum()) for g in gradients) ** 0.5
    norm = total_norm(gradients)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(expected, rel=1e-5)
