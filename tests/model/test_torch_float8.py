"""Training in 8-bit floats: its products are those of the rounded factors, its bounds hold, and a model learns as it does without.

PyTorch multiplies 8-bit floats on the CPU, too, so that a compiled model is traced and runs there; formulas stand for the kernels, which
Triton's interpreter runs. Tests that need a GPU are skipped without one.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from anarcho_model import InitConfig, ModelConfig
from anarcho_model.layers import torch_cuda, torch_float8
from anarcho_model.layers.torch import RMSNorm
from anarcho_model.logprobs import torch_float8 as head_float8
from anarcho_model.logprobs.torch import chunked_logprobs
from anarcho_model.torch import GPT
from cuda_layers import (
    HALF,
    check_interpreted,
    draws,
    rotary_formula,
    stand_in_for_cuda,
    step,
    swiglu_formula,
    swiglu_in_place,
)
from torch import Tensor, nn

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
needs_float8 = pytest.mark.skipif(
    not torch.cuda.is_available()
    or not torch_cuda.AVAILABLE
    or torch.cuda.get_device_capability() < torch_float8.MIN_CAPABILITY,
    reason="needs CUDA with compute capability 8.9 and Triton",
)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ROUNDING = {E4M3: 2**-4, E5M2: 2**-3}
"""Largest relative error of a number that is rounded to the nearest."""
SMALLEST = {E4M3: 2**-9, E5M2: 2**-16}


def assert_narrowed(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Each number is the nearest one; Triton's interpreter cuts some of e4m3 off, and halves some that are just under a power of two."""
    assert found.dtype == dtype
    assert found.is_contiguous()
    tolerance = {"rtol": 1.01 * ROUNDING[dtype], "atol": SMALLEST[dtype]}
    if not found.is_cuda and dtype == E4M3:
        near = torch.isclose(found.double(), exact.double(), rtol=2 * ROUNDING[dtype], atol=SMALLEST[dtype])
        assert near.double().mean() > 0.9
        tolerance["rtol"] = 0.5
    torch.testing.assert_close(found.cpu().double(), exact.double(), **tolerance)


def logit_formula(logits: Tensor, normalisers: Tensor, targets: Tensor, grad_output: Tensor) -> Tensor:
    """The gradient of logits, in float64."""
    softmax = (logits.double() - normalisers.double()[:, None]).exp()
    return (F.one_hot(targets, logits.shape[1]) - softmax) * grad_output.double()[:, None]


