"""Properties of `anarcho_optim.torch`: the mathematics agrees with references, the state is exact, bad input is named."""

from __future__ import annotations

import copy

import pytest
import torch
from anarcho_optim import VARIANTS, OptimConfig
from anarcho_optim.memory import CPU_BATCH_BYTES
from anarcho_optim.torch import MuonAdamW, orthogonalize, param_groups, shape_scale
from torch import nn

SHAPES = [(16, 16), (8, 32), (32, 8), (1, 12)]


class TinyModel(nn.Module):
    """An embedding tied to a head, two matrices of one shape, one of another, a gain and a bias."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8, bias=False)
        self.norm = nn.RMSNorm(8)
        self.wide = nn.Linear(8, 24, bias=False)
        self.narrow = nn.Linear(24, 8, bias=False)
        self.head = nn.Linear(8, 20, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.second(self.first(self.embedding(tokens)).tanh()))
        return self.head(self.narrow(self.wide(h).tanh()))


def backward(model: nn.Module, seed: int) -> None:
    tokens = torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_has_singular_values_near_one_and_the_polar_factors_directions(name, shape):
    updates = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(updates, variant=VARIANTS[name])
    u, _, vh = torch.linalg.svd(updates.double(), full_matrices=False)
    singular = torch.linalg.svdvals(result.double())
    assert singular.min() > 0.6
    assert singular.max() < 1.3
    cosine = nn.functional.cosine_similarity(result.double().flatten(1), (u @ vh).flatten(1))
    assert cosine.min() > 0.95


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_orthogonalize_does_not_depend_on_the_scale_of_its_input(scale):
    updates = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(1))
    expected = orthogonalize(updates, variant=VARIANTS["polar-express"])
    torch.testing.assert_close(
        orthogonalize(updates * scale, variant=VARIANTS["polar-express"]), expected, atol=1e-4, rtol=1e-4
    )


def test_orthogonalize_treats_every_matrix_of_a_stack_by_itself_and_zeros_stay_zeros():
    stack = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(2))
    stack[1] = 0
    result = orthogonalize(stack, variant=VARIANTS["jordan"])
    assert torch.equal(result[1], torch.zeros(6, 10))
    torch.testing.assert_close(result[2:], orthogonalize(stack[2:], variant=VARIANTS["jordan"]))


@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (64, 192), (192, 64)])
def test_jordan_in_bfloat16_follows_torch_optim_muon(adjust_lr_fn, nesterov, shape):
    ours = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    theirs = nn.Parameter(ours.detach().clone())
    hyper = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
    optimizer = MuonAdamW(
        [{"algorithm": "muon", "params": [ours], "variant": "jordan", "ns_dtype": "bfloat16", **hyper}]
    )
    reference = torch.optim.Muon([theirs], **hyper)
    start = ours.detach().clone()
    for seed in range(5):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(10 + seed))
        ours.grad, theirs.grad = gradient, gradient.clone()
        optimizer.step()
        reference.step()
        # The two round differently in bfloat16 (ours normalises in float32), so the moved distance agrees to about 1 %.
        assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()


def test_jordan_in_float32_equals_the_written_out_equations_in_float64():
    weight = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameter = nn.Parameter(weight.float().clone())
    optimizer = MuonAdamW(
        [
            {
                "algorithm": "muon",
                "params": [parameter],
                "variant": "jordan",
                "ns_dtype": "float32",
                "lr": 0.05,
                "weight_decay": 0.3,
                "adjust_lr_fn": "original",
            }
        ]
    )
    momentum = torch.zeros_like(weight)
    for seed in range(4):
        gradient = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(20 + seed))
        momentum = 0.95 * momentum + 0.05 * gradient
        x = 0.05 * gradient + 0.95 * momentum
        x = x / x.norm()
        for a, b, c in VARIANTS["jordan"].coefficients:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        weight = (1 - 0.05 * 0.3) * weight - 0.05 * x
        parameter.grad = gradient.float()
        optimizer.step()
    torch.testing.assert_close(parameter.detach().double(), weight, atol=1e-5, rtol=1e-5)


def test_adamw_half_equals_torch_optim_adamw():
    parameter = nn.Parameter(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)))
    other = nn.Parameter(parameter.detach().clone())
    hyper = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.1}
    optimizer = MuonAdamW([{"algorithm": "adamw", "params": [parameter], **hyper}])
    reference = torch.optim.AdamW([other], fused=True, **hyper)
    for seed in range(5):
        parameter.grad = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed))
        other.grad = parameter.grad.clone()
        optimizer.step()
        reference.step()
    assert torch.equal(parameter, other)


def test_matrices_of_one_shape_step_together_as_they_would_alone(monkeypatch):
    def final_weights(batch_bytes: int) -> list[torch.Tensor]:
        monkeypatch.setattr("anarcho_optim.memory.CPU_BATCH_BYTES", batch_bytes)
        torch.manual_seed(0)
        model = TinyModel()
        optimizer = MuonAdamW(param_groups(model, config=OptimConfig(ns_dtype="float32")))
        for seed in range(3):
            backward(model, seed)
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    for together, alone in zip(final_weights(CPU_BATCH_BYTES), final_weights(1), strict=True):
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_param_groups_route_by_type_and_identity_and_forget_nothing(tied):
    model = TinyModel(tied=tied)
    groups = param_groups(model)
    routed = {id(p): group["algorithm"] for group in groups for _, p in group["params"]}
    assert set(routed) == {id(p) for p in model.parameters()}
    muon = {id(m.weight) for m in (model.first, model.second, model.wide, model.narrow)}
    assert {key for key, algorithm in routed.items() if algorithm == "muon"} == muon
    assert "matrices" in str(groups)
    assert "embeddings" in str(groups)
    names = {group["name"] for group in groups}
    assert ("heads" in names) is not tied


def test_every_kind_of_parameter_takes_its_own_learning_rate():
    groups = param_groups(TinyModel(tied=False), config=OptimConfig(lr=0.1, adamw_lr=0.2, embedding_lr=0.3))
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == {"matrices": 0.1, "embeddings": 0.3, "heads": 0.2, "gains and biases": 0.2}
    defaults = param_groups(TinyModel(tied=False), config=OptimConfig(lr=0.1))
    assert {group["lr"] for group in defaults} == {0.1}


def test_frozen_parameters_and_missing_gradients_are_left_alone():
    model = TinyModel()
    model.first.weight.requires_grad_(False)
    optimizer = MuonAdamW(param_groups(model))
    backward(model, 0)
    model.second.weight.grad = None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    assert torch.equal(model.first.weight, before["first.weight"])
    assert torch.equal(model.second.weight, before["second.weight"])
    assert not torch.equal(model.wide.weight, before["wide.weight"])


def test_gradients_are_not_modified():
    model = TinyModel()
    optimizer = MuonAdamW(param_groups(model))
    backward(model, 0)
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_a_zero_gradient_without_decay_moves_nothing():
    parameter = nn.Parameter(torch.randn(4, 6))
    before = parameter.detach().clone()
    optimizer = MuonAdamW([{"algorithm": "muon", "params": [parameter], "weight_decay": 0.0}])
    parameter.grad = torch.zeros(4, 6)
    optimizer.step()
    assert torch.equal(parameter, before)


def test_state_is_created_eagerly_in_float32_under_canonical_names():
    model = TinyModel().bfloat16()
    optimizer = MuonAdamW(param_groups(model))
    assert set(optimizer.state[model.wide.weight]) == {"momentum"}
    assert set(optimizer.state[model.embedding.weight]) == {"exp_avg", "exp_avg_sq", "step"}
    assert {t.dtype for state in optimizer.state.values() for t in state.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_state_continues_bit_for_bit(dtype):
    torch.manual_seed(0)
    model = TinyModel().to(dtype)
    optimizer = MuonAdamW(param_groups(model))
    for seed in range(3):
        backward(model, seed)
        optimizer.step()
    resumed = copy.deepcopy(model)
    restored = MuonAdamW(param_groups(resumed))
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(3, 6):
        for m, o in ((model, optimizer), (resumed, restored)):
            backward(m, seed)
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    assert restored.state[resumed.wide.weight]["momentum"].dtype == torch.float32


def test_a_torch_scheduler_drives_both_halves():
    model = TinyModel()
    optimizer = MuonAdamW(param_groups(model, config=OptimConfig(lr=0.02, adamw_lr=0.004)))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    backward(model, 0)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.002, 0.002]


@pytest.mark.parametrize(("name", "scale"), [("original", 2.0), ("match_rms_adamw", 0.2 * 64**0.5), ("spectral", 2.0)])
def test_shape_scales_are_those_of_their_papers(name, scale):
    assert shape_scale(name, 64, 16) == pytest.approx(scale)
    assert shape_scale("spectral", 16, 64) == pytest.approx(0.5)
    assert shape_scale("original", 16, 64) == 1.0


MATRIX = nn.Parameter(torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("group", "sentence"),
    [
        ({"params": [MATRIX]}, "algorithm None; expected 'muon' or 'adamw'"),
        ({"params": [nn.Parameter(torch.zeros(3))], "algorithm": "muon"}, "shape (3,); expected two dimensions or more"),
        ({"params": [MATRIX], "algorithm": "muon", "lr": -1.0}, "has lr -1.0; expected zero or a positive number"),
        ({"params": [MATRIX], "algorithm": "adamw", "lr": float("nan")}, "has lr nan"),
        ({"params": [MATRIX], "algorithm": "muon", "variant": "newton"}, "'newton'; expected one of"),
        (
            {"params": [nn.Parameter(torch.zeros(2, 2, dtype=torch.int32), requires_grad=False)], "algorithm": "adamw"},
            "torch.int32",
        ),
    ],
)
def test_a_bad_group_is_refused_by_name(group, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the sentence is checked below
        MuonAdamW([group])
    assert sentence in str(error.value)


def test_a_parameter_given_twice_is_refused():
    with pytest.raises(ValueError, match=r"parameter 0 of group 1, of shape \(2, 2\), is given twice"):
        MuonAdamW([{"params": [MATRIX], "algorithm": "muon"}, {"params": [MATRIX], "algorithm": "adamw"}])
