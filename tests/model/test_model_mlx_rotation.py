"""Rotary positions in MLX by kernels for CUDA: what they make there, and here what is around them, with their arithmetic written out."""

from __future__ import annotations

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
from anarcho_model import InitConfig, ModelConfig  # noqa: E402
from anarcho_model.layers import mlx as layers  # noqa: E402
from anarcho_model.layers import mlx_rotation  # noqa: E402
from anarcho_model.mlx import GPT  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

needs_cuda = pytest.mark.skipif(
    not (mx.cuda.is_available() and mx.default_device() == mx.gpu), reason="needs MLX on a CUDA GPU"
)
TOLERANCE = {mx.bfloat16: 4e-3, mx.float16: 5e-4}


def turned(x, cos, sin):
    """Heads (batch, length, heads, head), turned in float32 and rounded."""
    low, high = mx.split(x.astype(mx.float32), 2, axis=-1)
    cos, sin = (angles.transpose(0, 2, 1, 3) for angles in (cos, sin))
    return mx.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1).astype(x.dtype)


def written_out(name, arrays, cos, sin, *, back, output_shapes):
    """What a kernel returns."""
    sign = -sin if back else sin
    q, k = (turned(x, cos, sign) for x in arrays[:2])
    if name == "rotation":
        return [q, k]
    tokens = q.shape[0] * q.shape[1]
    return [mx.concatenate([x.reshape(tokens, -1) for x in (q, k, arrays[2])], axis=-1)]


@pytest.fixture
def kernels(monkeypatch):
    """Their arithmetic in their place."""
    monkeypatch.setattr(mlx_rotation, "_launch", written_out)
    monkeypatch.setattr(layers, "has_rotation_kernel", lambda head_size, dtype: dtype in TOLERANCE)


def loss_and_gradients(options, **arguments):
    model = GPT(ModelConfig(vocab_size=50, context_length=24, num_layers=2, dim=64, num_heads=4, **options))
    model.init_weights(seed=1, init=InitConfig(zero_residual_outputs=False))
    model.compute_dtype = mx.bfloat16
    tokens, targets = (mx.array(np.random.default_rng(i).integers(0, 50, (3, 24))) for i in range(2))

    def loss(parameters):
        model.update(parameters)
        return model.token_logprobs(tokens, targets, **arguments).sum()

    value, gradients = mx.value_and_grad(loss)(model.trainable_parameters())
    return value.item(), dict(tree_flatten(gradients))


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}, {"qk_norm": True, "num_kv_heads": 1}], ids=str)
def test_a_model_with_the_kernels_has_the_loss_and_gradients_of_one_without(options, isolated, request):
    documents = np.arange(24) >= 10
    places = mx.array(np.where(documents, np.arange(24) - 10, np.arange(24)))
    apart = {"positions": mx.repeat(places[None], 3, 0), "segments": mx.repeat(mx.array(documents * 1)[None], 3, 0)}
    arguments = apart if isolated else {}
    expected, exact = loss_and_gradients(options, **arguments)
    request.getfixturevalue("kernels")
    found, gradients = loss_and_gradients(options, **arguments)
    assert found == pytest.approx(expected, rel=1e-3)
    for name, gradient in gradients.items():
        difference = mx.linalg.norm((gradient - exact[name]).astype(mx.float32).reshape(-1)).item()
        assert difference <= 0.02 * mx.linalg.norm(exact[name].astype(mx.float32).reshape(-1)).item(), name


def test_kernels_serve_only_where_they_compile_and_are_right(monkeypatch):
    are_right = mlx_rotation._are_right.__wrapped__
    monkeypatch.setattr(mlx_rotation, "_launch", written_out)
    assert are_right()

    def backwards(name, arrays, cos, sin, *, back, output_shapes):
        return written_out(name, arrays, cos, -sin, back=back, output_shapes=output_shapes)

    monkeypatch.setattr(mlx_rotation, "_launch", backwards)
    with pytest.warns(UserWarning, match="positions are not used: they compute wrong numbers; MLX's own is slower"):
        assert not are_right()

    def fails(*_, **__):
        raise RuntimeError("[custom_kernel] Failed to compile kernel")

    monkeypatch.setattr(mlx_rotation, "_launch", fails)
    with pytest.warns(UserWarning, match=r"not used: \[custom_kernel\] Failed to compile kernel; "):
        assert not are_right()


def test_without_a_cuda_gpu_and_for_other_heads_there_are_none():
    assert not mlx_rotation.has_rotation_kernel(64, mx.float32)
    assert not mlx_rotation.has_rotation_kernel(24, mx.bfloat16)


@needs_cuda
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape", [(4, 1024, 12, 12, 64), (2, 7, 9, 3, 64), (1, 5, 5, 1, 128), (3, 33, 3, 3, 16)], ids=str
)
def test_queries_keys_and_their_gradients_are_those_of_float32(shape, dtype):
    batch, length, heads, kv_heads, size = shape
    assert mlx_rotation.has_rotation_kernel(size, dtype)
    q, k, v = (mx.random.normal((batch, length, count, size)).astype(dtype) for count in (heads, kv_heads, kv_heads))
    angles = mx.random.normal((1, 1, length, size // 2))
    cos, sin = mx.cos(angles), mx.sin(angles)
    for name, arrays in (("rotation", [q, k]), ("joined_rotation", [q, k, v])):
        for back in (False, True):
            wide = [x.astype(mx.float32) for x in arrays]
            expected = written_out(name, wide, cos, sin, back=back, output_shapes=None)
            shapes = [x.shape for x in expected]
            for x, exact in zip(
                mlx_rotation._launch(name, arrays, cos, sin, back=back, output_shapes=shapes), expected, strict=True
            ):
                difference = mx.linalg.norm((x.astype(mx.float32) - exact).reshape(-1)).item()
                assert difference < TOLERANCE[dtype] * mx.linalg.norm(exact.reshape(-1)).item()
