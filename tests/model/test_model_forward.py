"""What the forward pass promises: no look into the future, documents apart, the right element types, the same when compiled."""

from __future__ import annotations

import warnings

import jaxtyping
import pytest
import torch
from anarcho_model import ConfigError, InitConfig, ModelConfig
from anarcho_model.layers.torch import attend
from anarcho_model.torch import GPT, ContextError, KVCache


def sample(model: GPT, *, batch: int = 2, length: int = 23, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.config.vocab_size, (batch, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model: GPT, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_a_changed_later_token_changes_no_earlier_log_probability_by_a_single_bit(model, autocast):
    tokens, targets = sample(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = model.token_logprobs(tokens, targets)
        for changed in (1, 11, 22):
            other = tokens.clone()
            other[:, changed] = (other[:, changed] + 1) % model.config.vocab_size
            after = model.token_logprobs(other, targets)
            assert torch.equal(before[:, :changed], after[:, :changed])
            assert not torch.equal(before[:, changed], after[:, changed])


@torch.no_grad()
def test_isolated_documents_have_the_log_probabilities_that_they_have_alone(model):
    tokens, targets = sample(model, length=24)
    segments = torch.tensor([[0] * 9 + [1] * 15, [4] * 20 + [7] * 4])
    positions = torch.tensor([[*range(9), *range(15)], [*range(20), *range(4)]])
    packed = model.token_logprobs(tokens, targets, segments=segments, positions=positions)
    for row, cut in ((0, 9), (1, 20)):
        for part in (slice(0, cut), slice(cut, 24)):
            alone = model.token_logprobs(tokens[row : row + 1, part], targets[row : row + 1, part])
            torch.testing.assert_close(packed[row : row + 1, part], alone, rtol=0, atol=2e-5)


@torch.no_grad()
def test_explicit_positions_counting_from_zero_change_nothing(model):
    tokens, _ = sample(model)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    assert torch.equal(model(tokens), model(tokens, positions=positions))


def test_token_logprobs_are_the_log_softmax_of_the_logits(model):
    tokens, targets = sample(model)
    expected = model(tokens).log_softmax(-1).gather(2, targets[..., None])[..., 0]
    torch.testing.assert_close(model.token_logprobs(tokens, targets), expected, rtol=0, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient(build):
    model = build(qk_norm=True)
    tokens, targets = sample(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(model, model.token_logprobs(tokens, targets).sum())
        model.gradient_checkpointing = True
        again = gradients(model, model.token_logprobs(tokens, targets).sum())
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_autocast_computes_in_bfloat16_and_keeps_the_stream_and_the_result_in_float32(model):
    tokens, targets = sample(model)
    stream, products = [], []
    hooks = [block.register_forward_hook(lambda *args: stream.append(args[2].dtype)) for block in model.model.layers]
    hooks += [
        module.register_forward_hook(lambda *args: products.append((args[1][0].dtype, args[1][0].dim(), args[2].dtype)))
        for module in model.model.layers.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        logprobs = model.token_logprobs(tokens, targets)
    for hook in hooks:
        hook.remove()
    assert set(stream) == {torch.float32}
    assert set(products) == {(torch.bfloat16, 2, torch.bfloat16)}
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, model.token_logprobs(tokens, targets), rtol=0, atol=0.15)


def test_rotary_tables_stay_exact_in_a_bfloat16_model_and_out_of_the_state(build):
    exact, rounded = build(), build().to(torch.bfloat16)
    assert rounded.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert torch.equal(exact.model.rotary.cos, rounded.model.rotary.cos)
    assert not [name for name in exact.state_dict() if "rotary" in name]


def test_a_sequence_longer_than_the_context_is_refused(small_model):
    tokens, targets = sample(small_model, length=41)
    with pytest.raises(ContextError, match="41 tokens was given, but the model's context is 40"):
        small_model.token_logprobs(tokens, targets)
    with pytest.raises(ContextError, match="cache of 41 tokens"):
        KVCache(small_model, batch=1, capacity=41)
    cache = KVCache(small_model, batch=1, capacity=4)
    small_model(tokens[:1, :3], cache=cache)
    with pytest.raises(ContextError, match="holds 3 of 4 tokens, so 2 more do not fit"):
        small_model(tokens[:1, :2], cache=cache)


def test_a_cache_refuses_positions_of_the_callers(small_model):
    tokens, _ = sample(small_model, length=3)
    with pytest.raises(ValueError, match="must be None with a cache"):
        small_model(tokens, cache=KVCache(small_model, batch=2, capacity=4), positions=torch.zeros_like(tokens))


def test_initial_weights_depend_on_the_seed_alone_and_follow_the_table():
    config = ModelConfig(vocab_size=500, context_length=8, num_layers=2, dim=128, num_heads=2, tie_embeddings=False)
    first, again, other = GPT(config), GPT(config), GPT(config)
    first.init_weights(seed=7)
    torch.manual_seed(1234)
    again.init_weights(seed=7)
    other.init_weights(seed=8)
    weights = first.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in again.state_dict().items())
    for name, tensor in weights.items():
        if "norm" in name:
            assert (tensor == 1).all()
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            assert (tensor == 0).all()
        else:
            expected = 0.02 if tensor.shape[0] == 500 else tensor.shape[1] ** -0.5
            assert abs(tensor.std() / expected - 1) < 0.03
            assert not torch.equal(tensor, other.state_dict()[name])


def test_an_initialisation_option_leaves_the_draws_of_the_other_tensors_alone():
    config = ModelConfig(vocab_size=50, context_length=8, num_layers=2, dim=64, num_heads=2)
    plain, changed = GPT(config), GPT(config)
    plain.init_weights(seed=7)
    changed.init_weights(seed=7, init=InitConfig(zero_residual_outputs=False, linear_scale=0.5, embedding_std=0.1))
    for (name, a), (_, b) in zip(plain.named_parameters(), changed.named_parameters(), strict=True):
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            expected = 0.5 * (b.shape[1] * 2 * config.num_layers) ** -0.5
            assert abs(b.std() / expected - 1) < 0.05
        elif a.dim() == 2:
            torch.testing.assert_close(b, a * (5 if "embed" in name else 0.5))


def test_the_gains_of_qk_norm_may_start_elsewhere():
    model = GPT(ModelConfig(vocab_size=50, context_length=8, num_layers=2, dim=64, num_heads=2, qk_norm=True))
    model.init_weights(seed=7, init=InitConfig(qk_norm_gain=1.4))
    for name, gain in model.named_parameters():
        if gain.dim() == 1:
            assert (gain == (1.4 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1)).all(), name
    with pytest.raises(ConfigError, match=r"init\.qk_norm_gain is -1, expected a finite number of at least 0"):
        InitConfig(qk_norm_gain=-1)


@pytest.mark.usefixtures("unchecked_shapes")
def test_the_traced_model_is_one_graph_with_the_log_probabilities_and_gradients_of_the_eager_one(build):
    model = build(qk_norm=True)
    model.logits_chunk_bytes = 67 * 4 * 24  # two chunks
    tokens, targets = sample(model)
    eager = model.token_logprobs(tokens, targets)
    expected = gradients(model, eager.sum())
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        traced = torch.compile(model.token_logprobs, fullgraph=True, dynamic=False, backend="aot_eager")
        ours = traced(tokens, targets)
        torch.testing.assert_close(ours, eager, rtol=0, atol=1e-5)
        for name, gradient in gradients(model, ours.sum()).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")
def test_the_compiled_model_under_autocast_is_as_near_to_the_exact_one_as_the_eager_one(build):
    model = build(num_layers=1, qk_norm=True)
    tokens, targets = sample(model)
    exact = model.token_logprobs(tokens, targets)
    expected = gradients(model, exact.sum())
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.compile(model.token_logprobs, fullgraph=True, dynamic=False)(tokens, targets)
    torch.testing.assert_close(ours, exact, rtol=0, atol=0.15)
    for name, gradient in gradients(model, ours.sum()).items():
        assert (gradient - expected[name]).norm() < 0.05 * expected[name].norm() + 1e-3, name


def test_annotated_shapes_are_checked_here(small_model):
    with pytest.raises(jaxtyping.TypeCheckError):
        small_model.token_logprobs(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long))


def test_the_formula_that_is_compiled_on_a_cpu_equals_the_attention_kernel(monkeypatch):
    q, k, v = torch.randn(3, 2, 3, 17, 8, generator=torch.Generator().manual_seed(0))
    kernel = attend(q, k, v, mask=None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.delattr(torch.nn.functional, "scaled_dot_product_attention")
    torch.testing.assert_close(attend(q, k, v, mask=None), kernel, rtol=0, atol=1e-6)
