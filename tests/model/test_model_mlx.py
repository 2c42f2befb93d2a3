"""The MLX model is the PyTorch model: same logits, losses and gradients from the same file, in every variant and layout of a batch."""

from __future__ import annotations

import hashlib

import pytest

pytest.importorskip("mlx.core")

import anarcho_model.layers.mlx as layers
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from anarcho_model import InitConfig, ModelConfig, RopeScaling
from anarcho_model.initial_draws import PIECE, standard_normal
from anarcho_model.layers import mlx_attention
from anarcho_model.mlx import GPT, ContextError, KVCache
from anarcho_model.torch import GPT as TorchGPT
from mlx.utils import tree_flatten
from mlx_models import assert_same_gradients, converted, gradients, sample, torch_gradients

SEGMENTS = np.array([[0] * 9 + [1] * 14, [4] * 20 + [7] * 3], np.int32)
POSITIONS = np.array([[*range(9), *range(14)], [*range(20), *range(3)]], np.int32)
LAYOUTS = {
    "plain": {},
    "documents": {"segments": SEGMENTS, "positions": POSITIONS},
    "segments": {"segments": SEGMENTS},
    "positions": {"positions": POSITIONS},
}
SCALINGS = [
    RopeScaling(kind="linear", factor=3.0),
    RopeScaling(kind="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=3.0, original_context_length=16),
]


def compare(theirs, ours, **layout) -> None:
    tokens, targets = sample(ours)
    weights = np.random.default_rng(1).uniform(size=tokens.shape).astype(np.float32)
    for_torch = {key: torch.tensor(value) for key, value in layout.items()}
    for_mlx = {key: mx.array(value) for key, value in layout.items()}
    expected_logits = theirs(torch.tensor(tokens), **for_torch).detach().numpy()
    assert np.abs(np.array(ours(mx.array(tokens), **for_mlx)) - expected_logits).max() < 1e-4
    logprobs = theirs.token_logprobs(torch.tensor(tokens), torch.tensor(targets), **for_torch)
    expected = (logprobs * torch.tensor(weights)).sum() / float(weights.sum())

    def loss(tokens: mx.array, targets: mx.array) -> mx.array:
        return (ours.token_logprobs(tokens, targets, **for_mlx) * mx.array(weights)).sum() / float(weights.sum())

    found, found_gradients = gradients(ours, loss, mx.array(tokens), mx.array(targets))
    assert found == pytest.approx(expected.item(), abs=1e-5)
    assert_same_gradients(found_gradients, torch_gradients(theirs, expected), relative=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_loss_and_every_gradient_are_those_of_pytorch(model, layout, tmp_path):
    compare(model, converted(model, tmp_path), **LAYOUTS[layout])


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling.kind)
@pytest.mark.parametrize("fused", [False, True])
def test_stretched_rotary_frequencies_are_those_of_pytorch_by_either_rotation(
    build, scaling, fused, tmp_path, monkeypatch
):
    monkeypatch.setattr(layers, "has_fused_rotation", lambda x: fused)
    model = build(rope_scaling=scaling)
    compare(model, converted(model, tmp_path))


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1, "qk_norm": True}], ids=["plain", "grouped"])
@pytest.mark.parametrize("layout", ["plain", "documents"])
def test_attention_in_chunks_of_queries_is_the_same_in_forward_and_in_backward(
    build, options, layout, tmp_path, monkeypatch
):
    model = build(**options)
    monkeypatch.setattr(mlx_attention, "KEPT_SCORES_BYTES", 0)
    monkeypatch.setattr(mlx_attention, "MIN_CHUNK_QUERIES", 1)
    monkeypatch.setattr(
        mlx_attention, "SCORES_CHUNK_BYTES", 4 * 2 * 4 * 23 * 7
    )  # seven queries of 23: chunks of 6, 6, 6, 5
    compare(model, converted(model, tmp_path), **LAYOUTS[layout])


@pytest.mark.parametrize("layout", ["plain", "documents"])
def test_gradient_checkpointing_changes_no_gradient_and_leaves_the_weights_in_place(build, layout, tmp_path):
    ours = converted(build(qk_norm=True), tmp_path)
    before = ours.named_parameters()
    tokens, targets = map(mx.array, sample(ours))
    options = {key: mx.array(value) for key, value in LAYOUTS[layout].items()}

    def loss(tokens: mx.array, targets: mx.array) -> mx.array:
        return ours.token_logprobs(tokens, targets, **options).sum()

    plain, expected = gradients(ours, loss, tokens, targets)
    ours.gradient_checkpointing = True
    again, found = gradients(ours, loss, tokens, targets)
    assert again == plain
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert all(mx.array_equal(array, before[name]) for name, array in ours.named_parameters().items())


