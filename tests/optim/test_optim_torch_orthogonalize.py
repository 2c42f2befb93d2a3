"""Properties of `orthogonalize`: exact against float64, known errors per preset, no scale, no failing shape, long matrices included."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import reference  # noqa: E402
from anarcho_optim import VARIANTS, OptimConfig  # noqa: E402
from anarcho_optim.groups import muon_options  # noqa: E402
from anarcho_optim.torch import Muon, newton_schulz, orthogonalize  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import Tensor, nn  # noqa: E402

HALF = (torch.bfloat16, torch.float16)
POLAR_ERRORS = {
    "jordan": (0.153, 0.400),
    "you": (0.017, 0.370),
    "polar-express": (0.093, 0.270),
    "polar-express-8": (0.000, 0.009),
}
"""||O - UV'||_F / sqrt(n) of a Gaussian 256 x 1024 matrix and of one whose singular values fall from 1 to 1e-3."""


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(rows: int, columns: int, *, smallest: float, rank: int | None = None) -> Tensor:
    """A matrix whose singular values fall evenly on a log scale from 1 to ``smallest``, those after the first ``rank`` being zero."""
    u, _, vh = torch.linalg.svd(gaussian(rows, columns).double(), full_matrices=False)
    values = torch.logspace(0, math.log10(smallest), min(rows, columns), dtype=torch.float64)
    values[rank:] *= 1.0 if rank is None else 0.0
    return ((u * values) @ vh).float()


SPECTRA = {
    "Gaussian": gaussian(64, 256),
    "1 to 1e-3": with_spectrum(64, 256, smallest=1e-3),
    "1 to 1e-6": with_spectrum(64, 256, smallest=1e-6),
    "rank 16": with_spectrum(64, 256, smallest=1e-2, rank=16),
    "rank 1": with_spectrum(64, 256, smallest=1.0, rank=1),
    "barely long": gaussian(32, 65),
    "very long": gaussian(4, 512),
}
"""Long matrices, whose steps are composed on the Gram matrix."""


def in_float64(matrix: Tensor, variant: str) -> Tensor:
    return torch.from_numpy(reference.polar(matrix.double().numpy(), muon_options(OptimConfig(variant=variant))))


def polar_error(orthogonal: Tensor, matrix: Tensor) -> float:
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return float((orthogonal.double() - u @ vh).norm() / math.sqrt(min(matrix.shape)))


def largest_singular_value(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double(), 2))


