"""The two halves of `anarcho_optim` move the same weights to the same place, for every option, and read each other's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core")
pytest.importorskip("torch")

import anarcho_optim.mlx
import anarcho_optim.torch
import cases
import mlx.core as mx
import torch

Gradient = Callable[[np.ndarray, int], np.ndarray]


def problem(shape: tuple[int, ...]) -> tuple[np.ndarray, Gradient]:
    """A start and the gradients, by weight and step, of a smooth valley far away from it whose floor moves a little from step to step."""
    generator = np.random.default_rng(0)
    start = 0.5 * generator.standard_normal(shape)
    target, stiffness = 30 * generator.standard_normal(shape), 1 + generator.random(shape)
    direction = generator.standard_normal(shape)

    def gradient(weight: np.ndarray, step: int) -> np.ndarray:
        return (stiffness * np.tanh(weight - target - direction * np.sin(0.1 * step)) + 0.1 * weight).astype(np.float32)

    return start.astype(np.float32), gradient


def run_torch(
    start: np.ndarray, gradient: Gradient, steps: int, options: dict[str, Any]
) -> tuple[np.ndarray, dict[str, Any]]:
    weight = torch.nn.Parameter(torch.tensor(start))
    optimizer = anarcho_optim.torch.MuonAdamW([{"params": [("weight", weight)], **options}])
    for step in range(steps):
        weight.grad = torch.tensor(gradient(weight.detach().numpy(), step))
        optimizer.step()
    return weight.detach().numpy(), {key: value.numpy() for key, value in optimizer.state[weight].items()}


def to_mlx(array: np.ndarray, *, convolution: bool) -> np.ndarray:
    """torch's (out, in, ...) as MLX's (out, ..., in) for the weight of a convolution; anything else as it is."""
    return np.moveaxis(array, 1, -1) if convolution else array


def run_mlx(
    start: np.ndarray, gradient: Gradient, steps: int, options: dict[str, Any]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Weights and moments come back in torch's layout."""
    convolution = bool(options.get("flatten"))
    weight = mx.array(to_mlx(start, convolution=convolution))
    optimizer = anarcho_optim.mlx.MuonAdamW([{"params": [("weight", weight)], **options}])

    def back(array: mx.array) -> np.ndarray:
        return np.moveaxis(np.array(array), -1, 1) if convolution else np.array(array)

    for step in range(steps):
        g = mx.array(to_mlx(gradient(back(weight), step), convolution=convolution))
        weight = optimizer.apply_gradients({"weight": g}, {"weight": weight})["weight"]
    state = {k: back(v) if v.shape == weight.shape else np.array(v) for k, v in optimizer.state["weight"].items()}
    return back(weight), state


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """||a - b|| / ||b||."""
    assert a.shape == b.shape
    return float(np.linalg.norm(a.astype(np.float64) - b) / max(np.linalg.norm(b), 1e-30))


ALL = {
    **{f"muon, {name}": (shape, cases.muon(**options)) for name, (shape, options) in cases.MUON.items()},
    **{f"adamw, {name}": (shape, cases.adamw(**options)) for name, (shape, options) in cases.ADAMW.items()},
}


@pytest.mark.parametrize(("steps", "tolerance"), [(1, 1e-5), (100, 1e-3)])
@pytest.mark.parametrize(("shape", "options"), ALL.values(), ids=ALL)
def test_torch_and_mlx_take_the_same_steps(shape, options, steps, tolerance):
    start, gradient = problem(shape)
    ours, our_state = run_mlx(start, gradient, steps, options)
    theirs, their_state = run_torch(start, gradient, steps, options)
    assert difference(ours, theirs) < tolerance
    assert our_state.keys() == their_state.keys()
    # The columns of a flattened convolution are in another order in MLX, so the moments of its neurons are too.
    permuted = bool(options.get("flatten")) and options["normuon_axis"] == -2
    for key in our_state:
        assert our_state[key].dtype == their_state[key].dtype == np.float32
        if not (permuted and key == "neuron_mean_sq"):
            assert difference(our_state[key], their_state[key]) < 1e-3


