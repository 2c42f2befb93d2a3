"""What a model is made of when it is compiled for CUDA: the same numbers and gradients as PyTorch's own layers have.

Triton's interpreter runs the kernels on the CPU, and a formula stands for them where a whole model is traced there; tests that need a
GPU are skipped without one.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from anarcho_model.layers import torch_cuda
from cuda_layers import (
    HALF,
    check_interpreted,
    draws,
    rotary_formula,
    rounded_swiglu,
    stand_in_for_cuda,
    step,
    swiglu_in_place,
)
from torch import Tensor, nn

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or not torch_cuda.AVAILABLE, reason="needs CUDA and Triton"
)


def tables(rows: int, length: int, half: int, *, device: str = "cpu") -> tuple[Tensor, Tensor]:
    angles = 3 * draws(rows, 1, length, half, seed=9, dtype=torch.float32, device=device)
    return angles.cos(), angles.sin()


def assert_rounded_once(found: Tensor, exact: Tensor) -> None:
    """They differ in the last place at most, and seldom; Triton's interpreter does not round to the nearest."""
    assert found.dtype == exact.dtype
    assert found.is_contiguous()
    place = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-20}[found.dtype]
    torch.testing.assert_close(found.cpu().double(), exact.double(), rtol=place, atol=1e-6)
    assert not found.is_cuda or found.dtype == torch.float32 or (found.cpu() != exact).double().mean() < 0.02