def directly(matrices: Tensor, variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Every step on the matrix itself, however long it is."""
    with monkeypatch.context() as patch:
        patch.setattr(newton_schulz, "LONG", math.inf)
        return orthogonalize(matrices, variant=VARIANTS[variant], dtype=dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(16, 16), (24, 40), (40, 24), (16, 64), (64, 16), (1, 9), (9, 1), (1, 1)], ids=str)
def test_float32_equals_the_float64_reference(shape, variant):
    matrix = gaussian(*shape)
    ours = orthogonalize(matrix[None], variant=VARIANTS[variant])[0]
    assert (ours - in_float64(matrix, variant)).square().mean().sqrt() < 1e-6
    assert (ours - in_float64(matrix, variant)).abs().max() < 3e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_equals_the_float64_reference_as_closely_as_an_ill_conditioned_matrix_allows(variant):
    """The steps multiply the smallest singular values, and rounding with them, by hundreds or thousands."""
    matrix = with_spectrum(64, 256, smallest=1e-3)
    ours = orthogonalize(matrix[None], variant=VARIANTS[variant])[0]
    assert (ours - in_float64(matrix, variant)).abs().max() < 1e-5


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    count=st.integers(1, 3),
    exponent=st.integers(-20, 20),
    seed=st.integers(0, 2**16),
    variant=st.sampled_from(sorted(VARIANTS)),
)
def test_every_matrix_of_any_stack_equals_the_float64_reference(rows, columns, count, exponent, seed, variant):
    stack = gaussian(count, rows, columns, seed=seed) * 10.0**exponent
    for ours, matrix in zip(orthogonalize(stack, variant=VARIANTS[variant]), stack, strict=True):
        # Square Gaussian matrices may be nearly singular, where rounding is amplified.
        np.testing.assert_allclose(ours.numpy(), in_float64(matrix, variant).numpy(), atol=5e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_error_of_each_preset_is_the_published_one(variant):
    gaussian_error, hard_error = POLAR_ERRORS[variant]
    easy, hard = gaussian(256, 1024), with_spectrum(256, 1024, smallest=1e-3)
    for dtype, tolerance in ((torch.float32, 0.001), (torch.float16, 0.015), (torch.bfloat16, 0.015)):
        steps = VARIANTS[variant]
        assert polar_error(orthogonalize(easy[None], variant=steps, dtype=dtype)[0], easy) == pytest.approx(
            gaussian_error, abs=tolerance
        )
        # Eight steps amplify what bfloat16 lost of the smallest singular values more than five do.
        lost = 0.12 if (variant, dtype) == ("polar-express-8", torch.bfloat16) else tolerance
        assert polar_error(orthogonalize(hard[None], variant=steps, dtype=dtype)[0], hard) == pytest.approx(
            hard_error, abs=lost
        )


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("exponent", [-20, -10, -3, 3, 10, 20])
@pytest.mark.parametrize("shape", [(12, 16), (8, 32)], ids=str)
def test_scale_does_not_matter(shape, exponent, dtype):
    updates = gaussian(2, *shape)
    # A power of two, so that the scaled input has the same bits.
    scaled = updates * 2.0 ** round(exponent * math.log2(10))
    expected = orthogonalize(updates, variant=VARIANTS["polar-express"], dtype=dtype)
    torch.testing.assert_close(
        orthogonalize(scaled, variant=VARIANTS["polar-express"], dtype=dtype),
        expected,
        atol=1e-6 if dtype == torch.float32 else 0.03,
        rtol=0,
    )


@pytest.mark.parametrize("ns_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("exponent", [-20, -6, 6, 20])
@pytest.mark.parametrize("options", [{}, {"row_equilibration": True}, {"normuon": True}], ids=str)
def test_the_scale_of_gradients_does_not_matter_to_an_optimizer(options, exponent, ns_dtype):
    def moved(scale: float) -> Tensor:
        weight = nn.Parameter(torch.zeros(8, 12))
        optimizer = Muon([weight], lr=1.0, adjust_lr_fn="original", ns_dtype=ns_dtype, **options)
        for seed in range(2):
            weight.grad = gaussian(8, 12, seed=seed) * scale
            optimizer.step()
        return weight.detach()

    torch.testing.assert_close(
        moved(2.0 ** round(exponent * math.log2(10))), moved(1.0), atol=1e-5 if ns_dtype == "float32" else 0.05, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_matrices_stay_zero_and_empty_ones_empty(variant, dtype):
    stack = torch.stack([torch.zeros(4, 6), gaussian(4, 6), torch.zeros(4, 6)])
    result = orthogonalize(stack, variant=VARIANTS[variant], dtype=dtype)
    assert torch.equal(result[0], torch.zeros(4, 6, dtype=dtype))
    assert result[1].abs().max() > 0.1
    for shape in [(0, 4, 6), (2, 0, 4), (2, 4, 0), (0, 0, 0)]:
        assert orthogonalize(torch.zeros(shape), variant=VARIANTS[variant], dtype=dtype).shape == shape


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (6, 6), (5, 40)], ids=str)
def test_a_matrix_of_rank_one_keeps_its_direction(shape, variant):
    left, right = gaussian(shape[0], 1), gaussian(1, shape[1], seed=1)
    direction = (left / left.norm()) @ (right / right.norm())
    ours = orthogonalize((left @ right)[None], variant=VARIANTS[variant])[0]
    gain = float((ours * direction).sum())
    assert 0.65 < gain < 1.25
    # Rounding leaves other directions a ten-millionth, which eight steps multiply by thousands.
    torch.testing.assert_close(ours, gain * direction, atol=1e-3, rtol=0)


def test_a_matrix_is_the_same_in_any_stack_and_with_any_strides():
    stack = gaussian(5, 12, 20)
    expected = orthogonalize(stack, variant=VARIANTS["polar-express"])
    for strided in (stack.mT.contiguous().mT, stack.expand(2, 5, 12, 20)[1], torch.stack([stack, stack], -1)[..., 0]):
        torch.testing.assert_close(orthogonalize(strided, variant=VARIANTS["polar-express"]), expected)
    for matrix, alone in zip(stack, expected, strict=True):
        torch.testing.assert_close(orthogonalize(matrix[None], variant=VARIANTS["polar-express"])[0], alone)
    transposed = orthogonalize(stack.mT, variant=VARIANTS["polar-express"])
    torch.testing.assert_close(transposed.mT, expected)


def test_the_input_is_not_changed():
    for shape in [(2, 6, 8), (2, 8, 6), (2, 4, 30)]:
        updates = gaussian(*shape)
        orthogonalize(updates, variant=VARIANTS["polar-express"])
        assert torch.equal(updates, gaussian(*shape))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SPECTRA)
def test_steps_composed_on_the_gram_matrix_equal_steps_on_a_long_matrix(name, variant, monkeypatch):
    matrix = SPECTRA[name][None]
    composed = orthogonalize(matrix, variant=VARIANTS[variant])
    direct = directly(matrix, variant, torch.float32, monkeypatch)
    well_conditioned = name in ("Gaussian", "barely long", "very long")
    assert (composed - direct).abs().max() < (1e-6 if well_conditioned else 3e-4)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SPECTRA)
def test_singular_values_of_long_matrices_stay_in_range_in_half_precision(name, variant, dtype, monkeypatch):
    matrix = SPECTRA[name][None]
    composed = largest_singular_value(orthogonalize(matrix, variant=VARIANTS[variant], dtype=dtype)[0])
    direct = largest_singular_value(directly(matrix, variant, dtype, monkeypatch)[0])
    assert composed < min(1.3, direct + 0.03)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("steps", range(1, 13))
def test_segments_cover_every_step_and_are_short_enough_for_the_arithmetic(steps, dtype):
    longest = 3 if dtype == torch.float16 else 2
    lengths = newton_schulz.segments(steps, rows=4, columns=9, dtype=dtype)
    assert sum(lengths) == steps
    assert max(lengths) <= longest
    assert lengths[0] <= 2
    assert newton_schulz.segments(steps, rows=4, columns=8, dtype=dtype) == [1] * steps
