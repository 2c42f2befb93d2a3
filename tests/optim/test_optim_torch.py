"""Properties of `anarcho_optim.torch` besides the mathematics: state, batches, missing gradients, chosen arithmetic, QK-clip."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import cases  # noqa: E402
from anarcho_optim.memory import CPU_BATCH_BYTES, SCRATCH_BYTES  # noqa: E402
from anarcho_optim.torch import (  # noqa: E402
    Muon,
    MuonAdamW,
    native_bfloat16,
    param_groups,
    qk_clip,
    resolve_ns_dtype,
    shape_scale,
)
from torch import Tensor, nn  # noqa: E402
from torch_toy import toy, toy_loss, toy_optimizer, train, weights_of  # noqa: E402


@pytest.mark.parametrize("options", [{}, {"normuon": True, "row_equilibration": True}], ids=str)
def test_matrices_of_one_shape_step_together_as_they_would_alone(options, monkeypatch):
    def trained(batch_bytes: int) -> dict[str, Tensor]:
        monkeypatch.setattr("anarcho_optim.memory.CPU_BATCH_BYTES", batch_bytes)
        model = toy()
        train(model, toy_optimizer(model, **options), range(3))
        return weights_of(model)

    torch.testing.assert_close(trained(CPU_BATCH_BYTES), trained(1), atol=1e-6, rtol=1e-5)


def test_a_batch_is_as_large_as_the_cap_allows(monkeypatch):
    from anarcho_optim.torch import matrices

    sizes: list[int] = []
    orthogonal_blocks = matrices.orthogonal_blocks
    monkeypatch.setattr("anarcho_optim.memory.CPU_BATCH_BYTES", 4 * 24 * 3)
    monkeypatch.setattr(
        matrices, "orthogonal_blocks", lambda stack, *rest: sizes.append(len(stack)) or orthogonal_blocks(stack, *rest)
    )
    parameters = [nn.Parameter(torch.ones(4, 6)) for _ in range(7)] + [nn.Parameter(torch.ones(30, 30))]
    for p in parameters:
        p.grad = torch.ones_like(p)
    Muon(parameters).step()
    assert sizes == [3, 3, 1, 1]


def peak_memory(function: Callable[[], Any]) -> int:
    """Bytes that tensors of the CPU take at most during a call, besides those that were there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(accumulate(changes))


