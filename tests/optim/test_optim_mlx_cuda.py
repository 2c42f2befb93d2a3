"""The update's kernels for MLX on a CUDA GPU: the same numbers as without them; and which batches are left to MLX."""

from __future__ import annotations

import pytest

mx = pytest.importorskip("mlx.core")
from anarcho_optim.mlx import MuonAdamW, update  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

needs_cuda = pytest.mark.skipif(
    not (mx.cuda.is_available() and mx.default_device() == mx.gpu), reason="needs MLX on a CUDA GPU"
)
MUON = {"algorithm": "muon", "name": "matrices", "lr": 0.1, "weight_decay": 0.1, "ns_dtype": "float32"}
SHAPES = {f"wide{i}": (24, 40) for i in range(66)} | {"tall0": (40, 24), "tall1": (40, 24)}
OTHERS = {"embedding": (30, 16), "gain": (24,), "odd": (5,)}


def weights():
    mx.random.seed(1)
    return {name: mx.random.normal(shape) for name, shape in (SHAPES | OTHERS).items()}


def gradients(dtype, size=1e-3, seed=0):
    mx.random.seed(seed)
    return {name: (mx.random.normal(shape) * size).astype(dtype) for name, shape in (SHAPES | OTHERS).items()}


def two_steps(dtype, *, size=1e-3, where=None, scale=None, **options):
    """Weights and state after two steps, by name."""
    found = weights()
    matrices, others = ([(name, found[name]) for name in names] for names in (SHAPES, OTHERS))
    groups = [
        MUON | options | {"params": matrices},
        {"algorithm": "adamw", "name": "others", "lr": 0.01, "weight_decay": 0.1, "params": others},
    ]
    optimizer = MuonAdamW(groups)
    rates = {"where": None if where is None else mx.array(where), "scale": None if scale is None else mx.array(scale)}
    for seed in range(2):
        found = optimizer.apply_gradients(gradients(dtype, size, seed), found, **rates)
    return dict(tree_flatten(found)) | dict(tree_flatten(optimizer.state))


def assert_near(found, expected, *, relative):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert mx.abs(found[name] - array).max().item() <= relative * mx.abs(array).max().item(), name


@needs_cuda
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"nesterov": False, "cautious_weight_decay": True}])
@pytest.mark.parametrize("rates", [{}, {"where": True, "scale": 0.5}, {"where": False, "scale": 0.5}])
def test_kernels_make_the_same_update_as_mlx(dtype, options, rates, monkeypatch):
    found = two_steps(dtype, **options, **rates)
    monkeypatch.setattr(update, "_has_kernels", lambda *arguments: False)
    monkeypatch.setattr(update.cuda, "has_adamw", lambda *arguments: False)
    assert_near(found, two_steps(dtype, **options, **rates), relative=1e-4)


@needs_cuda
@pytest.mark.parametrize("size", [1e-25, 1e18])
def test_neither_huge_nor_tiny_gradients_are_lost(size):
    usual, extreme = two_steps(mx.float32), two_steps(mx.float32, size=size)
    assert_near(*({name: run[name] for name in SHAPES} for run in (extreme, usual)), relative=1e-3)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_a_scale_is_that_of_the_gradients_in_float32(dtype):
    half, whole = two_steps(dtype, scale=0.5), two_steps(dtype, scale=1.0)
    assert_near(two_steps(dtype), whole, relative=0)
    for name in SHAPES:
        assert mx.allclose(half[f"{name}.momentum"], whole[f"{name}.momentum"] / 2, rtol=1e-6)
        assert mx.allclose(half[name], whole[name], atol=1e-5)  # the size of a gradient does not matter to Muon
    for name in OTHERS:
        assert mx.allclose(half[f"{name}.exp_avg_sq"], whole[f"{name}.exp_avg_sq"] / 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({}, True),
        ({"normuon": True}, False),
        ({"row_equilibration": True}, False),
        ({"frobenius_normalization": True}, False),
        ({"num_heads": 2}, False),
    ],
)
def test_what_changes_an_update_by_more_than_the_iteration_is_left_to_mlx(options, taken, monkeypatch):
    asked = []
    monkeypatch.setattr(update, "on_cuda", lambda: True)
    has_kernels = update._has_kernels
    monkeypatch.setattr(update, "_has_kernels", lambda *batch: asked.append(has_kernels(*batch)))
    monkeypatch.setattr(update.cuda, "has_adamw", lambda *arguments: False)
    two_steps(mx.float32, **options)
    assert set(asked) == {taken}
