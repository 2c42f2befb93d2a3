"""Stochastic rounding: right on average, so that bfloat16 weights and moments learn from changes smaller than their last place."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from anarcho_optim.torch import MuonAdamW  # noqa: E402
from anarcho_optim.torch.rounding import copy_rounded_  # noqa: E402
from anarcho_optim.torch.vectors import PART_ELEMENTS  # noqa: E402


def make(*, stochastic: bool, state_dtype=torch.bfloat16, lr: float = 1e-4):
    """An optimizer of a matrix and a vector of bfloat16 ones, whose gradients are constant."""
    weights = [torch.nn.Parameter(torch.ones(64, 48).bfloat16()), torch.nn.Parameter(torch.ones(3000).bfloat16())]
    groups = [
        {"params": [("matrix", weights[0])], "algorithm": "muon", "lr": lr, "ns_dtype": "float32"},
        {"params": [("vector", weights[1])], "algorithm": "adamw", "lr": lr, "betas": (0.9, 0.95)},
    ]
    generator = torch.Generator().manual_seed(0)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator).bfloat16()
    return weights, MuonAdamW(groups, state_dtype=state_dtype, stochastic_rounding=stochastic)


def test_a_rounded_number_is_one_of_its_neighbours_and_right_on_average():
    torch.manual_seed(0)
    source = torch.tensor([1.001, -1.001, 1.0, 0.0, 3e-39, float("inf"), float("nan")])[:, None].repeat(1, 20000)
    target = torch.empty_like(source, dtype=torch.bfloat16)
    copy_rounded_(target, source, stochastic=True)
    assert set(target[0].tolist()) == {1.0, 1.0078125}
    assert float(target[0].double().mean()) == pytest.approx(1.001, abs=1e-4)
    assert float(target[1].double().mean()) == pytest.approx(-1.001, abs=1e-4)
    assert set(target[2].tolist()) == {1.0}
    assert set(target[3].tolist()) == {0.0}
    assert float(target[4].double().mean()) == pytest.approx(3e-39, rel=0.05)
    assert target[5].isinf().all()
    assert target[6].isnan().all()


def test_changes_below_the_last_place_move_the_weights_only_if_rounding_is_stochastic():
    torch.manual_seed(0)
    for stochastic in (True, False):
        weights, optimizer = make(stochastic=stochastic)
        for _ in range(40):
            optimizer.step()
        matrix, vector = ((weight.detach().double() - 1) for weight in weights)
        if not stochastic:
            assert not matrix.any()
            assert not vector.any()
            continue
        # AdamW's step is the learning rate against the gradient's sign, Muon's has a root mean square of a fifth of it.
        assert float((-vector * weights[1].grad.sign()).mean()) == pytest.approx(40 * 1e-4, rel=0.1)
        assert float((matrix * weights[0].grad).sum()) < 0


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_moments_are_of_the_type_asked_for_and_follow_those_of_float32(state_dtype):
    torch.manual_seed(0)
    weights, optimizer = make(stochastic=True, state_dtype=state_dtype)
    for _ in range(20):
        optimizer.step()
    momentum = optimizer.state[weights[0]]["momentum"]
    mean, mean_sq = (optimizer.state[weights[1]][key] for key in ("exp_avg", "exp_avg_sq"))
    assert {momentum.dtype, mean.dtype, mean_sq.dtype} == {state_dtype}
    torch.testing.assert_close(momentum.float(), weights[0].grad.float() * (1 - 0.95**20), rtol=0.05, atol=1e-3)
    torch.testing.assert_close(mean.float(), weights[1].grad.float() * (1 - 0.9**20), rtol=0.05, atol=1e-3)
    torch.testing.assert_close(mean_sq.float(), weights[1].grad.float() ** 2 * (1 - 0.95**20), rtol=0.05, atol=1e-3)


def test_a_restored_state_and_generator_repeat_the_steps_bit_for_bit():
    torch.manual_seed(0)
    weights, optimizer = make(stochastic=True)
    optimizer.step()
    kept = [weight.detach().clone() for weight in weights]
    state, random = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    optimizer.step()
    others, other = make(stochastic=True)
    other.load_state_dict(state)
    torch.set_rng_state(random)
    with torch.no_grad():
        for weight, value in zip(others, kept, strict=True):
            weight.copy_(value)
    other.step()
    for weight, repeated in zip(weights, others, strict=True):
        assert torch.equal(weight, repeated)
        for key, value in optimizer.state[weight].items():
            assert torch.equal(value, other.state[repeated][key])
            assert value.dtype == other.state[repeated][key].dtype


def test_a_large_parameter_is_updated_in_parts_as_it_would_be_whole():
    whole = torch.nn.Parameter(torch.zeros(PART_ELEMENTS // 1000, 2500))
    narrow = torch.nn.Parameter(torch.zeros(whole.shape).bfloat16())
    for weight in (whole, narrow):
        weight.grad = torch.ones(whole.shape, dtype=weight.dtype)
    for weight in (whole, narrow):
        optimizer = MuonAdamW([{"params": [("table", weight)], "algorithm": "adamw", "lr": 0.5}])
        for _ in range(2):
            optimizer.step()
        assert float(optimizer.state[weight]["step"]) == 2
    torch.testing.assert_close(narrow.float(), whole.detach(), rtol=1e-2, atol=0)


def test_another_type_of_state_is_refused():
    with pytest.raises(ValueError, match=r"state_dtype is torch\.float16; expected torch\.float32 or torch\.bfloat16"):
        MuonAdamW([torch.nn.Parameter(torch.ones(2, 2))], state_dtype=torch.float16)


KERNELS = """
import torch
from anarcho_optim.torch import kernels

