"""Properties of the CUDA path: it agrees with the general one for every option, and launches as often for many layers as for few."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from anarcho_optim.torch import MuonAdamW  # noqa: E402
from anarcho_optim.torch import fused as fused_module  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "jordan": {"variant": "jordan"},
    "polar-express-8": {"variant": "polar-express-8"},
    "bfloat16": {"ns_dtype": "bfloat16"},
    "float32 is left to the general path": {"ns_dtype": "float32"},
    "no nesterov": {"nesterov": False},
    "spectral": {"adjust_lr_fn": "spectral"},
    "cautious": {"cautious_weight_decay": True},
    "normuon rows": {"normuon": True},
    "normuon columns": {"normuon": True, "normuon_axis": -2},
    "normuon with frobenius": {"normuon": True, "frobenius_normalization": True},
    "frobenius": {"frobenius_normalization": True},
    "row equilibration": {"row_equilibration": True},
    "heads": {"num_heads": 4},
    "heads with normuon": {"num_heads": 4, "normuon": True},
    "heads across columns with normuon": {"num_heads": 4, "normuon": True, "split_dim": 1, "normuon_axis": -2},
}
SHAPES = [(64, 64), (64, 64), (256, 64), (64, 256), (136, 72), (100, 36), (36, 100), (4, 700)]


def make(options: dict[str, Any], *, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(s, device="cuda").to(dtype)) for s in SHAPES]
    vectors = [torch.nn.Parameter(torch.randn(n, device="cuda").to(dtype)) for n in (1, 7, 5000)]
    groups = [
        {"algorithm": "muon", "params": matrices, "lr": 0.02, "weight_decay": 0.1, **options},
        {"algorithm": "adamw", "params": vectors, "lr": 0.01, "weight_decay": 0.1},
    ]
    return [*matrices, *vectors], MuonAdamW(groups, **kwargs)


def run(parameters: list[Any], optimizer: Any, steps: int, *, fresh: bool = False) -> list[Any]:
    for step in range(steps):
        generator = torch.Generator("cuda").manual_seed(step)
        for p in parameters:
            gradient = torch.randn(p.shape, generator=generator, device="cuda").to(p.dtype)
            p.grad = gradient if fresh or p.grad is None else p.grad.copy_(gradient)
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.97
    return [p.detach().float().clone() for p in parameters]


def general(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_module, "load_kernels", lambda: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_kernels_agree_with_the_general_path(options, dtype, monkeypatch):
    parameters, optimizer = make(options, dtype=dtype)
    start = [p.detach().float().clone() for p in parameters]
    ours = run(parameters, optimizer, 6)
    general(monkeypatch)
    parameters, optimizer = make(options, dtype=dtype)
    theirs = run(parameters, optimizer, 6)
    for a, b, s in zip(ours, theirs, start, strict=True):
        tolerance = 0.02 if dtype == torch.float32 else 0.25
        assert (a - b).norm() < tolerance * (b - s).norm(), a.shape


def test_adamw_agrees_with_torch_to_rounding():
    parameters, optimizer = make({})
    others = [torch.nn.Parameter(p.detach().clone()) for p in parameters[-3:]]
    reference = torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1, fused=True)
    for step in range(20):
        generator = torch.Generator("cuda").manual_seed(step)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator, device="cuda")
        for p, q in zip(parameters[-3:], others, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    for p, q in zip(parameters[-3:], others, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)


def test_a_cuda_graph_follows_schedules_and_gradients_that_move():
    parameters, optimizer = make({})
    expected = run(parameters, optimizer, 8, fresh=True)
    parameters, optimizer = make({}, cuda_graph=True)
    for a, b in zip(run(parameters, optimizer, 8, fresh=True), expected, strict=True):
        assert torch.equal(a, b)


def recorder() -> Any:
    """Makes graphs in one pool."""
    pool = torch.cuda.graph_pool_handle()

    def record(work: Any) -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            work()
        return graph

    return record


def test_a_graph_in_the_pool_of_others_can_be_taken_back():
    (parameters, optimizer), (twins, plain) = make({}), make({})
    for record in (None, recorder(), None):
        optimizer.use_graph(record)
        for a, b in zip(run(parameters, optimizer, 3, fresh=True), run(twins, plain, 3, fresh=True), strict=True):
            assert torch.equal(a, b)


def test_a_restored_state_continues_bit_for_bit():
    parameters, optimizer = make({"normuon": True})
    run(parameters, optimizer, 3)
    twins, restored = make({"normuon": True})
    with torch.no_grad():
        for p, q in zip(parameters, twins, strict=True):
            q.copy_(p)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for a, b in zip(run(parameters, optimizer, 3), run(twins, restored, 3), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
def test_the_scale_of_gradients_does_not_matter_and_zeros_move_nothing(scale):
    def moved(factor: float) -> Any:
        p = torch.nn.Parameter(torch.zeros(64, 96, device="cuda"))
        z = torch.nn.Parameter(torch.ones(64, 96, device="cuda"))
        optimizer = MuonAdamW([{"algorithm": "muon", "params": [p, z], "lr": 1.0, "adjust_lr_fn": "original"}])
        p.grad = torch.randn(64, 96, generator=torch.Generator("cuda").manual_seed(0), device="cuda") * factor
        z.grad = torch.zeros_like(z)
        optimizer.step()
        assert torch.equal(z, torch.ones_like(z))
        return p.detach()

    torch.testing.assert_close(moved(scale), moved(1.0), atol=5e-3, rtol=0)


def test_gradients_in_half_precision_missing_ones_and_strided_parameters():
    p = torch.nn.Parameter(torch.randn(64, 48, device="cuda"))
    strided = torch.nn.Parameter(torch.randn(48, 64, device="cuda").t())
    missing = torch.nn.Parameter(torch.randn(64, 48, device="cuda"))
    before = [q.detach().clone() for q in (p, strided, missing)]
    optimizer = MuonAdamW([{"algorithm": "muon", "params": [p, strided, missing], "lr": 0.1}])
    p.grad = torch.randn_like(p)
    strided.grad = p.grad.clone()
    with torch.no_grad():
        strided.copy_(p)
    optimizer.step()
    assert torch.equal(missing, before[2])
    torch.testing.assert_close(p - before[0], strided - before[0], atol=2e-3, rtol=0)


def test_launches_do_not_grow_with_layers():
    def launches(layers: int) -> int:
        shapes = [(256, 256)] * 4 + [(1024, 256)] * 2 + [(256, 1024)]
        matrices = [torch.nn.Parameter(torch.randn(s, device="cuda")) for _ in range(layers) for s in shapes]
        gains = [torch.nn.Parameter(torch.ones(256, device="cuda")) for _ in range(2 * layers)]
        for p in [*matrices, *gains]:
            p.grad = torch.randn_like(p)
        groups = [{"algorithm": "muon", "params": matrices}, {"algorithm": "adamw", "params": gains}]
        optimizer = MuonAdamW(groups)
        for _ in range(3):
            optimizer.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step()
            torch.cuda.synchronize()
        names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return sum(not name.startswith("Memset") for name in names)

    assert launches(12) == launches(24) < 60


def test_nothing_is_compiled_again_over_a_schedule():
    parameters, optimizer = make({})
    run(parameters, optimizer, 2)
    from anarcho_optim.torch import kernels

    def compiled() -> int:
        functions = [f for f in vars(kernels).values() if hasattr(f, "device_caches")]
        return sum(len(cache[0]) for f in functions for cache in f.device_caches.values())

    before = compiled()
    run(parameters, optimizer, 100, fresh=True)
    assert compiled() == before > 0


def test_a_gradient_scaler_skips_a_step_with_an_infinite_gradient():
    parameters, optimizer = make({})
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.full_like(p, float("inf"))
    scaler.scale(torch.ones((), device="cuda"))
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert scaler.get_scale() == 4.0


def test_memory_for_fewer_matrices_at_once_gives_the_same_update() -> None:
    whole = run(*make({}), 3)
    for least in (1, 2**16):
        parts = run(*make({}, cuda_scratch_bytes=least), 3)
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
