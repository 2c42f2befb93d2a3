"""Torch's schedulers, scalers, closures and hooks drive `MuonAdamW` as any optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

from anarcho_optim import OptimConfig, schedules  # noqa: E402
from anarcho_optim.torch import Muon, MuonAdamW, param_groups  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.optim import lr_scheduler  # noqa: E402
from torch_toy import toy, toy_loss, toy_optimizer, train, weights_of  # noqa: E402

Make = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]

SCHEDULERS: dict[str, Make] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "one lambda per group": lambda o: lr_scheduler.LambdaLR(o, [lambda s: 1 / (1 + s)] * len(o.param_groups)),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 4)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[g["lr"] for g in o.param_groups], total_steps=8),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.01, step_size_up=2, cycle_momentum=True),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # SequentialLR's own.
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_rates_follow_a_torch_scheduler_as_torch_sgds_do(make):
    model = toy()
    optimizer = toy_optimizer(model, adamw_lr=0.005)
    twin = torch.optim.SGD([{"params": g["params"], "lr": g["lr"]} for g in optimizer.param_groups], momentum=0.9)
    ours, theirs = make(optimizer), make(twin)
    for step in range(6):
        train(model, optimizer, range(step, step + 1))
        twin.step()
        metric = [1.0] if isinstance(ours, lr_scheduler.ReduceLROnPlateau) else []
        ours.step(*metric)
        theirs.step(*metric)
        assert rates(optimizer) == rates(twin)
    assert all(p.isfinite().all() for p in weights_of(model).values())


def test_a_scheduler_that_cycles_the_momentum_cycles_adamws_and_leaves_muons():
    model = toy()
    optimizer = toy_optimizer(model)
    scheduler = lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.1, total_steps=4, base_momentum=0.7, max_momentum=0.9, anneal_strategy="linear"
    )
    seen = []
    for step in range(3):
        seen.append([(g["betas"][0], g["momentum"]) for g in optimizer.param_groups])
        train(model, optimizer, range(step, step + 1))
        scheduler.step()
    assert {beta for beta, _ in seen[0]} == {0.9}
    assert min(beta for groups in seen for beta, _ in groups) < 0.85
    assert {momentum for groups in seen for _, momentum in groups} == {0.95}


def test_a_scheduler_that_cycles_the_momentum_cycles_muons_where_it_is_alone():
    optimizer = Muon([nn.Parameter(torch.zeros(2, 2))])
    scheduler = lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.1, total_steps=4, base_momentum=0.7, max_momentum=0.9, anneal_strategy="linear"
    )
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert "betas" not in optimizer.param_groups[0]
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["momentum"] < 0.9


def test_options_set_between_steps_hold_from_the_next_step():
    def last_move(**changes: float) -> Tensor:
        weight = nn.Parameter(torch.ones(4, 6))
        optimizer = Muon([weight], lr=0.1, ns_dtype="float32")
        for step in range(2):
            before = weight.detach().clone()
            weight.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            optimizer.step()
            optimizer.param_groups[0].update(changes)
        return weight.detach() - before

    moves = [last_move(), last_move(lr=0.2), last_move(momentum=0.5), last_move(weight_decay=0.5)]
    assert all(not torch.allclose(a, b) for i, a in enumerate(moves) for b in moves[:i])
    torch.testing.assert_close(last_move(weight_decay=0.0, lr=0.2), 2 * last_move(weight_decay=0.0))


@pytest.mark.parametrize(
    "rate", [torch.tensor(0.02), torch.tensor([0.02]), torch.tensor(0.02, dtype=torch.float64)], ids=str
)
def test_a_rate_may_be_a_tensor_that_a_scheduler_changes_in_place(rate):
    def trained(lr: float | Tensor) -> dict[str, Tensor]:
        model = toy()
        groups = [dict(g) | {"lr": lr if isinstance(lr, float) else lr.clone()} for g in param_groups(model)]
        optimizer = MuonAdamW(groups)
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(3):
            train(model, optimizer, range(step, step + 1))
            scheduler.step()
        assert isinstance(optimizer.param_groups[0]["lr"], type(lr))
        return weights_of(model)

    torch.testing.assert_close(trained(rate), trained(0.02))


def test_the_packages_own_schedule_drives_both_halves():
    config = OptimConfig(lr=0.1, adamw_lr=0.2, warmup_steps=2, momentum_warmup_steps=4, schedule="linear")
    optimizer = MuonAdamW(param_groups(toy(), config=config))
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: schedules.lr_scale(config, step, total_steps=10))
    for step in range(6):
        scale = schedules.lr_scale(config, step, total_steps=10)
        expected = {"muon": 0.1 * scale, "adamw": 0.2 * scale}
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected[group["algorithm"]])
        optimizer.step()
        scheduler.step()


def test_a_closure_is_evaluated_once_with_gradients_and_its_loss_returned():
    model = toy()
    optimizer = toy_optimizer(model)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = toy_loss(model, 0)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    twin = toy()
    train(twin, toy_optimizer(twin), range(1))
    assert calls == [True]
    assert torch.equal(loss, toy_loss(toy(), 0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_hooks_of_a_step_are_called():
    optimizer = toy_optimizer(toy())
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step()
    assert calls == ["before", "after"]


def test_a_gradient_scaler_skips_overflows_and_otherwise_changes_nothing():
    model, twin = toy(), toy()
    optimizer, twin_optimizer = toy_optimizer(model), toy_optimizer(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, overflows in enumerate([False, True, False]):
        optimizer.zero_grad()
        scaler.scale(toy_loss(model, step) * (float("inf") if overflows else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if not overflows:
            train(twin, twin_optimizer, range(step, step + 1))
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_gradients_are_left_as_they_are():
    model = toy()
    optimizer = toy_optimizer(model, normuon=True)
    toy_loss(model, 0).backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_zero_gradients_without_decay_move_nothing_and_leave_finite_state():
    model = toy()
    optimizer = toy_optimizer(model, weight_decay=0.0, adamw_weight_decay=0.0, normuon=True, row_equilibration=True)
    before = weights_of(model)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())


def test_maximize_is_not_offered():
    assert "maximize" not in inspect.signature(Muon).parameters
    with pytest.raises(TypeError, match="no option 'maximize'"):
        Muon([nn.Parameter(torch.zeros(2, 2))], maximize=True)
