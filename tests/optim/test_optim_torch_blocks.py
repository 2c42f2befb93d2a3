"""Fused weights, convolutions and stacks are updated as the separate matrices that they consist of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import cases  # noqa: E402
from anarcho_optim.torch import MuonAdamW  # noqa: E402
from torch import Tensor, nn  # noqa: E402

Cut = Callable[[Tensor], list[Tensor]]

CUTS: dict[str, tuple[tuple[int, ...], dict[str, Any], Cut]] = {
    "query, key and value": ((16, 6), {"split_sizes": (8, 4, 4)}, lambda w: list(w.split((8, 4, 4)))),
    "gate and up": ((24, 5), {"split_sizes": (12, 12)}, lambda w: list(w.chunk(2))),
    "heads": ((12, 5), {"num_heads": 4}, lambda w: list(w.chunk(4))),
    "query, key and value by columns": (
        (6, 16),
        {"split_sizes": (8, 4, 4), "split_dim": 1},
        lambda w: list(w.split((8, 4, 4), dim=1)),
    ),
    "heads by columns": ((5, 12), {"num_heads": 4, "split_dim": 1}, lambda w: list(w.chunk(4, dim=1))),
    "an empty block": ((8, 5), {"split_sizes": (5, 0, 3)}, lambda w: list(w.split((5, 3)))),
    "blocks of single rows": ((3, 5), {"num_heads": 3}, lambda w: list(w.chunk(3))),
    "as many columns as blocks, one of them empty": (
        (5, 2),
        {"split_sizes": (2, 0), "split_dim": 1},
        lambda w: [w],
    ),
    "one-dimensional convolution": ((6, 3, 4), {"flatten": True}, lambda w: [w.flatten(1)]),
    "two-dimensional convolution": ((6, 3, 2, 2), {"flatten": True}, lambda w: [w.flatten(1)]),
    "three-dimensional convolution": ((4, 2, 2, 1, 2), {"flatten": True}, lambda w: [w.flatten(1)]),
    "convolution by heads": ((6, 3, 2, 2), {"flatten": True, "num_heads": 2}, lambda w: list(w.flatten(1).chunk(2))),
    "stack": ((3, 4, 6), {"flatten": False}, lambda w: list(w)),
    "stack of stacks": ((2, 2, 4, 6), {"flatten": False}, lambda w: list(w.flatten(0, 1))),
    "stack by heads": (
        (2, 6, 4),
        {"flatten": False, "num_heads": 3},
        lambda w: [head for matrix in w for head in matrix.chunk(3)],
    ),
}
"""Shape of a parameter, its options, and the matrices that it consists of."""

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "NorMuon by rows": {"normuon": True},
    "NorMuon by columns": {"normuon": True, "normuon_axis": -2},
    "everything": {
        "normuon": True,
        "row_equilibration": True,
        "frobenius_normalization": True,
        "cautious_weight_decay": True,
    },
    "spectral scale": {"adjust_lr_fn": "spectral"},
}


def trained(parameters: list[nn.Parameter], gradients: list[list[Tensor]], options: dict[str, Any]) -> None:
    optimizer = MuonAdamW([{"params": parameters, **options}])
    for step_gradients in gradients:
        for parameter, gradient in zip(parameters, step_gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("shape", "settings", "cut"), CUTS.values(), ids=CUTS)
def test_a_fused_parameter_equals_separate_ones(shape, settings, cut, options):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    gradients = [torch.randn(shape, generator=generator) for _ in range(3)]
    fused = nn.Parameter(start.clone())
    trained([fused], [[g] for g in gradients], cases.muon(**options, **settings))
    separate = [nn.Parameter(block.clone()) for block in cut(start)]
    trained(separate, [cut(g) for g in gradients], cases.muon(**options))
    for ours, theirs in zip(cut(fused.detach()), separate, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), atol=1e-6, rtol=1e-6)


def test_a_stack_is_not_orthogonalised_jointly():
    """Each matrix of a stack gets singular values near one; flattened, the stack would share them out."""
    stack = nn.Parameter(torch.zeros(4, 6, 6))
    optimizer = MuonAdamW([{"params": [stack], **cases.muon(flatten=False, lr=1.0, adjust_lr_fn="original")}])
    stack.grad = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    values = torch.linalg.svdvals(stack.detach())
    assert 0.6 < values.min() < values.max() < 1.3


def test_scale_and_decay_are_those_of_the_block():
    """Square blocks of a tall weight are scaled as square ones, and decayed with the base rate, not the scaled one."""
    weight = nn.Parameter(torch.ones(12, 3))
    options = cases.muon(lr=0.1, weight_decay=0.5, num_heads=4, adjust_lr_fn="original", variant="polar-express-8")
    optimizer = MuonAdamW([{"params": [weight], **options}])
    weight.grad = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    update = (1 - 0.1 * 0.5) * torch.ones(12, 3) - weight.detach()
    values = torch.linalg.svdvals(update.view(4, 3, 3))
    torch.testing.assert_close(values, torch.full((4, 3), 0.1), atol=1e-4, rtol=0)
