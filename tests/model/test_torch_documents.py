"""Attention within documents as it is compiled for CUDA: every token sees its own document up to itself, and nothing else is read.

The compiler of a CPU reads the same blocks in forward; for backward, where it has no kernel, PyTorch's own formula stands.
"""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from anarcho_model.layers import torch_cuda, torch_documents
from anarcho_model.layers.torch_documents import BLOCK, DocumentBlocks, document_blocks
from cuda_layers import draws, stand_in_for_cuda, step
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or not torch_cuda.AVAILABLE, reason="needs CUDA and Triton"
)


def visible(segments: Tensor) -> Tensor:
    """True where a query may see a key, of all pairs of a row."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return (segments[:, :, None] == segments[:, None]) & causal


def chosen(numbers: Tensor, counts: Tensor) -> Tensor:
    """The blocks of a list as a table of queries by keys."""
    table = torch.zeros(numbers.shape, dtype=torch.bool)
    inside = torch.arange(numbers.shape[-1]) < counts[..., None]
    table.scatter_(-1, numbers.long(), inside)
    return table[:, 0]


def tables(blocks: DocumentBlocks) -> tuple[Tensor, Tensor]:
    """The blocks that need a mask and those that are whole; what is listed by queries and by keys is the same."""
    partial = chosen(blocks.partial_numbers, blocks.partial)
    whole = chosen(blocks.whole_numbers, blocks.whole)
    assert torch.equal(chosen(blocks.partial_queries_numbers, blocks.partial_queries).mT, partial)
    assert torch.equal(chosen(blocks.whole_queries_numbers, blocks.whole_queries).mT, whole)
    return partial, whole


def by_blocks(pairs: Tensor) -> Tensor:
    """Pairs of tokens (rows, queries, keys), without those beyond the end, as (rows, blocks, blocks, BLOCK, BLOCK)."""
    missing = -pairs.shape[1] % BLOCK
    padded = F.pad(pairs, (0, missing, 0, missing))
    return padded.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).transpose(2, 3)


@settings(deadline=None)  # PyTorch's first call of an operator takes half a second
@given(
    st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=9), min_size=1, max_size=3),
    st.integers(1, 4 * BLOCK + 3),
)
def test_documents_side_by_side_need_just_the_blocks_in_which_something_is_seen(lengths, length):
    rows = [torch.cat([torch.full((n,), i) for i, n in enumerate([*own, length])])[:length] for own in lengths]
    segments = torch.stack(rows)
    partial, whole = tables(document_blocks(segments))
    pairs = by_blocks(visible(segments))
    inside = by_blocks(torch.ones(len(rows), length, length, dtype=torch.bool))
    assert torch.equal(partial | whole, pairs.any(-1).any(-1))
    assert not (partial & whole).any()
    assert (pairs | ~inside)[whole].all()
    earlier = torch.ones(pairs.shape[1:3], dtype=torch.bool).tril(-1)
    assert torch.equal(whole, pairs.all(-1).all(-1) | (whole & ~inside.all(-1).all(-1))), "no mask where all is seen"
    assert not (whole & ~earlier).any()


def test_documents_in_any_order_have_all_that_is_seen():
    segments = torch.randint(3, (4, 3 * BLOCK), generator=torch.Generator().manual_seed(0))
    segments[1] = 1
    segments[2, :BLOCK], segments[2, BLOCK:] = 2, 0
    partial, whole = tables(document_blocks(segments))
    pairs = by_blocks(visible(segments))
    assert ((partial | whole) | ~pairs.any(-1).any(-1)).all()
    assert pairs[whole].all()
    assert whole.sum((1, 2)).tolist() == [0, 3, 1, 0]
    assert not (partial | whole)[2, 1:, 0].any()


@pytest.mark.parametrize("length", [BLOCK // 2, 3 * BLOCK + 5])
def test_lists_lie_as_the_kernels_read_them(length):
    """A row of the batch follows the other by the stride of the dimension of size 1; the compiler is told the same strides."""
    segments = some_documents(length, rows=3)
    torch.library.opcheck(torch.ops.anarcho_model.document_block_lists, (segments,))
    for numbers in document_blocks(segments)[1:]:
        assert numbers.stride()[1:] == (numbers[0].numel(), *numbers[0, 0].contiguous().stride())
        assert numbers.stride(0) == numbers.stride(1)


@pytest.fixture
def on_cpu(unchecked_shapes, monkeypatch):
    stand_in_for_cuda(monkeypatch)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def some_documents(length: int, *, rows: int = 2) -> Tensor:
    places = torch.rand(rows, length, generator=torch.Generator().manual_seed(length)) < 4 / length
    return places.long().cumsum(1)


unchecked_attend, unchecked_blocks = inspect.unwrap(torch_documents.attend), inspect.unwrap(document_blocks)


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Tensor) -> Tensor:
    return unchecked_attend(q, k, v, unchecked_blocks(segments))


def masked(q: Tensor, k: Tensor, v: Tensor, segments: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible(segments)[:, None])


def check_attention(device: str, backend: str, *, dtype: torch.dtype, tolerance: float, gradients: bool) -> None:
    compiled = torch.compile(attention, backend=backend, fullgraph=True, dynamic=False)
    for length, heads, size in ((BLOCK // 2, 3, 16), (BLOCK, 1, 64), (3 * BLOCK + 5, 2, 32)):
        segments = some_documents(length).to(device)
        inputs = [draws(2, heads, length, size, seed=seed, dtype=dtype, device=device) for seed in range(3)]
        exact = [x.double().requires_grad_() for x in inputs]
        own = [x.requires_grad_(gradients) for x in inputs]
        expected, found = masked(*exact, segments), compiled(*own, segments)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
        if not gradients:
            continue
        grad = draws(*found.shape, seed=3, dtype=dtype, device=device)
        of_own = torch.autograd.grad(found, own, grad)
        for ours, theirs in zip(of_own, torch.autograd.grad(expected, exact, grad.double()), strict=True):
            assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.usefixtures("on_cpu")
def test_attention_and_its_gradients_are_those_with_a_mask():
    check_attention("cpu", "aot_eager", dtype=torch.float32, tolerance=1e-5, gradients=True)


@pytest.mark.usefixtures("on_cpu")
def test_what_is_listed_suffices_where_only_that_is_read():
    """The compiler's kernel for a CPU goes from block to block."""
    check_attention("cpu", "inductor", dtype=torch.float32, tolerance=1e-5, gradients=False)