torch.manual_seed(0)
half, seed = torch.bfloat16, torch.tensor([7])
settings = torch.tensor([1e-3, 0.0, 0.9, 0.95, 1e-10, 0.0, 1.0])

n = 1000
gradient, weight, mean, mean_sq = torch.randn(n).to(half), torch.ones(n).to(half), torch.zeros(n).to(half), torch.zeros(n).to(half)
step = torch.zeros(())
table = torch.tensor([[*(t.data_ptr() for t in (gradient, weight, mean, mean_sq, step)), n]])
options = {"gradient_dtype": half, "parameter_dtype": half, "state_dtype": half, "aligned": False, "seed": seed}
for _ in range(8):
    kernels.adamw(table, torch.empty((0, 2)), torch.tensor([[0, 0]]), settings, **options)
    seed += 1
assert step == 8
moved = -(weight.double() - 1) * gradient.sign()
assert abs(moved.mean() - 8e-3) < 8e-4, moved.mean()
torch.testing.assert_close(mean.float(), gradient.float() * (1 - 0.9**8), rtol=0.05, atol=1e-3)

for tall in (False, True):
    shape = (40, 24) if tall else (24, 40)
    gradient, momentum, weight = torch.randn(shape).to(half), torch.zeros(shape).to(half), torch.ones(shape).to(half)
    table = torch.tensor([[gradient.data_ptr(), momentum.data_ptr(), weight.data_ptr(), shape[1], int(tall)]])
    x = torch.empty((1, 24, 40), dtype=half)
    o = (gradient.T if tall else gradient)[None].contiguous()
    for _ in range(8):
        kernels.advance_momentum(
            table, settings, [(0, 1, tall)], x, nesterov=True, gradient_dtype=half, state_dtype=half, aligned=False,
            safety=1.0, seed=seed,
        )
        kernels.apply_updates(
            table, settings, torch.ones(1), None, o, first=0, number=1, tall=tall, factor_dim=-1,
            parameter_dtype=half, cautious=False, aligned=False, seed=seed,
        )
        seed += 1
    torch.testing.assert_close(momentum.float(), gradient.float() * (1 - 0.9**8), rtol=0.05, atol=1e-3)
    slope = ((weight.double() - 1) * gradient).sum() / (gradient.double() ** 2).sum()
    assert abs(slope + 8e-3) < 1e-3, slope
"""


def test_the_kernels_round_as_the_general_path_does():
    """Triton's interpreter runs them on the CPU."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KERNELS], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