def check_kernels(device: str) -> None:
    from anarcho_model.layers import torch_cuda_kernels as kernels

    for tokens, width, dtype in ((5, 2048, HALF), (7, 1280, torch.float16), (37, 48, HALF), (3, 1337, torch.float32)):
        gate_up, grad = 3 * draws(tokens, 2 * width, seed=1, dtype=dtype), draws(tokens, width, seed=2, dtype=dtype)
        gate_up[0, 0], gate_up[0, 1] = 100, -100
        for by_columns in (False, True):
            hidden = grad.to(device, copy=True)
            hidden = hidden.t().contiguous().t() if by_columns else hidden
            gradient = kernels.swiglu_gradients(gate_up.to(device), hidden)
            for ours, exact in zip((gradient, hidden.contiguous()), rounded_swiglu(gate_up, grad), strict=True):
                assert_rounded_once(ours, exact)
    for batch, length, heads, kv_heads, size, rows, dtype in (
        (2, 40, 3, 3, 64, 1, HALF),
        (3, 7, 4, 2, 12, 3, torch.float16),
        (1, 33, 5, 1, 80, 1, torch.float32),
        (2, 9, 2, 2, 128, 2, HALF),
    ):
        shapes = [(batch, length, heads, size), (batch, length, kv_heads, size), (batch, kv_heads, length, size)]
        grad_q, grad_k, grad_v = (draws(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))
        grads = grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v  # the last one in another memory order
        angles = tables(rows, length, size // 2)
        found = kernels.pack_rotary_gradients(*(x.to(device) for x in (*grads, *angles)))
        assert_rounded_once(found, rotary_formula(*grads, *angles))
        spread = draws(1, 1, 1, 1, seed=4, dtype=dtype).expand(batch, heads, length, size)
        found = kernels.pack_rotary_gradients(*(x.to(device) for x in (spread, *grads[1:], *angles)))
        assert_rounded_once(found, rotary_formula(spread, *grads[1:], *angles))


@needs_triton
def test_the_kernels_compute_what_autograd_does():
    """Triton's interpreter runs them on the CPU."""
    check_interpreted(__file__)


@needs_cuda
def test_the_kernels_compute_what_autograd_does_on_a_gpu():
    check_kernels("cuda")


@pytest.fixture
def formulas(unchecked_shapes, monkeypatch):
    """The path of CUDA on the CPU, with formulas in the place of kernels; a list of those that were called."""
    calls: list[str] = []

    def swiglu(gate_up: Tensor, hidden: Tensor) -> Tensor:
        calls.append("swiglu")
        return swiglu_in_place(gate_up, hidden)

    def rotary(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        calls.append("rotary")
        return rotary_formula(grad_q, grad_k, grad_v, cos, sin)

    torch_cuda.swiglu_gradients.register_kernel("cpu")(swiglu)
    torch_cuda.pack_rotary_gradients.register_kernel("cpu")(rotary)
    stand_in_for_cuda(monkeypatch)
    torch._dynamo.reset()
    yield calls
    torch._dynamo.reset()


def assert_alike(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0.01, atol=0)
    for name, gradient in expected[1].items():
        assert found[1][name].dtype == gradient.dtype, name
        assert (found[1][name] - gradient).norm() <= 0.03 * gradient.norm(), name


@pytest.mark.parametrize(
    ("options", "how", "checkpointing", "segments"),
    [
        ({"num_kv_heads": 2, "head_dim": 12}, "whole", True, True),
        ({}, "parts", True, False),
        ({"qk_norm": True}, "parts", False, True),
    ],
)
def test_a_compiled_model_has_the_gradients_of_an_eager_one(build, formulas, options, how, checkpointing, segments):
    """Norms of queries and keys leave the rotation to the compiler."""
    model = build(num_layers=1, **options)
    model.gradient_checkpointing = checkpointing
    expected = step(model, "eager", device="cpu", backend="", segments=segments, length=21)
    assert not formulas
    found = step(model, how, device="cpu", backend="aot_eager", segments=segments, length=21)
    assert formulas == (["swiglu"] if "qk_norm" in options else ["swiglu", "rotary"])
    assert_alike(found, expected)


@pytest.mark.usefixtures("formulas")
def test_backward_keeps_no_more_than_inputs_of_products():
    kept: list[Tensor] = []
    gate_up, weight = draws(6, 16, seed=0).requires_grad_(), draws(5, 8, seed=1).requires_grad_()
    x, heads_weight = draws(6, 5, seed=2).requires_grad_(), draws(16, 5, seed=3).requires_grad_()
    cos, sin = tables(1, 3, 2)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        torch_cuda.swiglu(gate_up, weight)
        torch_cuda.heads_of(x, heads_weight, cos, sin, heads=2, kv_heads=1)
    expected = [gate_up, weight, x, heads_weight, cos, sin]
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in expected]


def test_only_training_of_plain_layers_takes_the_kernels(formulas, monkeypatch):
    x, plain = draws(3, 4, seed=0), nn.Linear(4, 4, bias=False)
    frozen = nn.Linear(4, 4, bias=False).requires_grad_(requires_grad=False)

    class Adapted(nn.Linear):
        pass

    assert not torch_cuda.suits(x, plain, dtype=HALF), "nothing is compiled"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch_cuda.suits(x, plain, dtype=HALF)
    for layers, dtype in (((plain, Adapted(4, 4)), HALF), ((plain, frozen), HALF), ((plain,), torch.float64)):
        assert not torch_cuda.suits(x, *layers, dtype=dtype)
    with torch.no_grad():
        assert not torch_cuda.suits(x, plain, dtype=HALF)
    monkeypatch.setattr(torch_cuda, "DEVICE_TYPE", "cuda")
    assert not torch_cuda.suits(x, plain, dtype=HALF)
    assert not formulas


@needs_cuda
@pytest.mark.parametrize(
    ("options", "how", "checkpointing", "segments", "length"),
    [
        ({}, "whole", False, False, 96),
        ({"num_kv_heads": 2}, "whole", True, True, 96),
        ({"head_dim": 24}, "whole", False, False, 37),
        ({}, "parts", True, False, 96),
        ({"num_kv_heads": 1}, "parts", False, True, 96),
        ({"qk_norm": True}, "parts", True, False, 96),
    ],
)
def test_on_a_gpu_the_kernels_change_no_gradient(
    build, unchecked_shapes, monkeypatch, options, how, checkpointing, segments, length
):
    from anarcho_model.layers import torch_cuda_kernels as kernels

    calls: list[str] = []
    for name in kernels.__all__:
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, name=name, run=kernel: calls.append(name) or run(*args))
    model = build(context_length=128, dim=256, hidden_dim=384, **options).cuda()
    model.gradient_checkpointing = checkpointing
    results = []
    for available in (False, True):
        monkeypatch.setattr(torch_cuda, "AVAILABLE", available)
        torch._dynamo.reset()
        assert not calls
        results.append(step(model, how, device="cuda", backend="inductor", segments=segments, length=length))
    rotations = [] if "qk_norm" in options else ["pack_rotary_gradients"] * 2
    assert sorted(calls) == rotations + ["swiglu_gradients"] * 2
    assert_alike(results[1], results[0])
