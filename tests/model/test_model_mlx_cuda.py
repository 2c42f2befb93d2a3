"""The kernels for MLX on a CUDA GPU: what they make, against the same in float32, for sizes that fill their tiles and sizes that do not."""

from __future__ import annotations

import pytest

mx = pytest.importorskip("mlx.core")
import mlx.nn as nn  # noqa: E402
from anarcho_model.layers import mlx as layers  # noqa: E402
from anarcho_model.layers import mlx_cuda, mlx_norm  # noqa: E402

needs_cuda = pytest.mark.skipif(
    not (mx.cuda.is_available() and mx.default_device() == mx.gpu), reason="needs MLX on a CUDA GPU"
)
TOLERANCE = {mx.bfloat16: 4e-3, mx.float16: 5e-4}


def draw(shape, dtype):
    return mx.random.normal(shape).astype(dtype)


def relative_error(found, expected):
    difference = found.astype(mx.float32) - expected
    return (mx.linalg.norm(difference.reshape(-1)) / mx.linalg.norm(expected.reshape(-1))).item()


def wide(*arrays):
    return [array.astype(mx.float32) for array in arrays]


@needs_cuda
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(4, 4096, 768), (3, 7, 768), (2, 5, 12, 64), (5, 33, 2048), (2, 3, 40)], ids=str)
def test_the_gradients_of_a_norm_are_those_of_float32(shape, dtype):
    x, cotangent, weight = draw(shape, dtype), draw(shape, dtype), 1 + draw(shape[-1:], dtype) / 4
    assert mlx_norm.has_norm_gradients(shape[-1], dtype)
    expected = mx.vjp(lambda x, weight: mx.fast.rms_norm(x, weight, 1e-5), wide(x, weight), wide(cotangent))[1]
    found = mlx_norm.norm_gradients(x, weight, cotangent, eps=1e-5)
    again = mlx_norm.norm_gradients(x, weight, cotangent, eps=1e-5)
    for gradient, same, exact in zip(found, again, expected, strict=True):
        assert gradient.dtype == dtype
        assert relative_error(gradient, exact) < TOLERANCE[dtype]
        assert mx.array_equal(gradient, same)


@needs_cuda
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(4, 1024, 2048), (3, 5, 48), (1, 1, 8)], ids=str)
def test_the_gradients_of_the_gated_product_are_those_of_float32(shape, dtype):
    gate, up, cotangent = (draw(shape, dtype) for _ in range(3))
    assert mlx_cuda.has_gated_gradients(gate)
    (product,), gradients = mx.vjp(lambda gate, up: nn.silu(gate) * up, wide(gate, up), wide(cotangent))
    found = mlx_cuda.gated_gradients(gate, up, cotangent)
    for array, exact in zip(found, [*gradients, product], strict=True):
        assert relative_error(array, exact) < TOLERANCE[dtype]


@needs_cuda
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(4, 1024, 768), (3, 7, 768), (5, 33, 2048), (2, 3, 40)], ids=str)
def test_a_residual_sum_with_its_norm_and_their_gradients_are_those_of_float32(shape, dtype):
    def plain(x, added, weight):
        return x + added, mx.fast.rms_norm(x + added, weight, 1e-5)

    norm = layers.RMSNorm(shape[-1], eps=1e-5)

    def ours(x, added, weight):
        norm.weight = weight
        return norm.of_sum(x, added, dtype=dtype)

    arrays = [draw(shape, dtype), draw(shape, dtype), 1 + draw(shape[-1:], dtype) / 4]
    cotangents = [draw(shape, dtype), draw(shape, dtype)]
    expected = mx.vjp(plain, wide(*arrays), wide(*cotangents))
    found = mx.vjp(ours, arrays, cotangents)
    for array, exact in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        assert array.dtype == dtype
        assert relative_error(array, exact) < TOLERANCE[dtype]


@needs_cuda
@pytest.mark.parametrize("dtype", [None, *TOLERANCE], ids=str)
def test_rows_of_an_embedding_are_its_own_and_so_are_their_gradients(dtype):
    table, tokens = mx.random.normal((50, 48)), mx.array([[3, 49, 3], [0, 7, 8]])
    assert mlx_cuda.has_lookup(table, dtype or mx.float32)
    embedding = nn.Embedding(50, 48)

    def rows(table):
        embedding.weight = table
        return layers.embed(embedding, tokens, dtype=dtype)

    expected = table[tokens].astype(dtype or mx.float32)
    cotangent = mx.random.normal(expected.shape).astype(expected.dtype)
    (found,), (gradient,) = mx.vjp(rows, [table], [cotangent])
    assert found.dtype == expected.dtype
    assert mx.array_equal(found, expected)
    (exact,) = mx.vjp(lambda table: table[tokens], [table], [cotangent.astype(mx.float32)])[1]
    assert mx.allclose(gradient, exact, rtol=1e-6)


def test_other_types_and_sizes_are_left_to_mlx(monkeypatch):
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert mlx_norm.has_norm_gradients(768, mx.bfloat16)
    assert not mlx_norm.has_norm_gradients(768, mx.float32)
    assert not mlx_norm.has_norm_gradients(764, mx.bfloat16)
    assert not mlx_norm.has_norm_gradients(4096, mx.bfloat16)
    assert mlx_cuda.has_gated_gradients(mx.zeros((2, 16), mx.float16))
    assert not mlx_cuda.has_gated_gradients(mx.zeros((2, 12), mx.float16))
    assert mlx_cuda.has_lookup(mx.zeros((3, 16)), mx.bfloat16)
    assert not mlx_cuda.has_lookup(mx.zeros((3, 12)), mx.bfloat16)
    assert not mlx_cuda.has_lookup(mx.zeros((3, 16), mx.bfloat16), mx.bfloat16)
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    assert not mlx_norm.has_norm_gradients(768, mx.bfloat16)
    assert not mlx_cuda.has_lookup(mx.zeros((3, 16)), mx.bfloat16)