def test_a_compiled_training_step_has_the_gradients_of_the_plain_one_and_is_traced_once(build, tmp_path):
    ours = converted(build(num_kv_heads=2), tmp_path)
    ours.gradient_checkpointing, ours.logits_chunk_bytes = True, 67 * 4 * 24  # two chunks
    tokens, targets = map(mx.array, sample(ours))
    traces = []

    def loss(tokens: mx.array, targets: mx.array) -> mx.array:
        traces.append(1)
        return ours.token_logprobs(tokens, targets).sum()

    _, expected = gradients(ours, loss, tokens, targets)
    step = mx.compile(nn.value_and_grad(ours, loss), inputs=[ours.state], outputs=[ours.state])
    for _ in range(2):
        _, found = step(tokens, targets)
        assert_same_gradients({name: np.array(grad) for name, grad in tree_flatten(found)}, expected, relative=1e-4)
    assert len(traces) == 2  # one of them eager


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=["bfloat16", "float16"])
def test_the_compute_dtype_keeps_the_stream_the_result_and_the_gradients_in_float32(
    build, tmp_path, dtype, monkeypatch
):
    ours = converted(build(qk_norm=True), tmp_path)
    tokens, targets = map(mx.array, sample(ours))

    def loss(tokens: mx.array, targets: mx.array) -> mx.array:
        return ours.token_logprobs(tokens, targets).sum()

    exact = ours.token_logprobs(tokens, targets)
    _, expected = gradients(ours, loss, tokens, targets)
    ours.compute_dtype = dtype
    stream, products = set(), set()
    block, linear = layers.Block.__call__, layers.Linear.__call__
    monkeypatch.setattr(
        layers.Block, "__call__", lambda *args, **more: (stream.add(args[1].dtype), block(*args, **more))[1]
    )
    monkeypatch.setattr(layers.Linear, "__call__", lambda self, x: (products.add(x.dtype), linear(self, x))[1])
    rounded = ours.token_logprobs(tokens, targets)
    _, found = gradients(ours, loss, tokens, targets)
    assert (stream, products, rounded.dtype) == ({mx.float32}, {dtype}, mx.float32)
    assert ours(tokens).dtype == dtype
    assert mx.abs(rounded - exact).max().item() < 0.15
    for name, gradient in found.items():
        assert gradient.dtype == np.float32
        assert np.linalg.norm(gradient - expected[name]) < 0.05 * np.linalg.norm(expected[name]) + 1e-3, name


def test_parameters_have_the_names_and_shapes_of_the_file_and_a_tied_head_is_the_embedding(build, tmp_path):
    for options in ({}, {"tie_embeddings": False, "qk_norm": True}):
        ours = converted(build(**options), tmp_path)
        assert {name: array.shape for name, array in ours.named_parameters().items()} == ours.config.tensor_shapes()
    tied = converted(build(), tmp_path)
    assert tied.head_weight is tied.model.embed_tokens.weight


@pytest.mark.parametrize("steps", [(23,), (10, *[1] * 13), (3, 9, 11)])
def test_reading_through_a_cache_gives_the_logits_of_reading_at_once(model, steps, tmp_path):
    ours = converted(model, tmp_path)
    tokens = mx.array(sample(ours)[0])
    cache = KVCache(ours, batch=2, capacity=23)
    parts, start = [], 0
    for length in steps:
        parts.append(ours(tokens[:, start : start + length], cache=cache))
        start += length
    assert cache.lengths.tolist() == [23, 23]
    assert mx.abs(mx.concatenate(parts, axis=1) - ours(tokens)).max().item() < 2e-5