def check_kernels(device: str) -> None:
    from anarcho_model.layers import torch_float8_kernels as kernels

    sizes = [(128, 64), (144, 80), (16, 192)] + [(4096, 3072)] * (device == "cuda")
    for tokens, width in sizes:
        gate_up, grad = 3 * draws(tokens, 2 * width, seed=1), draws(tokens, width, seed=2)
        gate_up[0, 0], gate_up[0, 1] = 50, -50
        exact, hidden = swiglu_formula(gate_up, grad)
        scale, hidden_scale = 1000 / exact.abs().max(), 448 / hidden.abs().max()
        scales = (scale.float().to(device), hidden_scale.float().to(device))
        rows, columns, turned = kernels.swiglu_gradients(gate_up.to(device), grad.to(device), *scales)
        assert_narrowed(rows, exact * scale, E5M2)
        assert_narrowed(turned, hidden.t() * hidden_scale, E4M3)
        assert columns.is_contiguous()
        assert torch.equal(columns.t().float(), rows.float())
        narrow, units, factors = kernels.swiglu_hidden(gate_up.to(device), largest=448.0, smallest_limit=1e-30)
        torch.testing.assert_close((448 * units.cpu()).float(), hidden.abs().amax(1, keepdim=True).float())
        assert_narrowed(narrow, hidden / units.cpu().double(), E4M3)
        gate, up = gate_up.double().abs().chunk(2, dim=-1)
        assert torch.equal(factors.cpu().double(), torch.maximum(gate, up).amax(1, keepdim=True))
    for tokens, vocab in ((128, 64), (80, 208)) + ((4096, 32000),) * (device == "cuda"):
        logits, targets = 5 * draws(tokens, vocab, seed=4), torch.arange(tokens) * 7 % vocab
        grad, normalisers = draws(tokens, seed=5, dtype=torch.float32), logits.float().logsumexp(1)
        exact = logit_formula(logits, normalisers, targets, grad) * 1000
        operands = (t.to(device) for t in (logits, normalisers, targets, grad, torch.tensor(1000.0)))
        rows, columns = kernels.logit_gradients(*operands)
        assert_narrowed(rows, exact, E5M2)
        assert columns.is_contiguous()
        assert torch.equal(columns.t().float(), rows.float())
    zeros = kernels.swiglu_hidden(torch.zeros(16, 128, device=device, dtype=HALF), largest=448.0, smallest_limit=1e-30)
    assert not zeros[0].float().any()
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e9, -57344.0, -0.0], device=device)
    for found in kernels.cast_in_both_orders(special.expand(16, -1), torch.ones((), device=device)):
        assert torch.equal(found.float().view(-1).isnan().sum(), torch.tensor(16, device=device))
        assert found.float().isinf().sum() == 3 * 16
    for tokens, width, dtype in ((256, 64, HALF), (80, 144, torch.float32)):
        x = draws(tokens, width, seed=3, dtype=dtype)
        rows, columns = kernels.cast_in_both_orders(x.to(device), torch.tensor(100.0, device=device))
        assert_narrowed(rows, 100 * x.double(), E5M2)
        assert columns.is_contiguous()
        assert torch.equal(columns.t().float(), rows.float())
        for kind in (E4M3, E5M2):
            narrow = x.to(kind).to(device)
            assert kernels.turned(narrow).is_contiguous()
            assert torch.equal(kernels.turned(narrow).t().float(), narrow.float())
        turned_view = kernels.turned(x.to(E4M3).to(device).t())  # of a view
        assert torch.equal(turned_view.float(), x.to(E4M3).to(device).float())


@needs_triton
def test_the_kernels_write_both_orders():
    """Triton's interpreter runs them on the CPU."""
    check_interpreted(__file__)


@needs_float8
def test_the_kernels_write_both_orders_on_a_gpu():
    check_kernels("cuda")


