"""The norm of all gradients together in MLX, without the kernel and with it."""

from __future__ import annotations

import math

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
from anarcho_train.steps import mlx_norm  # noqa: E402

needs_cuda = pytest.mark.skipif(
    not (mx.cuda.is_available() and mx.default_device() == mx.gpu), reason="needs MLX on a CUDA GPU"
)


def gradients():
    mx.random.seed(0)
    alike = [mx.random.normal((40, 16)).astype(mx.bfloat16) for _ in range(67)]
    return {
        "alike": alike,
        "wide": mx.random.normal((40, 16)),
        "odd": mx.random.normal((3,)),
        "large": mx.ones((64, 900)),
    }


def expected():
    flat = [*gradients()["alike"], *(gradients()[name] for name in ("wide", "odd", "large"))]
    return math.sqrt(sum(float(np.square(np.array(g.astype(mx.float32)), dtype=np.float64).sum()) for g in flat))


def test_the_norm_is_that_of_all_arrays_as_one():
    assert mlx_norm.global_norm(gradients(), mx.array(0.5)).item() == pytest.approx(expected() / 2, rel=1e-5)


def test_arrays_of_one_size_and_type_go_together_as_far_as_a_kernel_has_addresses():
    flat = [*gradients()["alike"], gradients()["wide"]]
    assert [len(group) for group in mlx_norm._alike(flat)] == [64, 3, 1]


@needs_cuda
def test_the_kernel_finds_the_same_norm_each_time():
    found = [mlx_norm.global_norm(gradients(), mx.array(1.0)).item() for _ in range(2)]
    assert found[0] == found[1] == pytest.approx(expected(), rel=1e-5)


@needs_cuda
def test_a_gradient_that_is_not_finite_is_told():
    assert math.isinf(mlx_norm.global_norm([mx.full((64,), math.inf)], mx.array(1.0)).item())
    assert math.isnan(mlx_norm.global_norm([mx.full((64,), math.nan)], mx.array(1.0)).item())