def test_rows_of_different_lengths_and_selected_rows_read_on_as_each_would_alone(build, tmp_path):
    ours = converted(build(num_kv_heads=2), tmp_path)
    tokens = mx.array(sample(ours, batch=3)[0])
    whole = ours(tokens)
    cache = KVCache(ours, batch=3, capacity=23)
    ours(tokens[:, :8], cache=cache)
    cache.lengths = mx.array([5, 8, 6], dtype=mx.int32)
    rows = [2, 0]
    view = cache.select(rows)
    assert view.lengths.tolist() == [6, 5]
    new = mx.stack([tokens[2, 6:9], tokens[0, 5:8]])
    expected = mx.stack([whole[2, 6:9], whole[0, 5:8]])
    assert mx.abs(ours(new, cache=view) - expected).max().item() < 2e-5
    assert (view.lengths.tolist(), cache.lengths.tolist()) == ([9, 8], [5, 8, 6])
    cache.lengths = mx.array([8, 8, 9], dtype=mx.int32)  # what the view has stored is the cache's own
    found = ours(mx.stack([tokens[0, 8:9], tokens[1, 8:9], tokens[2, 9:10]]), cache=cache)[:, 0]
    assert mx.abs(found - mx.stack([whole[0, 8], whole[1, 8], whole[2, 9]])).max().item() < 2e-5
    nested = cache.select([0, 2]).select([1])
    assert mx.abs(ours(tokens[2:, 10:12], cache=nested) - whole[2:, 10:12]).max().item() < 2e-5


@pytest.mark.parametrize(("bits", "bound", "part"), [(8, 0.02, 0.4), (4, 0.35, 0.25)])
def test_a_quantised_cache_takes_a_part_of_the_memory_for_a_bounded_error(build, bits, bound, part, tmp_path):
    ours = converted(build(head_dim=32), tmp_path)
    tokens = mx.array(sample(ours)[0])
    caches = [KVCache(ours, batch=2, capacity=23, bits=chosen) for chosen in (bits, None)]
    logits = [
        mx.concatenate([ours(tokens[:, :10], cache=cache), ours(tokens[:, 10:], cache=cache)], axis=1)
        for cache in caches
    ]
    error = mx.abs(logits[0] - logits[1]).max().item() / mx.abs(logits[1]).max().item()
    assert 0 < error < bound
    sizes = [sum(array.nbytes for array in cache.layers[0].keys.parts) for cache in caches]
    assert sizes[0] <= part * sizes[1]


def test_what_cannot_be_quantised_is_refused(build, tmp_path):
    ours = converted(build(), tmp_path)
    with pytest.raises(ValueError, match="bits is 3, expected 4 or 8"):
        KVCache(ours, batch=1, capacity=4, bits=3)
    with pytest.raises(ValueError, match="multiple of 32, but the model's are 8 wide"):
        KVCache(ours, batch=1, capacity=4, bits=4)


def test_a_sequence_longer_than_the_context_is_refused_and_positions_beside_a_cache(build, tmp_path):
    ours = converted(build(), tmp_path)
    tokens, targets = map(mx.array, sample(ours, length=41))
    with pytest.raises(ContextError, match="41 tokens was given, but the model's context is 40"):
        ours.token_logprobs(tokens, targets)
    with pytest.raises(ContextError, match="cache of 41 tokens"):
        KVCache(ours, batch=1, capacity=41)
    cache = KVCache(ours, batch=1, capacity=4)
    ours(tokens[:1, :3], cache=cache)
    with pytest.raises(ContextError, match="holds 3 of 4 tokens, so 2 more do not fit"):
        ours(tokens[:1, :2], cache=cache)
    with pytest.raises(ValueError, match="must be None with a cache"):
        ours(tokens[:1, :1], cache=cache, positions=mx.zeros((1, 1), dtype=mx.int32))


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_a_seed_gives_the_initial_weights_of_pytorch(seed):
    config = ModelConfig(vocab_size=37, context_length=8, num_layers=1, dim=18, num_heads=3, hidden_dim=5)
    init = InitConfig(zero_residual_outputs=False)
    theirs, ours = TorchGPT(config), GPT(config)  # with sizes that are no multiples of 16
    theirs.init_weights(seed=seed, init=init)
    ours.init_weights(seed=seed, init=init)
    for name, tensor in theirs.state_dict().items():
        assert np.abs(np.array(ours.named_parameters()[name]) - tensor.numpy()).max() < 1e-6, name


def test_draws_of_more_than_a_piece_are_those_of_pytorch():
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(b"3/name").digest()[:8], "little") >> 1)
    expected = torch.randn(PIECE + 5, 3, generator=generator).numpy()
    assert np.abs(standard_normal((PIECE + 5, 3), seed=3, name="name") - expected).max() < 1e-5