@pytest.mark.parametrize("ns_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(64, 64), (16, 256), (256, 16)], ids=str)
@pytest.mark.parametrize("options", [{}, {"row_equilibration": True}, {"normuon": True, "num_heads": 4}], ids=str)
def test_memory_does_not_grow_with_the_number_of_matrices(options, shape, ns_dtype, monkeypatch):
    def needed(count: int) -> int:
        parameters = [nn.Parameter(torch.zeros(shape)) for _ in range(count)]
        optimizer = MuonAdamW([{"params": parameters, **cases.muon(ns_dtype=ns_dtype, **options)}])
        for p in parameters:
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return peak_memory(optimizer.step)

    batch_bytes = 16 * 64 * 64 * 4
    monkeypatch.setattr("anarcho_optim.memory.CPU_BATCH_BYTES", batch_bytes)
    assert needed(16) <= 6.2 * batch_bytes < SCRATCH_BYTES / CPU_BATCH_BYTES * batch_bytes
    assert needed(48) <= 6.2 * batch_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_state_is_created_at_once_in_float32_under_its_names(dtype):
    model = toy().to(dtype)
    optimizer = toy_optimizer(model, normuon=True)
    names = {
        name: {key: tuple(value.shape) for key, value in optimizer.state[p].items()}
        for name, p in model.named_parameters()
    }
    assert names["first.weight"] == {"momentum": (8, 16), "neuron_mean_sq": (8, 1)}
    assert names["conv.weight"] == {"momentum": (8, 8, 3), "neuron_mean_sq": (8, 1)}
    assert names["qkv.weight"] == {"momentum": (16, 8), "neuron_mean_sq": (16, 1)}
    assert names["embedding.weight"] == {"exp_avg": (20, 8), "exp_avg_sq": (20, 8), "step": ()}
    assert {t.dtype for state in optimizer.state.values() for t in state.values()} == {torch.float32}
    assert not any(t.requires_grad for state in optimizer.state.values() for t in state.values())
    before = {id(t) for state in optimizer.state.values() for t in state.values()}
    train(model, optimizer, range(1))
    assert {id(t) for state in optimizer.state.values() for t in state.values()} == before


def test_parameters_without_a_gradient_are_left_alone_and_not_decayed():
    model = toy()
    optimizer = toy_optimizer(model, weight_decay=0.5, adamw_weight_decay=0.5)
    missing = {"second.weight", "conv.weight", "gate.weight", "norm.weight"}
    before = weights_of(model)
    toy_loss(model, 0).backward()
    for name in missing:
        model.get_parameter(name).grad = None
    optimizer.step()
    assert {name for name, p in model.named_parameters() if torch.equal(p, before[name])} == missing
    assert optimizer.state[model.gate.weight]["step"] == 0
    assert optimizer.state[model.first.bias]["step"] == 1


def test_a_step_without_any_gradient_changes_nothing():
    model = toy()
    before = weights_of(model)
    toy_optimizer(model).step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_momentum_is_not_overwritten_by_the_iteration():
    weight = nn.Parameter(torch.zeros(4, 6))
    optimizer = Muon([weight], momentum=0.9, nesterov=False)
    gradient = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    weight.grad = gradient
    for step in range(1, 4):
        optimizer.step()
        torch.testing.assert_close(optimizer.state[weight]["momentum"], (1 - 0.9**step) * gradient)


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_decay_is_decoupled_and_takes_the_base_rate(algorithm):
    def moved(weight_decay: float) -> Tensor:
        weight = nn.Parameter(torch.full((8, 2), 3.0))
        options = {"lr": 0.1, "weight_decay": weight_decay, "algorithm": algorithm}
        weight.grad = torch.ones(8, 2)
        MuonAdamW([{"params": [weight], **options}]).step()
        return weight.detach()

    torch.testing.assert_close(moved(0.0) - moved(0.5), torch.full((8, 2), 3.0 * 0.1 * 0.5))


def test_cautious_decay_only_shrinks_entries_that_the_update_shrinks():
    weight = nn.Parameter(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
    weight.grad = torch.tensor([[1.0, 0.5], [-0.5, 1.0]])
    options: dict[str, Any] = cases.muon(lr=0.1, weight_decay=0.5, cautious_weight_decay=True)
    plain = nn.Parameter(weight.detach().clone())
    plain.grad = weight.grad.clone()
    MuonAdamW([{"params": [weight], **options}]).step()
    MuonAdamW([{"params": [plain], **options | {"weight_decay": 0.0}}]).step()
    decayed = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(plain.detach() - weight.detach(), 0.05 * decayed, atol=1e-6, rtol=0)


@pytest.mark.parametrize("axis", [-1, -2])
def test_normuon_keeps_the_norm_and_evens_out_the_neurons(axis):
    weight = nn.Parameter(torch.zeros(6, 10))
    optimizer = MuonAdamW(
        [{"params": [weight], **cases.muon(lr=1.0, normuon=True, normuon_axis=axis, adjust_lr_fn="original")}]
    )
    weight.grad = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    twin = nn.Parameter(torch.zeros(6, 10))
    twin.grad = weight.grad.clone()
    optimizer.step()
    MuonAdamW([{"params": [twin], **cases.muon(lr=1.0, adjust_lr_fn="original")}]).step()
    torch.testing.assert_close(weight.norm(), twin.norm())
    norms = weight.detach().norm(dim=axis)
    torch.testing.assert_close(norms, norms.mean().expand_as(norms))


@pytest.mark.parametrize(("name", "scale"), [("original", 2.0), ("match_rms_adamw", 0.2 * 64**0.5), ("spectral", 2.0)])
def test_shape_scales_are_those_of_their_papers(name, scale):
    assert shape_scale(name, 64, 16) == pytest.approx(scale)
    assert shape_scale("spectral", 16, 64) == pytest.approx(0.5)
    assert shape_scale("original", 16, 64) == 1.0


def test_auto_arithmetic_is_bfloat16_where_the_cpu_has_it_and_float32_elsewhere(monkeypatch):
    cpu = torch.device("cpu")
    assert resolve_ns_dtype("auto", cpu) == (torch.bfloat16 if native_bfloat16(cpu) else torch.float32)
    assert resolve_ns_dtype("auto", torch.device("mps")) == torch.float32
    for capabilities, expected in (
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert resolve_ns_dtype("auto", cpu) == expected
    assert resolve_ns_dtype("float16", cpu) == torch.float16


def logits(query: Tensor, key: Tensor, inputs: Tensor, heads: int) -> Tensor:
    """The largest logit of each query head, (heads,); heads that share a key are neighbours."""
    q = (inputs @ query.T).view(len(inputs), heads, -1)
    k = (inputs @ key.T).view(len(inputs), -1, q.shape[-1])
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    return torch.einsum("ihd,jhd->hij", q, k).flatten(1).amax(dim=1)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_qk_clip_bounds_the_logits_of_every_head_and_leaves_small_ones_alone(key_heads):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(heads * 3, 5, generator=generator) for heads in (4, key_heads))
    query[3:6] *= 0.01
    inputs = torch.randn(16, 5, generator=generator)
    before = logits(query, key, inputs, 4)
    threshold = float(before.sort().values[1:3].mean())
    assert (before < threshold).sum() == 2
    qk_clip(query, key, max_logits=before, threshold=threshold)
    torch.testing.assert_close(logits(query, key, inputs, 4), before.clamp(max=threshold))


def test_qk_clip_refuses_sizes_that_do_not_fit():
    query, key = torch.ones(12, 5), torch.ones(6, 5)
    with pytest.raises(ValueError, match="query has 12 rows; expected a multiple of the 5 heads"):
        qk_clip(query, key, max_logits=torch.ones(5))
    with pytest.raises(ValueError, match="key has 8 rows; expected a divisor of 4 heads of 3 rows"):
        qk_clip(query, torch.ones(8, 5), max_logits=torch.ones(4))
    with pytest.raises(ValueError, match=r"threshold is 0\.0; expected a positive number"):
        qk_clip(query, key, max_logits=torch.ones(4), threshold=0.0)


def test_a_table_of_positions_with_the_shape_of_hidden_layers_makes_no_heads_of_them():
    model = nn.ModuleDict({"tokens": nn.Embedding(50, 16), "positions": nn.Embedding(16, 16)})
    model["hidden"] = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    model["head"] = nn.Linear(16, 50, bias=False)
    routed = {group["name"]: [name for name, _ in group["params"]] for group in param_groups(model)}
    assert routed == {
        "matrices": ["hidden.0.weight", "hidden.1.weight"],
        "embeddings": ["tokens.weight", "positions.weight"],
        "heads": ["head.weight"],
    }
