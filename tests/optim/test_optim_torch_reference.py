"""The whole update of the torch half equals the NumPy float64 reference, for every option, in weights and in state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import cases  # noqa: E402
import reference  # noqa: E402
from anarcho_optim.torch import MuonAdamW  # noqa: E402
from torch import nn  # noqa: E402

ALL = {
    **{f"muon, {name}": (shape, cases.muon(**options)) for name, (shape, options) in cases.MUON.items()},
    **{f"adamw, {name}": (shape, cases.adamw(**options)) for name, (shape, options) in cases.ADAMW.items()},
}


def reference_step(
    weight: np.ndarray, gradient: np.ndarray, state: reference.State, options: dict[str, Any]
) -> tuple[np.ndarray, reference.State]:
    step = reference.muon_update if options["algorithm"] == "muon" else reference.adamw_update
    return step(weight, gradient, state, options)


def run_both(shape: tuple[int, ...], options: dict[str, Any], steps: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Weight and state tensors of both after ``steps`` of gradients that are the same to the last bit."""
    generator = np.random.default_rng(0)
    weight = (0.5 * generator.standard_normal(shape)).astype(np.float32)
    parameter = nn.Parameter(torch.tensor(weight))
    optimizer = MuonAdamW([{"params": [("weight", parameter)], **options}])
    expected = weight.astype(np.float64)
    is_muon = options["algorithm"] == "muon"
    state = reference.muon_state(shape, options) if is_muon else reference.adamw_state(shape)
    for _ in range(steps):
        gradient = np.asarray(generator.standard_normal(shape), dtype=np.float32)
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        expected, state = reference_step(expected, gradient.astype(np.float64), state, options)
    ours = optimizer.state[parameter]
    assert ours.keys() == state.keys()
    return (
        [parameter.detach().double().numpy(), *(ours[key].double().numpy() for key in state)],
        [expected, *state.values()],
    )


@pytest.mark.parametrize(("steps", "tolerance"), [(1, 1e-6), (5, 3e-6)])
@pytest.mark.parametrize(("shape", "options"), ALL.values(), ids=ALL)
def test_weights_and_state_equal_the_float64_reference(shape, options, steps, tolerance):
    for ours, expected in zip(*run_both(shape, options, steps), strict=True):
        assert ours.shape == expected.shape
        assert np.abs(ours - expected).max(initial=0.0) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["muon, everything at once", "muon, split rows, everything", "adamw, default"])
def test_half_precision_parameters_are_updated_in_float32_and_rounded_once(name, dtype):
    shape, options = ALL[name]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    gradient = torch.randn(shape, generator=generator).to(dtype)
    half, single = nn.Parameter(weight.clone()), nn.Parameter(weight.float())
    for parameter in (half, single):
        parameter.grad = gradient.to(parameter.dtype)
        MuonAdamW([{"params": [parameter], **options}]).step()
    assert torch.equal(half, single.to(dtype))


STRIDES = {
    "contiguous": lambda t: t.clone(),
    "transposed": lambda t: t.t().contiguous().t(),
    "strided slice": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "part of a larger matrix": lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],
}


@pytest.mark.parametrize("gradient_strides", STRIDES)
@pytest.mark.parametrize("weight_strides", STRIDES)
@pytest.mark.parametrize("name", ["muon, everything at once", "adamw, default"])
def test_strides_in_memory_change_nothing(name, weight_strides, gradient_strides):
    _, options = ALL[name]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 8, generator=generator)
    strided = nn.Parameter(STRIDES[weight_strides](start))
    plain = nn.Parameter(start.clone())
    optimizers = [MuonAdamW([{"params": [p], **options}]) for p in (strided, plain)]
    for _ in range(3):
        gradient = torch.randn(6, 8, generator=generator)
        strided.grad, plain.grad = STRIDES[gradient_strides](gradient), gradient
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(strided, plain, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["muon, everything at once", "adamw, default"])
def test_an_expanded_gradient_is_like_its_copy(name):
    _, options = ALL[name]
    row = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    expanded, copied = (nn.Parameter(torch.ones(6, 8)) for _ in range(2))
    expanded.grad, copied.grad = row.expand(6, 8), row.expand(6, 8).clone()
    for parameter in (expanded, copied):
        MuonAdamW([{"params": [parameter], **options}]).step()
    torch.testing.assert_close(expanded, copied, atol=1e-6, rtol=0)


@pytest.mark.parametrize("gradient_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["muon, convolution, everything", "adamw, large eps and decay"])
def test_a_convolution_is_the_same_in_every_memory_format(name, gradient_format):
    _, options = ALL[name]
    start, gradient = torch.randn(2, 6, 3, 2, 2, generator=torch.Generator().manual_seed(0)).unbind()
    parameters = [
        nn.Parameter(start.contiguous(memory_format=f)) for f in (torch.contiguous_format, torch.channels_last)
    ]
    for parameter in parameters:
        parameter.grad = gradient.contiguous(memory_format=gradient_format)
        MuonAdamW([{"params": [parameter], **options}]).step()
    torch.testing.assert_close(*parameters, atol=1e-6, rtol=0)
