"""Chunked log-probabilities in MLX: exact values and gradients, and never more than one chunk of logits, compiled or not."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx.core")

import mlx.core as mx
import numpy as np
from anarcho_model.logprobs.mlx import chunked_logprobs
from mlx_models import converted, sample

TOKENS, DIM, VOCAB = 45, 6, 97


def problem() -> tuple[mx.array, mx.array, mx.array, mx.array]:
    generator = np.random.default_rng(3)
    arrays = [generator.standard_normal(shape, dtype=np.float32) for shape in ((TOKENS, DIM), (VOCAB, DIM), (TOKENS,))]
    return (*map(mx.array, arrays), mx.array(generator.integers(0, VOCAB, TOKENS, dtype=np.int32)))


@pytest.mark.parametrize("chunk", [1, 7, 45, 1000])
def test_values_and_gradients_equal_those_of_log_softmax(chunk):
    hidden, weight, upstream, targets = problem()

    def ours(hidden: mx.array, weight: mx.array) -> mx.array:
        return chunked_logprobs(hidden, weight, targets, compute_dtype=mx.float32, chunk_bytes=4 * VOCAB * chunk)

    def plain(hidden: mx.array, weight: mx.array) -> mx.array:
        logits = hidden @ weight.T
        return mx.take_along_axis(logits, targets[:, None], axis=1)[:, 0] - mx.logsumexp(logits, axis=1)

    (found,), found_gradients = mx.vjp(ours, [hidden, weight], [upstream])
    (expected,), expected_gradients = mx.vjp(plain, [hidden, weight], [upstream])
    assert mx.abs(found - expected).max().item() < 2e-5
    for a, b in zip(found_gradients, expected_gradients, strict=True):
        assert mx.abs(a - b).max().item() < 2e-4


def test_an_extreme_logit_neither_overflows_nor_loses_its_gradient():
    hidden, weight = mx.full((1, 1), 200.0), mx.array([[1.0], [-1.0], [0.9]])

    def ours(hidden: mx.array, weight: mx.array) -> mx.array:
        return chunked_logprobs(hidden, weight, mx.array([1]), compute_dtype=mx.float32, chunk_bytes=1000)

    (logprobs,), gradients = mx.vjp(ours, [hidden, weight], [mx.ones((1,))])
    assert logprobs.item() == pytest.approx(-400.0)
    assert gradients[0].item() == pytest.approx(-2.0)
    assert gradients[1].flatten().tolist() == pytest.approx([-200.0, 200.0, 0.0], abs=1e-4)


def test_the_gradient_of_the_weights_is_summed_in_float32_over_chunks_of_bfloat16():
    tokens, dim, vocab = 1024, 2, 2
    hidden, weight = mx.ones((tokens, dim), mx.bfloat16), mx.zeros((vocab, dim))

    def ours(weight: mx.array) -> mx.array:
        return chunked_logprobs(
            hidden, weight, mx.zeros((tokens,), mx.int32), compute_dtype=mx.bfloat16, chunk_bytes=4 * vocab
        )

    _, (gradient,) = mx.vjp(ours, [weight], [mx.ones((tokens,))])
    assert gradient.dtype == mx.float32
    assert gradient[0].tolist() == [512.0, 512.0]  # a sum in bfloat16 would stand still at 128


@pytest.mark.parametrize("compiled", [False, True])
def test_memory_follows_the_chunk_and_not_the_vocabulary_times_the_tokens(compiled):
    """Memory is what MLX's allocator counts; under a limit it waits for each operation before the next one's memory."""
    tokens, dim, vocab = 512, 8, 4096
    whole = 4 * tokens * vocab
    hidden, weight = mx.random.normal((tokens, dim)), mx.random.normal((vocab, dim))
    targets = mx.zeros((tokens,), mx.int32)

    def peak(chunk_bytes: int) -> int:
        def loss(hidden: mx.array, weight: mx.array) -> mx.array:
            return chunked_logprobs(hidden, weight, targets, compute_dtype=mx.float32, chunk_bytes=chunk_bytes).sum()

        step = mx.value_and_grad(loss, argnums=(0, 1))
        step = mx.compile(step) if compiled else step
        mx.eval(step(hidden, weight))
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(step(hidden, weight))
        return mx.get_peak_memory() - before

    mx.eval(hidden, weight)
    limit = mx.set_memory_limit(1)
    try:
        assert peak(whole) >= whole
        assert peak(whole // 16) < whole / 3
    finally:
        mx.set_memory_limit(limit)


def test_both_uses_of_a_tied_embedding_are_in_its_gradient(build, tmp_path):
    """Beside an untied model of the same weights, whose two gradients are those of the uses."""
    import mlx.nn as nn

    tied = converted(build(), tmp_path)
    untied = converted(build(tie_embeddings=False), tmp_path / "untied")
    untied.load_weights([*tied.named_parameters().items(), ("lm_head.weight", tied.head_weight)])
    tokens, targets = map(mx.array, sample(tied))
    (_, one), (_, two) = (
        nn.value_and_grad(model, lambda a, b, model=model: model.token_logprobs(a, b).sum())(tokens, targets)
        for model in (tied, untied)
    )
    expected = two["model"]["embed_tokens"]["weight"] + two["lm_head"]["weight"]
    assert mx.abs(one["model"]["embed_tokens"]["weight"] - expected).max().item() < 1e-5