@pytest.mark.parametrize("name", ["muon, everything at once", "muon, split rows, everything", "adamw, default"])
def test_a_run_that_starts_on_mlx_goes_on_with_torch_as_if_it_had_stayed(name):
    shape, options = ALL[name]
    start, gradient = problem(shape)
    middle, state = run_mlx(start, gradient, 10, options)
    weight = torch.nn.Parameter(torch.from_numpy(middle.copy()))
    optimizer = anarcho_optim.torch.MuonAdamW([{"params": [("weight", weight)], **options}])
    for key, value in state.items():
        assert optimizer.state[weight][key].shape == value.shape
        optimizer.state[weight][key].copy_(torch.from_numpy(value))
    for step in range(10, 20):
        weight.grad = torch.from_numpy(gradient(weight.detach().numpy(), step))
        optimizer.step()
    stayed, _ = run_mlx(start, gradient, 20, options)
    assert difference(weight.detach().numpy(), stayed) < 1e-4


@pytest.mark.parametrize("variant", ["jordan", "you", "polar-express", "polar-express-8"])
def test_orthogonalize_agrees(variant):
    updates = np.random.default_rng(0).standard_normal((2, 5, 9)).astype(np.float32)
    coefficients = anarcho_optim.VARIANTS[variant]
    ours = anarcho_optim.mlx.orthogonalize(mx.array(updates), variant=coefficients)
    theirs = anarcho_optim.torch.orthogonalize(torch.from_numpy(updates), variant=coefficients)
    assert difference(np.array(ours), theirs.numpy()) < 1e-4


def test_qk_clip_agrees():
    generator = np.random.default_rng(0)
    query, key = (generator.standard_normal((rows, 5)).astype(np.float32) for rows in (12, 6))
    logits = np.array([50, 150, 400, 90], np.float32)
    ours = anarcho_optim.mlx.qk_clip(mx.array(query), mx.array(key), max_logits=mx.array(logits))
    theirs = torch.from_numpy(query.copy()), torch.from_numpy(key.copy())
    anarcho_optim.torch.qk_clip(*theirs, max_logits=torch.from_numpy(logits))
    for a, b in zip(ours, theirs, strict=True):
        assert difference(np.array(a), b.numpy()) < 1e-6


def groups_of(model: Any, half: Any, **options: Any) -> list[dict[str, Any]]:
    """The groups with the names and shapes, as torch lays them out, of their parameters."""

    def shape(parameter: Any) -> tuple[int, ...]:
        shape = tuple(parameter.shape)
        return (shape[0], shape[-1], *shape[1:-1]) if isinstance(parameter, mx.array) and len(shape) > 2 else shape

    groups = half.param_groups(model, **options)
    return [
        group | {"params": [(name, shape(p)) for name, p in sorted(group["params"], key=lambda pair: pair[0])]}
        for group in groups
    ]


def test_both_halves_route_a_model_alike():
    from mlx import nn as mlx_nn
    from torch import nn as torch_nn

    def fill(model: Any, nn: Any) -> Any:
        model.embedding = nn.Embedding(20, 8)
        model.qkv = nn.Linear(8, 16)
        model.out = nn.Linear(8, 8, bias=False)
        model.gate = nn.Linear(8, 1, bias=False)
        model.conv = nn.Conv2d(3, 6, 2)
        model.depthwise = nn.Conv1d(6, 6, 3, groups=6)
        model.norm = nn.RMSNorm(8)
        model.head = nn.Linear(8, 20, bias=False)
        return model

    options = {"split_sizes": {"qkv.weight": (8, 4, 4)}, "num_heads": {"out*": 2}}
    ours = groups_of(fill(mlx_nn.Module(), mlx_nn), anarcho_optim.mlx, **options)
    theirs = groups_of(fill(torch_nn.Module(), torch_nn), anarcho_optim.torch, **options)
    assert {group["name"]: group for group in ours} == {group["name"]: group for group in theirs}
