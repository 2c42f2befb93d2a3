"""What a model is made of when it is compiled for a CPU: the same numbers and gradients as PyTorch's own layers have."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from anarcho_model.layers import torch_cpu
from anarcho_model.layers.torch import project_all
from torch import nn


def draws(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("length", "blocks"), [(1, 1), (16, 2), (33, 3), (70, 5), (200, 5)])
def test_attention_in_blocks_has_the_values_and_gradients_of_the_kernel(monkeypatch, length, blocks):
    monkeypatch.setattr(torch_cpu, "BLOCK_TOKENS", 14)
    monkeypatch.setattr(torch_cpu, "MAX_BLOCKS", 5)
    assert min(-(-length // 14), 5) == blocks
    q, k, v, upstream = (draws(2, length, 3, 8, seed=seed).transpose(1, 2) for seed in range(4))
    q, k, v = (5 * q).requires_grad_(), k.requires_grad_(), v.requires_grad_()
    ours = torch_cpu.causal_attention(q, k, v)
    kernel = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(ours, kernel)
    found = torch.autograd.grad(ours, (q, k, v), upstream)
    torch.testing.assert_close(found, torch.autograd.grad(kernel, (q, k, v), upstream))


def test_attention_in_blocks_keeps_what_has_the_length_once():
    q, k, v = (draws(2, 3, 64, 8, seed=seed).requires_grad_() for seed in range(3))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda tensor: tensor):
        torch_cpu.causal_attention(q, k, v)
    assert sorted(kept) == [2 * 3 * 64, *[q.numel()] * 4]


@pytest.mark.parametrize("widths", [(4, 24), (24, 4), (8, 12), (12, 8), (8, 8)])
def test_a_product_over_tokens_does_not_depend_on_which_operand_is_transposed(widths):
    a, b = draws(50, widths[0], seed=0), draws(50, widths[1], seed=1)
    torch.testing.assert_close(torch_cpu.transposed_product(a, b), a.t() @ b)


def test_layers_of_one_input_as_one_product_have_their_own_values_and_gradients():
    x = draws(20, 12, seed=0).requires_grad_()
    weights = [draws(rows, 12, seed=rows).requires_grad_() for rows in (5, 30)]
    ours = torch_cpu.linear(x, *weights, dtype=torch.float64)
    plain = torch.cat([F.linear(x, weight) for weight in weights], dim=-1)
    torch.testing.assert_close(ours, plain)
    upstream = draws(20, 35, seed=9)
    found = torch.autograd.grad(ours, (x, *weights), upstream)
    torch.testing.assert_close(found, torch.autograd.grad(plain, (x, *weights), upstream))


def test_frozen_layers_have_no_gradient_but_that_of_their_input(monkeypatch):
    layer = nn.Linear(6, 4, bias=False).requires_grad_(requires_grad=False)
    x = draws(5, 6, seed=0).float().requires_grad_()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.autocast("cpu", torch.bfloat16):
        (result,) = project_all(x, layer)
    assert result.dtype == torch.bfloat16
    result.float().sum().backward()
    assert layer.weight.grad is None
    expected = layer.weight.sum(0).expand(5, 6)
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=0.02)
