"""`Muon` with the preset ``jordan`` is torch.optim.Muon, in its arguments and, to the rounding of bfloat16, in its trajectory."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from anarcho_optim.torch import Muon, MuonAdamW, shape_scale  # noqa: E402
from torch import Tensor, nn  # noqa: E402

SHAPES = [(24, 16), (16, 24), (16, 16), (64, 16), (1, 64)]


class Chain(nn.Module):
    """Matrices of several shapes, one after the other: square, wide, tall, long, and a single row."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrices = nn.ParameterList(torch.randn(shape, generator=generator) / shape[1] ** 0.5 for shape in SHAPES)

    def forward(self, h: Tensor) -> Tensor:
        for matrix in self.matrices[:-1]:
            h = torch.tanh(h @ matrix.T) + 0.1 * (h @ matrix.T)
        return h @ self.matrices[-1].T


def regression_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step % 10)
    inputs = torch.randn(64, 16, generator=generator)
    targets = inputs.square().mean(dim=1, keepdim=True).sin()
    optimizer.zero_grad()
    (model(inputs) - targets).square().mean().backward()
    optimizer.step()


def distances(ours: Any, theirs: Any, *, steps: int = 100) -> list[float]:
    """How far apart two optimizers of one model are in the end, for each matrix relative to the way that it went."""
    models = [Chain(), Chain()]
    start = [p.detach().clone() for p in models[0].parameters()]
    optimizers = [make(model.parameters()) for make, model in zip((ours, theirs), models, strict=True)]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 - step / steps) for o in optimizers]
    for step in range(steps):
        for model, optimizer, scheduler in zip(models, optimizers, schedulers, strict=True):
            regression_step(model, optimizer, step)
            scheduler.step()
    triples = zip(models[0].parameters(), models[1].parameters(), start, strict=True)
    return [float((a - b).detach().norm() / (b - s).detach().norm()) for a, b, s in triples]


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (100, {"adjust_lr_fn": "original"}),
        (100, {"adjust_lr_fn": "match_rms_adamw"}),
        (20, {"adjust_lr_fn": None, "weight_decay": 0.0}),
        (20, {"adjust_lr_fn": "original", "nesterov": False}),
        (20, {"adjust_lr_fn": "original", "momentum": 0.8, "ns_steps": 4}),
        (20, {"adjust_lr_fn": "match_rms_adamw", "ns_coefficients": (3.0, -3.2, 1.2)}),
    ],
    ids=str,
)
def test_jordan_goes_the_way_of_torch_muon(steps, options):
    hyper = {"lr": 0.01, "weight_decay": 0.1} | options
    ours = functools.partial(Muon, variant="jordan", ns_dtype="bfloat16", **hyper)
    theirs = functools.partial(torch.optim.Muon, **hyper)
    # Ours is normalised in float32, theirs in bfloat16, which rounds to 1 part in 256; over many steps the differences even out.
    assert max(distances(ours, theirs, steps=steps)) < (0.04 if steps == 100 else 0.1)


def test_every_argument_of_torch_muon_is_one_of_ours_in_the_same_place():
    theirs = list(inspect.signature(torch.optim.Muon).parameters.values())
    ours = list(inspect.signature(Muon).parameters.values())
    assert [(p.name, p.kind) for p in ours[: len(theirs)]] == [(p.name, p.kind) for p in theirs]
    same = {"params", "lr", "weight_decay", "momentum", "nesterov", "eps"}
    assert {p.name: p.default for p in ours if p.name in same} == {p.name: p.default for p in theirs if p.name in same}


def test_torch_muons_arguments_give_torch_muons_options():
    weight = nn.Parameter(torch.zeros(3, 4))
    arguments: list[Any] = [0.1, 0.2, 0.3, False, (3.0, -4.0, 2.0), 1e-5, 7, "original"]
    expected = torch.optim.Muon([weight], *arguments).param_groups[0]
    by_place = Muon([weight], *arguments).param_groups[0]
    names = list(inspect.signature(torch.optim.Muon).parameters)[1:]
    by_name = Muon([weight], **dict(zip(names, arguments, strict=True))).param_groups[0]
    for key in expected.keys() - {"eps", "params"}:
        assert by_place[key] == by_name[key] == expected[key]


def test_the_scale_of_every_name_that_torch_knows_is_torchs():
    for name in ("original", "match_rms_adamw", "spectral_unclamped", None):
        for rows, columns in [(8, 2), (2, 8), (4, 4)]:
            expected = torch.optim._muon._adjust_lr(1.0, name, torch.Size((rows, columns)))
            assert shape_scale(name, rows, columns) == pytest.approx(expected)


def test_muon_takes_parameters_pairs_and_groups_with_options_of_their_own():
    first, second = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(4, 3))
    assert Muon([first, second], lr=0.1).param_groups[0]["params"] == [first, second]
    assert Muon(p for p in [first]).param_groups[0]["params"] == [first]
    assert Muon([("first", first)]).param_groups[0]["param_names"] == ["first"]
    optimizer = Muon([{"params": [first], "num_heads": 3}, {"params": second, "lr": 0.5}], lr=0.1, variant="you")
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.5]
    assert [g["num_heads"] for g in optimizer.param_groups] == [3, None]
    assert {g["variant"] for g in optimizer.param_groups} == {"you"}
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})
    assert optimizer.param_groups[2]["lr"] == 0.1
    assert optimizer.param_groups[2]["variant"] == "you"


def test_muon_refuses_adamw_groups_and_options_that_do_not_exist():
    weight = nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="algorithm 'adamw'; expected 'muon': use MuonAdamW"):
        Muon([{"params": [weight], "algorithm": "adamw"}])
    with pytest.raises(TypeError, match=r"no option 'normuom'; .* is it 'normuon'?"):
        Muon([weight], normuom=True)
    with pytest.raises(TypeError, match="no option 'algorithm'"):
        Muon([weight], algorithm="adamw")
    with pytest.raises(ValueError, match=r"has the unknown key 'momentm'; .* is it 'momentum'?"):
        Muon([{"params": [weight], "momentm": 0.9}])


def test_the_adamw_half_goes_the_way_of_torch_adamw():
    hyper = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    ours = lambda params: MuonAdamW([{"params": list(params), "algorithm": "adamw", **hyper}])  # noqa: E731
    theirs = lambda params: torch.optim.AdamW(params, fused=True, **hyper)  # noqa: E731
    assert max(distances(ours, theirs)) == 0