def test_initial_weights_depend_on_the_seed_alone_and_follow_the_table():
    config = ModelConfig(vocab_size=500, context_length=8, num_layers=2, dim=128, num_heads=2, tie_embeddings=False)
    first, again, other, changed = (GPT(config) for _ in range(4))
    first.init_weights(seed=7)
    mx.random.seed(1234)
    again.init_weights(seed=7)
    other.init_weights(seed=8)
    changed.init_weights(seed=7, init=InitConfig(zero_residual_outputs=False, linear_scale=0.5, embedding_std=0.1))
    for name, array in first.named_parameters().items():
        assert mx.array_equal(again.named_parameters()[name], array)
        if "norm" in name:
            assert (array == 1).all()
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            assert (array == 0).all()
            scale = 0.5 * (array.shape[1] * 2 * config.num_layers) ** -0.5
            assert abs(mx.std(changed.named_parameters()[name]).item() / scale - 1) < 0.03
        else:
            expected = 0.02 if array.shape[0] == 500 else array.shape[1] ** -0.5
            assert abs(mx.std(array).item() / expected - 1) < 0.03
            assert not mx.array_equal(array, other.named_parameters()[name])
            factor = 5 if "embed" in name else 1 if "lm_head" in name else 0.5
            assert mx.allclose(changed.named_parameters()[name], array * factor, rtol=1e-5)


def test_the_gains_of_qk_norm_may_start_elsewhere():
    model = GPT(ModelConfig(vocab_size=50, context_length=8, num_layers=2, dim=64, num_heads=2, qk_norm=True))
    model.init_weights(seed=7, init=InitConfig(qk_norm_gain=1.4))
    for name, gain in model.named_parameters().items():
        if gain.ndim == 1:
            expected = 1.4 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0
            assert mx.allclose(gain, mx.array(expected)), name


@pytest.mark.parametrize(("checkpointing", "least", "most"), [(False, 15, 18), (True, 0.9, 1.2)])
def test_backward_keeps_of_each_layer_what_its_formulas_need_and_no_more(monkeypatch, checkpointing, least, most):
    """In widths of the stream: two stream states, two norms, q, k, v, the mixed values, and gate and up of four each.

    With checkpointing it is the state before the layer, of sequences so long that gradients, which come later, are less than that.
    """
    length, dim = 1024 if checkpointing else 256, 32
    monkeypatch.setattr(mlx_attention, "KEPT_SCORES_BYTES", 0)
    monkeypatch.setattr(mlx_attention, "MIN_CHUNK_QUERIES", 16)
    monkeypatch.setattr(mlx_attention, "SCORES_CHUNK_BYTES", 4 * 4 * length * 16)
    limit = mx.set_memory_limit(1)  # MLX then waits for each operation before it takes memory for the next

    def peak(num_layers: int) -> int:
        model = GPT(ModelConfig(vocab_size=8, context_length=length, num_layers=num_layers, dim=dim, num_heads=4))
        model.init_weights(seed=0, init=InitConfig(zero_residual_outputs=False))
        model.gradient_checkpointing = checkpointing
        model.compute_dtype = mx.bfloat16 if checkpointing else mx.float32
        tokens = mx.zeros((1, length), dtype=mx.int32)
        step = nn.value_and_grad(model, lambda tokens: model.token_logprobs(tokens, tokens).sum())
        mx.eval(tokens)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(step(tokens)[1])
        gradients = 0 if checkpointing else sum(array.nbytes for array in model.named_parameters().values())
        return mx.get_peak_memory() - before - gradients

    try:
        widths = (peak(8) - peak(2)) / 6 / (4 * length * dim)
    finally:
        mx.set_memory_limit(limit)
    assert least < widths < most


def test_frozen_weights_have_no_gradient_and_the_others_theirs(build, tmp_path):
    ours = converted(build(), tmp_path)
    tokens, targets = map(mx.array, sample(ours))

    def loss(tokens: mx.array, targets: mx.array) -> mx.array:
        return ours.token_logprobs(tokens, targets).sum()

    _, expected = gradients(ours, loss, tokens, targets)
    for block in ours.model.layers:
        block.mlp.freeze()
    for ours.gradient_checkpointing in (False, True):
        _, found = gradients(ours, loss, tokens, targets)
        assert not [name for name in found if "mlp" in name]
        assert_same_gradients(found, {name: expected[name] for name in found}, relative=1e-4)