@pytest.fixture
def on_cpu(unchecked_shapes, monkeypatch):
    """The path of CUDA on the CPU for layers of any width; a list of the kernels whose formulas were called."""
    calls: list[str] = []

    def swiglu(gate_up: Tensor, grad_hidden: Tensor, scale: Tensor, hidden_scale: Tensor) -> tuple[Tensor, ...]:
        calls.append("swiglu")
        gradient, hidden = swiglu_formula(gate_up, grad_hidden)
        gradient *= scale
        assert gradient.abs().max() <= torch_float8.LARGEST[E5M2] or gradient.isnan().any(), "the bound does not hold"
        gradient, hidden = gradient.to(E5M2), (hidden * hidden_scale).to(E4M3)
        return gradient, gradient.t().contiguous(), hidden.t().contiguous()

    def cast(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        calls.append("cast")
        rows = (x.float() * scale).to(E5M2)
        return rows, rows.t().contiguous()

    def turned(x: Tensor, after: Tensor) -> Tensor:
        del after
        calls.append("turned")
        return x.t().contiguous()

    def hidden(gate_up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        calls.append("hidden")
        gate, up = gate_up.float().chunk(2, dim=-1)
        made = F.silu(gate) * up
        units = made.abs().amax(-1, keepdim=True).clamp(min=torch_float8.SMALLEST_LIMIT) / 448
        return (made / units).to(E4M3), units, torch.maximum(gate.abs(), up.abs()).amax(-1, keepdim=True)

    def logit(logits: Tensor, normalisers: Tensor, targets: Tensor, grad_output: Tensor, scale: Tensor) -> Any:
        calls.append("logit")
        rows = (logit_formula(logits, normalisers, targets, grad_output) * scale).to(E5M2)
        return rows, rows.t().contiguous()

    head_float8.logit_gradients.register_kernel("cpu")(logit)
    torch_float8.swiglu_hidden.register_kernel("cpu")(hidden)
    torch_float8.swiglu_gradients.register_kernel("cpu")(swiglu)
    torch_float8.cast_in_both_orders.register_kernel("cpu")(cast)
    torch_float8.turned.register_kernel("cpu")(turned)
    torch_cuda.pack_rotary_gradients.register_kernel("cpu")(rotary_formula)
    torch_cuda.swiglu_gradients.register_kernel("cpu")(swiglu_in_place)
    stand_in_for_cuda(monkeypatch)
    monkeypatch.setattr(torch_float8, "MIN_WIDTH", 0)
    monkeypatch.setattr(torch_float8, "MIN_FUSED_WIDTH", 0)
    torch._dynamo.reset()
    yield calls
    torch._dynamo.reset()


def assert_alike(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Within what e4m3 and e5m2 round away."""
    torch.testing.assert_close(found[0], expected[0], rtol=0.02, atol=0)
    for name, gradient in expected[1].items():
        assert found[1][name].dtype == gradient.dtype, name
        assert (found[1][name] - gradient).norm() <= 0.2 * gradient.norm(), name


SWIGLU, LINEAR = ["hidden", "cast", "swiglu", "turned"], ["cast", "turned"]
HEAD = ["logit", "turned"]


@pytest.mark.parametrize(
    ("options", "how", "checkpointing", "segments", "linear"),
    [
        ({}, "whole", False, False, 2),
        ({"num_kv_heads": 2, "head_dim": 16}, "whole", True, True, 2),
        ({}, "parts", True, False, 2),
        ({"qk_norm": True}, "parts", False, True, 1),
        ({"vocab_size": 80}, "whole", False, False, 2),
        ({"vocab_size": 80, "tie_embeddings": False}, "parts", True, False, 2),
    ],
)
def test_a_compiled_model_has_nearly_the_gradients_of_an_eager_one(
    build, on_cpu, options, how, checkpointing, segments, linear
):
    """Norms of queries and keys leave the product before them to the compiler, and an output layer of 67 ids is none that a GPU takes."""
    model = build(num_layers=1, **options)
    model.gradient_checkpointing = checkpointing
    expected = step(model, "eager", segments=segments)
    model.float8 = True
    assert step(model, "eager", segments=segments)[0] == expected[0], "nothing changes where nothing is compiled"
    assert not on_cpu
    found = step(model, how, segments=segments)
    assert sorted(on_cpu) == sorted(
        SWIGLU + checkpointing * ["hidden"] + linear * LINEAR + ("vocab_size" in options) * HEAD
    )
    assert_alike(found, expected)
    assert found[0] != expected[0]


def test_operands_lie_as_a_gpu_reads_them_and_have_the_types_that_it_takes(build, on_cpu, monkeypatch):
    seen: list[tuple[torch.dtype, torch.dtype, bool]] = []
    product = torch._scaled_mm

    def checked(a: Tensor, b: Tensor, **options: object) -> Tensor:
        summed = a.shape[1]
        assert a.stride() == (summed, 1)
        assert b.stride() == (1, summed)
        assert all(size % 16 == 0 for size in (*a.shape, *b.shape))
        assert all(
            options[name].dtype == torch.float32 and options[name].numel() == 1 for name in ("scale_a", "scale_b")
        )
        seen.append((a.dtype, b.dtype, options["use_fast_accum"]))
        return product(a, b, **options)

    monkeypatch.setattr(torch, "_scaled_mm", checked)
    model = build(num_layers=1)
    model.float8 = True
    step(model, "whole")
    # q, k and v, then o, gate and up, and down: one for the output, two for the gradients.
    assert set(seen) == {(E4M3, E4M3, True), (E5M2, E4M3, False)}
    seen.clear()
    used = draws(160, 32, seed=1).requires_grad_(), draws(80, 32, seed=2).requires_grad_()
    limit, targets = used[0].detach().abs().amax().float(), torch.zeros(160, dtype=torch.long)
    head_float8.logprobs(*used, targets, size=60, limit=limit).sum().backward()
    # Once more for backward, as it is not compiled here.
    assert sorted(seen, key=str) == sorted(6 * [(E4M3, E4M3, True)] + 6 * [(E5M2, E4M3, False)], key=str)
    assert on_cpu


def exact_product(x: Tensor, weight: Tensor) -> Tensor:
    """Of what both are when they are rounded in their own units."""
    units = [t.abs().max().float() / 448 for t in (x, weight)]
    return (
        (x.float() / units[0]).to(E4M3).float() @ (weight.float() / units[1]).to(E4M3).float().t() * units[0] * units[1]
    )


@pytest.mark.usefixtures("on_cpu")
def test_a_product_is_that_of_the_rounded_factors_and_so_are_its_gradients():
    x, weight, grad = draws(48, 32, seed=1), draws(80, 32, seed=2, dtype=torch.float32), draws(48, 80, seed=3)
    x.requires_grad_(), weight.requires_grad_()
    y = torch_float8.linear(x, weight)
    y.backward(grad)
    torch.testing.assert_close(y.float(), exact_product(x, weight), rtol=0.01, atol=0.01)
    for found, exact in ((x.grad, grad.float() @ weight), (weight.grad, grad.float().t() @ x.float())):
        assert (found - exact).norm() < 0.1 * exact.norm()
        assert (found - exact).norm() > 0.01 * exact.norm()


def test_log_probabilities_of_several_chunks_are_near_the_exact_ones_and_so_are_their_gradients(on_cpu):
    """160 tokens in chunks of 64, the last of 32; a token that does not count has no gradient."""
    hidden, weight, grad = draws(160, 32, seed=1), draws(80, 32, seed=2, dtype=torch.float32), draws(160, seed=3)
    targets = torch.arange(160) % 80
    grad[5] = 0
    results = []
    for limit in (None, hidden.abs().amax().float()):
        used = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        run = torch.compile(chunked_logprobs, dynamic=False, backend="aot_eager")
        found = run(*used, targets, compute_dtype=HALF, chunk_bytes=64 * 4 * 80, limit=limit)
        found.backward(grad.float())
        results.append((found.detach(), *(t.grad for t in used)))
    assert on_cpu == 3 * HEAD
    for found, exact in zip(results[1], results[0], strict=True):
        assert found.dtype == exact.dtype
        assert 0.001 * exact.norm() < (found - exact).norm() < 0.1 * exact.norm()
    assert not results[1][1][5].any()


@pytest.mark.parametrize(
    ("tokens", "dim", "vocab", "frozen", "dtype"),
    [
        (168, 32, 80, False, HALF),
        (160, 40, 80, False, HALF),
        (160, 32, 67, False, HALF),
        (160, 32, 80, True, HALF),
        (160, 32, 80, False, torch.float32),
    ],
)
def test_log_probabilities_of_other_sizes_stay_in_bfloat16(on_cpu, tokens, dim, vocab, frozen, dtype):
    hidden, weight = draws(tokens, dim, seed=1).requires_grad_(), nn.Parameter(draws(vocab, dim, seed=2))
    weight.requires_grad_(not frozen)
    run = torch.compile(chunked_logprobs, dynamic=False, backend="aot_eager")
    limit = hidden.detach().abs().amax().float()
    targets = torch.zeros(tokens, dtype=torch.long)
    run(hidden, weight, targets, compute_dtype=dtype, chunk_bytes=2**20, limit=limit).sum().backward()
    with torch.no_grad():
        run(hidden, weight, targets, compute_dtype=dtype, chunk_bytes=2**20, limit=limit)
    assert not on_cpu


@pytest.mark.usefixtures("on_cpu")
def test_a_swiglu_with_outliers_stays_within_its_bounds_and_near_the_exact_one():
    """The kernel's formula checks that no gradient is beyond the largest number of its type."""
    for seed in range(4):
        x, grad = draws(64, 32, seed=seed), draws(64, 32, seed=seed + 1)
        weights = [
            draws(*shape, seed=seed + 2 + i, dtype=torch.float32)
            for i, shape in enumerate([(48, 32), (48, 32), (32, 48)])
        ]
        x[0] *= 30
        grad[1] *= 1000
        weights[0][3] *= 10
        weights[2][:, 5] *= 10
        found = [t.clone().requires_grad_() for t in (x, *weights)]
        exact = [t.float().clone().requires_grad_() for t in (x, *weights)]
        limit = x.abs().max().float()
        y = torch_float8.swiglu(*found, limit=limit)
        hidden = F.silu(exact[0] @ exact[1].t()) * (exact[0] @ exact[2].t())
        expected = hidden @ exact[3].t()
        y.backward(grad)
        expected.backward(grad.float())
        assert (y - expected).norm() < 0.2 * expected.norm()
        for ours, theirs in zip(found, exact, strict=True):
            assert (ours.grad - theirs.grad).norm() < 0.2 * theirs.grad.norm()


@pytest.mark.usefixtures("on_cpu")
def test_a_gradient_that_is_not_finite_stays_so_and_zeros_stay_zeros():
    for value in (float("nan"), float("inf"), 0.0):
        x, grad = draws(16, 16, seed=0).requires_grad_(), torch.zeros(16, 16, dtype=HALF)
        weights = [torch.zeros(16, 16, requires_grad=True) for _ in range(3)]
        single = torch.ones(16, 16, requires_grad=True)
        grad[2, 3] = value
        torch_float8.swiglu(x, *weights, limit=x.detach().abs().amax().float()).backward(grad)
        torch_float8.linear(x, single).backward(grad)
        gradients = (x.grad, weights[2].grad, single.grad)
        if value == 0:
            assert all(gradient.eq(0).all() for gradient in gradients)
        else:
            assert all(not gradient.isfinite().all() for gradient in gradients)


def test_no_number_of_a_norm_is_larger_than_its_limit():
    norm = RMSNorm(64, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(draws(64, seed=0, dtype=torch.float32))
        x = torch.eye(64) * torch.logspace(-3, 20, 64)
        assert norm(x).abs().max() <= norm.limit() * (1 + 1e-6)
        assert norm(x).abs().max() > 0.99 * norm.limit()


@pytest.mark.usefixtures("on_cpu")
def test_evaluation_and_sizes_that_the_products_do_not_take_stay_in_bfloat16(build, on_cpu):
    model = build(num_layers=1)
    tokens = torch.randint(67, (3, 32), generator=torch.Generator().manual_seed(0))
    results = []
    for float8 in (False, True):
        model.float8 = float8
        torch._dynamo.reset()
        with torch.no_grad(), torch.autocast("cpu", HALF):
            results.append(torch.compile(model.token_logprobs, backend="aot_eager")(tokens, tokens))
    assert torch.equal(*results)
    for length, options in ((21, {}), (32, {"dim": 40, "num_heads": 2})):
        model = build(num_layers=1, **options)
        model.float8 = True
        step(model, "whole", length=length)
    assert not on_cpu


def test_narrow_layers_stay_in_bfloat16(on_cpu, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch_float8, "MIN_WIDTH", 100)
    monkeypatch.setattr(torch_float8, "MIN_FUSED_WIDTH", 100)
    x = draws(16, 128, seed=0)
    single, wide = nn.Linear(128, 128, bias=False), nn.Linear(128, 512, bias=False)
    down = nn.Linear(512, 128, bias=False)
    assert not torch_float8.suits_linear(x, single, dtype=HALF)
    assert not torch_float8.suits_linear(x, *[single] * 2, dtype=HALF)
    assert torch_float8.suits_linear(x, *[single] * 4, dtype=HALF)
    assert not torch_float8.suits_linear(x, *[single] * 4, dtype=torch.float16)
    assert torch_float8.suits_swiglu(x, wide, wide, down, dtype=HALF)
    assert not torch_float8.suits_swiglu(x, single, single, single, dtype=HALF)
    frozen = nn.Linear(512, 128, bias=False).requires_grad_(requires_grad=False)
    assert not torch_float8.suits_swiglu(x, wide, wide, frozen, dtype=HALF)
    assert not on_cpu


def test_a_model_learns_as_it_does_in_bfloat16(on_cpu):
    """A text whose next token follows from the two before it."""
    config = ModelConfig(vocab_size=32, context_length=32, num_layers=1, dim=32, num_heads=2, hidden_dim=64)
    tokens = torch.randint(32, (16, 33), generator=torch.Generator().manual_seed(0))
    for place in range(2, 33):
        tokens[:, place] = (tokens[:, place - 1] + 3 * tokens[:, place - 2]) % 8
    losses = {}
    for float8 in (False, True):
        model = GPT(config)
        model.init_weights(seed=0, init=InitConfig())
        model.float8 = float8
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        logprobs = torch.compile(model.token_logprobs, dynamic=False, backend="aot_eager")
        for _ in range(60):
            optimizer.zero_grad()
            with torch.autocast("cpu", HALF):
                loss = -logprobs(tokens[:, :-1], tokens[:, 1:]).mean()
            loss.backward()
            optimizer.step()
            losses.setdefault(float8, []).append(loss.item())
        assert bool(on_cpu) == float8
    assert losses[True][0] == pytest.approx(losses[False][0], rel=0.01)
    assert losses[True][-1] < 0.5 * losses[True][0]
    assert losses[True][-1] == pytest.approx(losses[False][-1], abs=0.1)


def test_what_stands_in_the_way_is_named(monkeypatch):
    config = ModelConfig(vocab_size=67, dim=768, num_heads=12)
    cuda = torch.device("cuda")
    assert "the device is cpu" in (torch_float8.obstacle(config, torch.device("cpu")) or "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch_cuda, "AVAILABLE", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert "compute capability 8.6; expected 8.9" in (torch_float8.obstacle(config, cuda) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert torch_float8.obstacle(config, cuda) is None
    uneven = ModelConfig(vocab_size=67, dim=768, num_heads=12, hidden_dim=3000)
    assert "model.hidden_dim is 3000; expected a multiple of 16" in (torch_float8.obstacle(uneven, cuda) or "")
    narrow = ModelConfig(vocab_size=67, dim=64, num_heads=2)
    assert "too narrow" in (torch_float8.obstacle(narrow, cuda) or "")
    monkeypatch.setattr(torch_cuda, "AVAILABLE", False)
    assert "Triton" in (torch_float8.obstacle(config, cuda) or "")


@needs_float8
@pytest.mark.parametrize(
    ("options", "how", "checkpointing", "segments"),
    [
        ({}, "whole", False, False),
        ({"num_kv_heads": 2}, "whole", True, True),
        ({}, "parts", True, False),
        ({"qk_norm": True}, "parts", False, True),
        ({"vocab_size": 80}, "whole", False, False),
        ({"vocab_size": 80, "hidden_dim": 3072}, "parts", True, False),
    ],
)
def test_on_a_gpu_gradients_are_nearly_those_of_bfloat16(
    build, unchecked_shapes, monkeypatch, options, how, checkpointing, segments
):
    from anarcho_model.layers import torch_float8_kernels as kernels

    calls: list[str] = []
    for name in kernels.__all__:
        kernel = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *args, name=name, run=kernel, **options: calls.append(name) or run(*args, **options)
        )
    monkeypatch.setattr(torch_float8, "MIN_WIDTH", 0)
    monkeypatch.setattr(torch_float8, "MIN_FUSED_WIDTH", 0)
    model = build(**{"context_length": 128, "dim": 256, "hidden_dim": 384, **options}).cuda()
    model.gradient_checkpointing = checkpointing
    results = []
    for model.float8 in (False, True):
        torch._dynamo.reset()
        assert not calls
        results.append(step(model, how, device="cuda", backend="inductor", segments=segments, length=96))
    linear = 1 if "qk_norm" in options else 2
    expected = ["cast_in_both_orders", "swiglu_gradients", *(1 + checkpointing) * ["swiglu_hidden"], "turned"]
    expected += linear * ["cast_in_both_orders", "turned"]
    assert sorted(calls) == sorted(2 * expected + ("vocab_size" in options) * ["logit_gradients", "turned"])
    assert_alike(results[1], results[0])
