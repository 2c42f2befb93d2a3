"""The numbers of `anarcho_optim.mlx`: every option agrees with the reference, at every scale and precision, and zeros move nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("mlx.core")

import cases
import mlx.core as mx
import mlx.optimizers
import reference
from anarcho_optim import VARIANTS
from anarcho_optim.mlx import Muon, MuonAdamW, orthogonalize, resolve_ns_dtype
from anarcho_optim.mlx import update as mlx_update


def array(value: np.ndarray, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.asarray(value, np.float32)).astype(dtype)


def numbers(value: mx.array) -> np.ndarray:
    return np.array(value.astype(mx.float32), np.float64)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(np.float64)


def difference(got: mx.array, expected: np.ndarray) -> float:
    """||got - expected|| / ||expected||."""
    assert got.shape == expected.shape
    return float(np.linalg.norm(numbers(got) - expected) / max(np.linalg.norm(expected), 1e-30))


def optimizer_of(weight: mx.array, options: dict) -> MuonAdamW:
    return MuonAdamW([{"name": "all", "params": [("weight", weight)], **options}])


def step(weight: mx.array, gradient: mx.array, options: dict) -> mx.array:
    return optimizer_of(weight, options).apply_gradients({"weight": gradient}, {"weight": weight})["weight"]


@pytest.mark.parametrize(("shape", "options"), cases.MUON.values(), ids=cases.MUON)
def test_muon_agrees_with_the_reference_after_one_step_and_after_three(shape, options):
    options = cases.muon(**options)
    expected, state = 0.5 * normal(*shape), reference.muon_state(shape, options)
    weight = array(expected)
    optimizer = optimizer_of(weight, options)
    for seed in range(3):
        gradient = normal(*shape, seed=seed + 1)
        expected, state = reference.muon_update(expected, gradient, state, options)
        weight = optimizer.apply_gradients({"weight": array(gradient)}, {"weight": weight})["weight"]
        assert difference(weight, expected) < (1e-5 if seed == 0 else 1e-4)
        assert optimizer.state["weight"].keys() == state.keys()
        for key, value in state.items():
            assert difference(optimizer.state["weight"][key], value) < 1e-4


@pytest.mark.parametrize(("shape", "options"), cases.ADAMW.values(), ids=cases.ADAMW)
def test_adamw_agrees_with_the_reference_at_every_step(shape, options):
    options = cases.adamw(**options)
    expected, state = 0.5 * normal(*shape), reference.adamw_state(shape)
    weight = array(expected)
    optimizer = optimizer_of(weight, options)
    for seed in range(5):
        gradient = normal(*shape, seed=seed + 1)
        expected, state = reference.adamw_update(expected, gradient, state, options)
        weight = optimizer.apply_gradients({"weight": array(gradient)}, {"weight": weight})["weight"]
        assert difference(weight, expected) < 1e-5
        for key, value in state.items():
            assert difference(optimizer.state["weight"][key], value) < 1e-5


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
@pytest.mark.parametrize("equilibrated", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_update_does_not_depend_on_the_scale_of_the_gradient(variant, equilibrated, scale):
    options = cases.muon(variant=variant, row_equilibration=equilibrated, normuon=True)
    weight, gradient = array(0.1 * normal(6, 9)), normal(6, 9, seed=1)
    expected = step(weight, array(gradient), options)
    assert difference(step(weight, array(gradient * scale), options), numbers(expected)) < 1e-5


@pytest.mark.parametrize(("shape", "options"), cases.MUON.values(), ids=cases.MUON)
def test_a_zero_gradient_leaves_the_weight_where_it_is_apart_from_decay(shape, options):
    weight = array(normal(*shape))
    unmoved = step(weight, mx.zeros(shape), cases.muon(**options | {"weight_decay": 0.0}))
    assert mx.array_equal(unmoved, weight)
    decayed = step(weight, mx.zeros(shape), cases.muon(**options | {"weight_decay": 0.1}))
    assert difference(decayed, numbers(weight) * (1 - 0.05 * 0.1)) < 1e-6


def test_zero_rows_stay_zero_under_row_equilibration_and_do_not_disturb_the_others():
    gradient = normal(5, 8)
    gradient[2] = 0
    options = cases.muon(row_equilibration=True, weight_decay=0.0)
    update = step(mx.zeros((5, 8)), array(gradient), options)
    expected, _ = reference.muon_update(np.zeros((5, 8)), gradient, reference.muon_state((5, 8), options), options)
    assert difference(update, expected) < 1e-5
    # The iteration mixes rows only through their products, which are zero.
    assert not mx.any(update[2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_matrix_of_rank_one_keeps_its_direction(variant):
    left, right = normal(6), normal(9, seed=1)
    polar = orthogonalize(array(np.outer(left, right))[None], variant=VARIANTS[variant])[0]
    exact = np.outer(left / np.linalg.norm(left), right / np.linalg.norm(right))
    cosine = np.vdot(numbers(polar), exact) / np.linalg.norm(numbers(polar))
    assert cosine > 0.999
    assert 0.6 < np.linalg.norm(numbers(polar)) < 1.3


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty_matrices_stay_empty(shape):
    assert orthogonalize(mx.zeros((2, *shape)), variant=VARIANTS["jordan"]).shape == (2, *shape)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_iteration_in_half_precision_follows_float32_whatever_the_scale(name, variant):
    dtype = resolve_ns_dtype(name)
    updates = array(1e6 * normal(3, 8, 20))
    got = orthogonalize(updates, variant=VARIANTS[variant], dtype=dtype)
    assert got.dtype == dtype
    assert difference(got, numbers(orthogonalize(updates, variant=VARIANTS[variant]))) < 0.05


def test_auto_is_float32():
    assert resolve_ns_dtype("auto") == mx.float32


def test_a_gradient_that_is_not_a_number_is_not_hidden():
    gradient = mx.full((3, 4), math.nan)
    assert mx.all(mx.isnan(step(mx.ones((3, 4)), gradient, cases.muon(row_equilibration=True, normuon=True))))


@pytest.mark.parametrize("limit_bytes", [1, 4 * 24 * 2, 4 * 24 * 3, 10**9])
def test_batches_of_any_size_give_the_same_matrices_in_their_places(monkeypatch, limit_bytes):
    monkeypatch.setattr(mlx_update, "mlx_batch_bytes", lambda device_type: limit_bytes)
    shapes = {"a": (4, 6), "b": (5, 6, 4), "c": (0, 4, 6), "d": (2, 4, 6), "e": (12, 4), "f": (3, 3)}
    options = {name: cases.muon(flatten=False, split_sizes=(6, 2, 4) if name == "e" else None) for name in shapes}
    weights = {name: array(0.1 * normal(*shape)) for name, shape in shapes.items()}
    gradients = {name: array(normal(*shape, seed=i)) for i, (name, shape) in enumerate(shapes.items())}
    groups = [{"params": [(name, weights[name])], **options[name]} for name in shapes]
    results = MuonAdamW(groups).apply_gradients(gradients, weights)
    for name, shape in shapes.items():
        state = reference.muon_state(shape, options[name])
        expected, _ = reference.muon_update(numbers(weights[name]), numbers(gradients[name]), state, options[name])
        assert difference(results[name], expected) < 1e-5


def peak_bytes(layers: int) -> int:
    """Memory that a compiled step takes beyond weights, gradients and state."""
    weights = {f"{i}": array(normal(128, 32, seed=i)) for i in range(layers)}
    gradients = {name: weight * 2 for name, weight in weights.items()}
    optimizer = MuonAdamW([{"params": list(weights.items()), **cases.muon()}])
    state = [weights, optimizer.state]

    def update(gradients: dict[str, mx.array]) -> None:
        weights.update(optimizer.apply_gradients(gradients, weights))

    compiled = mx.compile(update, inputs=state, outputs=state)
    mx.eval(gradients, state)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    compiled(gradients)
    mx.eval(state)
    return mx.get_peak_memory() - before


def test_the_peak_memory_of_a_compiled_step_does_not_grow_with_the_number_of_layers(monkeypatch):
    monkeypatch.setattr(mlx_update, "mlx_batch_bytes", lambda device_type: 2 * 4 * 128 * 32)
    assert peak_bytes(32) < 1.3 * peak_bytes(8)


@pytest.mark.parametrize(("split_dim", "shape"), [(0, (12, 5)), (1, (5, 12))])
def test_a_fused_weight_moves_as_its_parts_would_alone(split_dim, shape):
    options = cases.muon(normuon=True)
    weight, gradient = array(0.1 * normal(*shape)), array(normal(*shape, seed=1))
    fused = step(weight, gradient, options | {"split_sizes": (6, 4, 2), "split_dim": split_dim})
    parts = [mx.split(x, [6, 10], axis=split_dim) for x in (weight, gradient)]
    alone = mx.concatenate([step(w, g, options) for w, g in zip(*parts, strict=True)], axis=split_dim)
    assert difference(fused, numbers(alone)) < 1e-6


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_parameters_of_lower_precision_are_computed_in_float32_and_rounded_once(dtype):
    weight, gradient = array(0.1 * normal(6, 9), dtype), array(normal(6, 9, seed=1), dtype)
    for options in (cases.muon(normuon=True), cases.adamw()):
        exact = step(weight.astype(mx.float32), gradient.astype(mx.float32), options)
        got = step(weight, gradient, options)
        assert got.dtype == dtype
        assert mx.array_equal(got, exact.astype(dtype))


def test_gradients_and_parameters_are_not_modified():
    weight, gradient = normal(6, 9), normal(6, 9, seed=1)
    given_weight, given_gradient = array(weight), array(gradient)
    mx.eval(step(given_weight, given_gradient, cases.muon()))
    assert np.array_equal(numbers(given_weight), weight)
    assert np.array_equal(numbers(given_gradient), gradient)


@pytest.mark.parametrize("half", ["MuonAdamW", "Muon"])
class TestWhatTheMuonOfMlxGetsWrong:
    """Each property is first shown to fail for `mlx.optimizers.Muon`, so that the day it is mended is seen."""

    def moved(
        self, half: str, weight: mx.array, gradient: mx.array, *, weight_decay: float
    ) -> tuple[mx.array, mx.array]:
        """The change of ``weight`` in one step of ours and of MLX's Muon."""
        options = cases.muon(lr=0.1, weight_decay=weight_decay, variant="jordan", adjust_lr_fn="original")
        if half == "MuonAdamW":
            ours = step(weight, gradient, options)
        else:
            optimizer = Muon(0.1, weight_decay=weight_decay, variant="jordan", adjust_lr_fn="original")
            ours = optimizer.apply_gradients({"weight": gradient}, {"weight": weight})["weight"]
        theirs = mlx.optimizers.Muon(0.1, weight_decay=weight_decay)
        return ours - weight, theirs.apply_gradients({"weight": gradient}, {"weight": weight})["weight"] - weight

    def test_the_decay_is_decoupled_from_the_update(self, half):
        weight, gradient = array(normal(6, 9)), array(normal(6, 9, seed=1))
        plain, their_plain = self.moved(half, weight, gradient, weight_decay=0.0)
        decayed, their_decayed = self.moved(half, weight, gradient, weight_decay=0.5)
        assert difference(decayed - plain, -0.1 * 0.5 * numbers(weight)) < 1e-4
        assert difference(their_decayed - their_plain, -0.1 * 0.5 * numbers(weight)) > 0.5

    def test_a_large_gradient_in_float16_still_moves_the_weight(self, half):
        weight, gradient = mx.zeros((6, 9), mx.float16), array(1000 * normal(6, 9), mx.float16)
        ours, theirs = self.moved(half, weight, gradient, weight_decay=0.0)
        expected, _ = self.moved(half, weight.astype(mx.float32), gradient.astype(mx.float32), weight_decay=0.0)
        assert difference(ours, numbers(expected)) < 1e-3
        assert not mx.any(theirs)

    def test_a_zero_gradient_only_decays_the_weight(self, half):
        weight = array(normal(6, 9))
        ours, theirs = self.moved(half, weight, mx.zeros((6, 9)), weight_decay=0.1)
        assert difference(ours, -0.1 * 0.1 * numbers(weight)) < 1e-4
        assert difference(theirs, -0.1 * 0.1 * numbers(weight)) > 1
