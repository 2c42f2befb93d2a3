"""Under torch.compile nothing changes and nothing is compiled twice; importing the torch half loads neither a compiler nor DTensor."""

from __future__ import annotations

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
dynamo = pytest.importorskip("torch._dynamo")

from torch_toy import toy, toy_loss, toy_optimizer, train, weights_of  # noqa: E402


@pytest.fixture(autouse=True)
def fresh_compiler():
    dynamo.reset()
    yield
    dynamo.reset()


def frames() -> int:
    """Frames that the compiler has looked at."""
    return dynamo.utils.counters["frames"]["total"]


def test_a_compiled_model_is_trained_as_the_plain_one():
    plain, model = toy(), toy()
    compiled = torch.compile(model, backend="eager")
    train(plain, toy_optimizer(plain), range(3))
    train(compiled, toy_optimizer(compiled), range(3))
    torch.testing.assert_close(weights_of(model), weights_of(plain))


def test_a_compiled_step_equals_the_plain_one_bit_for_bit():
    models = [toy(), toy()]
    optimizers = [toy_optimizer(m, normuon=True) for m in models]
    compiled = torch.compile(optimizers[1].step, backend="aot_eager")
    for step in range(4):
        for model, optimizer, update in zip(models, optimizers, (optimizers[0].step, compiled), strict=True):
            optimizer.zero_grad()
            toy_loss(model, step).backward()
            update()
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.parametrize("is_compiled", [False, True], ids=["plain", "compiled"])
def test_a_thousand_scheduled_steps_compile_nothing_new(is_compiled):
    model = torch.nn.Linear(4, 4)
    model(torch.ones(1, 4)).sum().backward()
    optimizer = toy_optimizer(model, splits={})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.999**step)
    update = torch.compile(optimizer.step, backend="eager") if is_compiled else optimizer.step
    before = 0
    for step in range(1000):
        if step == 2:
            before = frames()
        update()
        scheduler.step()
        optimizer.param_groups[0]["momentum"] = 0.85 + step * 1e-4
    assert frames() == before


def test_a_closure_runs_compiled_where_it_is():
    model = toy()
    optimizer = toy_optimizer(model)
    loss = torch.compile(toy_loss, backend="eager")

    def closure():
        optimizer.zero_grad()
        value = loss(model, 0)
        value.backward()
        return value

    before = frames()
    optimizer.step(closure)
    assert frames() > before


IMPORTS = """
import sys
import anarcho_optim
assert not {"torch", "numpy", "mlx"} & sys.modules.keys(), "the package loads a framework"
import torch
before = set(sys.modules)
from anarcho_optim.torch import MuonAdamW, param_groups
lazy = ("torch.distributed.tensor", "torch._dynamo", "triton", "mlx")
assert not [m for m in set(sys.modules) - before if m.startswith(lazy)], "the torch half loads what it seldom needs"
model = torch.nn.Linear(4, 4)
model(torch.ones(1, 4)).sum().backward()
MuonAdamW(param_groups(model)).step()
lazy = {"anarcho_optim.torch.distributed", "anarcho_optim.torch.kernels"}
assert not lazy & sys.modules.keys(), "a step on one CPU loads what is for several, or for GPUs"
"""


def test_imports_load_neither_dtensor_nor_a_compiler_nor_triton():
    result = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


WITHOUT_COMPILER = """
import sys, torch
from anarcho_optim.torch import MuonAdamW

weights = [torch.nn.Parameter(torch.ones(8, 8)), torch.nn.Parameter(torch.ones(8))]
optimizer = MuonAdamW([{"params": weights[:1], "algorithm": "muon"}, {"params": weights[1:], "algorithm": "adamw"}])
for _ in range(2):
    sum(weight.square().sum() for weight in weights).backward()
    optimizer.step()
    optimizer.zero_grad()
assert weights[0].grad is None and float(weights[1][0].detach()) < 1
assert "torch._dynamo" not in sys.modules, "the compiler was loaded"
torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
sum(weight.square().sum() for weight in weights).backward()
optimizer.step()
optimizer.zero_grad()
"""


def test_a_program_that_compiles_nothing_does_not_load_the_compiler():
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
