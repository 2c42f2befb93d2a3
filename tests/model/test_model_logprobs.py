"""Chunked log-probabilities: exact values and gradients, and never more than one chunk of logits."""

from __future__ import annotations

import pytest
import torch
from anarcho_model.logprobs.chunks import chunk_tokens
from anarcho_model.logprobs.torch import chunked_logprobs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TOKENS, DIM, VOCAB = 45, 6, 97


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, DIM, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, DIM, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    upstream = torch.randn(TOKENS, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, weight, targets, upstream


@pytest.mark.parametrize("chunk", [1, 7, 45, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_values_and_gradients_equal_those_of_log_softmax(dtype, tolerance, chunk):
    hidden, weight, targets, upstream = problem(dtype)
    ours = chunked_logprobs(hidden, weight, targets, compute_dtype=dtype, chunk_bytes=4 * VOCAB * chunk)
    plain = (hidden @ weight.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(ours, plain, rtol=0, atol=tolerance)
    found = torch.autograd.grad(ours, (hidden, weight), upstream)
    expected = torch.autograd.grad(plain, (hidden, weight), upstream)
    torch.testing.assert_close(found, expected, rtol=0, atol=10 * tolerance)


def test_the_formula_that_is_compiled_has_the_same_gradients(monkeypatch):
    hidden, weight, targets, upstream = problem(torch.float64)
    ours = chunked_logprobs(hidden, weight, targets, compute_dtype=torch.float64, chunk_bytes=4 * VOCAB * 7)
    expected = torch.autograd.grad(ours, (hidden, weight), upstream, retain_graph=True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(torch.autograd.grad(ours, (hidden, weight), upstream), expected)


def test_an_extreme_logit_neither_overflows_nor_loses_its_gradient():
    hidden, weight = torch.full((1, 1), 200.0, requires_grad=True), torch.tensor([[1.0], [-1.0], [0.9]])
    logprobs = chunked_logprobs(
        hidden, weight.requires_grad_(), torch.tensor([1]), compute_dtype=torch.float32, chunk_bytes=1000
    )
    assert logprobs.item() == pytest.approx(-400.0)
    gradients = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    assert gradients[0].item() == pytest.approx(-2.0)
    assert gradients[1].flatten().tolist() == pytest.approx([-200.0, 200.0, 0.0], abs=1e-4)


def test_tokens_without_weight_have_no_gradient_however_their_sign_is_written():
    hidden, weight, targets, upstream = problem(torch.float32)
    upstream[::2] = -0.0
    ours = chunked_logprobs(hidden, weight, targets, compute_dtype=torch.float32, chunk_bytes=4 * VOCAB * 7)
    grad_hidden, grad_weight = torch.autograd.grad(ours, (hidden, weight), upstream)
    assert (grad_hidden[::2] == 0).all()
    kept = chunked_logprobs(hidden[1::2], weight, targets[1::2], compute_dtype=torch.float32, chunk_bytes=4 * VOCAB * 7)
    expected = torch.autograd.grad(kept, weight, upstream[1::2])[0]
    torch.testing.assert_close(grad_weight, expected, rtol=0, atol=1e-4)


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation's result has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("autocast", [False, True])
def test_no_tensor_larger_than_a_chunk_of_logits_exists_in_forward_or_backward(build, autocast):
    model = build(vocab_size=501, dim=16, num_heads=2, num_layers=1, hidden_dim=16)
    tokens = torch.randint(0, 501, (8, 40))
    model.logits_chunk_bytes = 4 * 501 * 20
    with LargestTensor() as forward, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model.token_logprobs(tokens, tokens).sum()
    with LargestTensor() as backward:
        loss.backward()
    assert forward.elements == backward.elements == 20 * 501


def test_gradients_under_autocast_are_float32_and_near_the_exact_ones(build):
    model = build()
    tokens = torch.randint(0, 67, (2, 31), generator=torch.Generator().manual_seed(0))
    exact = torch.autograd.grad(model.token_logprobs(tokens, tokens).sum(), list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.token_logprobs(tokens, tokens).sum()
    for found, expected in zip(torch.autograd.grad(loss, list(model.parameters())), exact, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.05 * expected.norm() + 1e-3


def test_chunks_keep_the_byte_budget_and_the_element_limit_of_apple_gpus_and_are_even():
    assert chunk_tokens(100, vocab_size=10, chunk_bytes=4 * 10 * 99) == 50
    assert chunk_tokens(100, vocab_size=10, chunk_bytes=1) == 1
    assert chunk_tokens(5, vocab_size=10, chunk_bytes=2**40) == 5
    assert chunk_tokens(2**20, vocab_size=32000, chunk_bytes=2**60) * 32000 < 2**31