@needs_cuda
def test_on_a_gpu_attention_and_its_gradients_are_those_with_a_mask(unchecked_shapes):
    check_attention("cuda", "inductor", dtype=torch.bfloat16, tolerance=0.02, gradients=True)


def check_model(build, monkeypatch, how: str, device: str, backend: str, **options: object) -> None:
    """A step with documents of a compiled model equals that of an uncompiled one, which has a mask."""
    calls: list[int] = []
    monkeypatch.setattr(
        torch_documents, "document_blocks", lambda segments: calls.append(1) or document_blocks(segments)
    )
    checkpointing = options.pop("checkpointing")
    model = build(num_layers=2, dim=64, context_length=256, **options).to(device)
    model.gradient_checkpointing = checkpointing
    expected = step(model, "eager", device=device, backend="", segments=True, length=160)
    assert not calls
    loss, gradients = step(model, how, device=device, backend=backend, segments=True, length=160)
    assert calls
    torch.testing.assert_close(loss, expected[0], rtol=0.01, atol=0)
    for name, gradient in expected[1].items():
        assert (gradients[name] - gradient).norm() <= 0.03 * gradient.norm(), name


MODELS = pytest.mark.parametrize(
    ("how", "options"),
    [
        ("whole", {"checkpointing": False, "num_kv_heads": 2}),
        ("whole", {"checkpointing": True}),
        ("parts", {"checkpointing": True, "qk_norm": True}),
    ],
)


@MODELS
@pytest.mark.usefixtures("on_cpu")
def test_a_compiled_model_with_documents_has_the_gradients_of_an_eager_one(build, monkeypatch, how, options):
    from cuda_layers import rotary_formula, swiglu_in_place

    torch_cuda.swiglu_gradients.register_kernel("cpu")(swiglu_in_place)
    torch_cuda.pack_rotary_gradients.register_kernel("cpu")(rotary_formula)
    check_model(build, monkeypatch, how, "cpu", "aot_eager", **options)


@needs_cuda
@MODELS
def test_on_a_gpu_a_model_with_documents_has_the_gradients_of_an_eager_one(
    build, unchecked_shapes, monkeypatch, how, options
):
    torch._dynamo.reset()
    check_model(build, monkeypatch, how, "cuda", "inductor", **options)


def test_only_what_is_compiled_for_cuda_goes_without_a_mask(on_cpu, monkeypatch):
    segments = torch.zeros(2, 5, dtype=torch.long)
    assert torch_documents.suits(segments, head_size=16, compiled=True)
    assert not torch_documents.suits(segments, head_size=16, compiled=False)
    assert not torch_documents.suits(segments, head_size=8, compiled=True)
    monkeypatch.setattr(torch_cuda, "DEVICE_TYPE", "cuda")
    assert not torch_documents.suits(segments, head_size=16, compiled=True)
    monkeypatch.setattr(torch_cuda, "AVAILABLE", False)
    monkeypatch.setattr(torch_cuda, "DEVICE_TYPE", "cpu")
    assert not torch_documents.suits(segments, head_size=16, compiled=True)
