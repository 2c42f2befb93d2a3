"""What a gradient scaler says of a step: torch's own protocol of fused optimizers, ``found_inf`` and ``grad_scale``."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from anarcho_optim import OptimConfig
from anarcho_optim.torch import MuonAdamW, param_groups
from torch import Tensor, nn

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]
CONFIG = OptimConfig(lr=0.02, adamw_lr=0.01, weight_decay=0.1)


def model_with_gradients(device: str, *, normuon: bool = False) -> tuple[nn.Module, MuonAdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(24, 16), nn.Linear(16, 32, bias=False), nn.Linear(32, 16), nn.LayerNorm(16)).to(
        device
    )
    optimizer: Any = MuonAdamW(param_groups(model, config=dataclasses.replace(CONFIG, normuon=normuon)))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model, optimizer


def numbers(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *state)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("normuon", [False, True])
def test_a_step_that_is_found_infinite_changes_nothing(device: str, normuon: bool) -> None:
    model, optimizer = model_with_gradients(device, normuon=normuon)
    optimizer.step()
    before = numbers(model, optimizer)
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.fill_(float("nan"))
    optimizer.found_inf, optimizer.grad_scale = torch.ones((), device=device), None
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, numbers(model, optimizer), strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_divided_by_the_scale_and_stay_as_they_are(device: str) -> None:
    model, optimizer = model_with_gradients(device)
    other = copy.deepcopy(model)
    scaled: Any = MuonAdamW(param_groups(other, config=CONFIG))
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert parameter.grad is not None
        twin.grad = parameter.grad * 8
    gradients = [p.grad.clone() for p in other.parameters() if p.grad is not None]
    for _ in range(2):
        optimizer.step()
        scaled.found_inf, scaled.grad_scale = torch.zeros((), device=device), torch.full((), 8.0, device=device)
        scaled.step()
    assert all(torch.equal(a, b) for a, b in zip(numbers(model, optimizer), numbers(other, scaled), strict=True))
    assert all(torch.equal(a, b.grad) for a, b in zip(gradients, other.parameters(), strict=True) if b.grad is not None)


@pytest.mark.parametrize("device", DEVICES)
def test_what_was_said_of_one_step_does_not_hold_for_the_next(device: str) -> None:
    model, optimizer = model_with_gradients(device)
    other, plain = model_with_gradients(device)
    optimizer.found_inf, optimizer.grad_scale = torch.ones((), device=device), torch.full((), 8.0, device=device)
    optimizer.step()
    del optimizer.found_inf, optimizer.grad_scale
    for each in (optimizer, plain):
        each.step()
    assert all(torch.equal(a, b) for a, b in zip(numbers(model, optimizer), numbers(other, plain), strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_scaler_unscales_and_leaves_out_overflows(device: str) -> None:
    model, optimizer = model_with_gradients(device)
    other, plain = model_with_gradients(device)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    scaler.scale(torch.zeros((), device=device))  # creates the scale
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad *= 1024.0
    scaler.step(optimizer)
    scaler.update()
    plain.step()
    assert all(torch.equal(a, b) for a, b in zip(numbers(model, optimizer), numbers(other, plain), strict=True))
    before = numbers(model, optimizer)
    next(model.parameters()).grad[0, 0] = float("inf")  # type: ignore[index]
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, numbers(model, optimizer), strict=True))
    assert scaler.get_scale() == 512.0
