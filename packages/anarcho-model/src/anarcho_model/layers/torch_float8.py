"""Products of linear layers in 8-bit floating point, for training models that are compiled for CUDA.

Notable:

* inputs and weights are e4m3, gradients of outputs e5m2 (arXiv:2209.05433); a tensor has one scale, the weights themselves stay as they
  are, and results are in bfloat16, the gradients of weights included;
* a GPU reads both operands of such a product along the dimension that it sums over. So what is read in both directions, an input for output
  and for the weight's gradient, a gradient for those of input and weight, is written twice, once in each order, by kernels of our own;
* a scale costs a pass over the tensor, and a float needs it only about right, so it comes from a bound where there is one: what a norm
  returns is at most `sqrt(size)` times its largest weight, and a gradient within SwiGLU at most the product of norms and maxima of its
  factors, of which e5m2's 30 powers of two have room for. The hidden layer has a scale for each token, known when its row is;
* the output layer is treated so by `anarcho_model.logprobs.torch_float8`;
* layers that are too narrow to gain stay in bfloat16, as does whatever is computed without gradients or is not compiled: answers are those
  of the weights that are saved. A trainer that evaluates with the compiled function of its training has 8-bit products there, too.

Why this is our own: torchao's `Float8Linear` stands for a single `nn.Linear`, and our layers join products of the same input and compute
what is between two products in the kernel that also writes their operands. Without that, its passes over the operands take back what the
products gain at the widths that this project trains.

Shapes as in `anarcho_model.torch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anarcho_model.config import ModelConfig
from anarcho_model.layers import torch_cuda

__all__ = [
    "ALIGNMENT",
    "E5M2",
    "Limit",
    "Narrow",
    "heads_of",
    "linear",
    "narrow",
    "narrow_weights",
    "obstacle",
    "product",
    "suits_linear",
    "suits_swiglu",
    "swiglu",
    "turned_inputs",
    "turned_weights",
    "unit_of",
    "wide_enough",
]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
SMALLEST_LIMIT = 1e-30
"""Stands for the largest number of a tensor of zeros."""
ALIGNMENT = 16
"""The GPU's products want sizes that are multiples of it."""
MIN_CAPABILITY = (8, 9)
"""The first GPUs that multiply 8-bit floats."""
MIN_WIDTH = 1024
"""Of inputs times outputs over their sum: from there on a product gains more than casts of both cost."""
MIN_FUSED_WIDTH = 512
"""The same of SwiGLU and of the output layer, whose kernels cast what they compute anyway."""

Limit = Float[Tensor, ""]
"""A bound of the absolute values of a tensor: a number on its device."""


class Narrow(NamedTuple):
    """A tensor in 8-bit floats."""

    values: Tensor
    """The numbers in units."""
    unit: Float[Tensor, ""]
    """What they are to be multiplied with."""


def obstacle(config: ModelConfig, device: torch.device) -> str | None:
    """Why a model of this shape cannot be trained like this on the device, as the end of a sentence; None if it can."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the device is {device.type}; expected an NVIDIA GPU (--device cuda)"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        wanted, found = (".".join(map(str, pair)) for pair in (MIN_CAPABILITY, capability))
        return f"this GPU has compute capability {found}; expected {wanted} or later"
    if not torch_cuda.AVAILABLE:
        return "its kernels cannot be compiled here; expected Triton (anarcho-model[cuda])"
    sizes = {"model.dim": config.dim, "model.hidden_dim": config.ffn_size}
    for name, size in sizes.items():
        if size % ALIGNMENT:
            return f"{name} is {size}; expected a multiple of {ALIGNMENT}"
    if not wide_enough(config.dim, 3 * config.ffn_size):
        return f"model.dim is {config.dim} and model.hidden_dim {config.ffn_size}, too narrow to gain anything; expected wider ones"
    return None


def suits_linear(x: Float[Tensor, "tokens inputs"], *layers: nn.Linear, dtype: torch.dtype) -> bool:
    """Whether the joint product of layers that all read ``x`` is to be trained like this: it can be, and is faster with its casts."""
    wide = _width(layers[0].in_features, sum(layer.out_features for layer in layers)) >= MIN_WIDTH
    return wide and _possible(x, *layers, dtype=dtype)


def suits_swiglu(
    x: Float[Tensor, "tokens inputs"], gate: nn.Linear, up: nn.Linear, down: nn.Linear, *, dtype: torch.dtype
) -> bool:
    """The same of a whole feed-forward layer."""
    return wide_enough(gate.in_features, 3 * gate.out_features) and _possible(x, gate, up, down, dtype=dtype)


def wide_enough(inputs: int, outputs: int) -> bool:
    """Whether products whose operands are cast by what computes them gain."""
    return _width(inputs, outputs) >= MIN_FUSED_WIDTH


def _possible(x: Tensor, *layers: nn.Linear, dtype: torch.dtype) -> bool:
    """Whether plain layers are trained, compiled for CUDA, and all sizes are some that the GPU's products take."""
    sizes = [len(x), *(size for layer in layers for size in layer.weight.shape)]
    fits = dtype == torch.bfloat16 and all(size % ALIGNMENT == 0 for size in sizes)
    return fits and torch_cuda.suits(x, *layers, dtype=dtype)


def _width(inputs: int, outputs: int) -> float:
    """Operations for each number that is cast: a product has inputs * outputs for each token, and inputs + outputs to cast."""
    return inputs * outputs / (inputs + outputs)


def _limit(*tensors: Tensor) -> Limit:
    """The largest absolute value of all of them; of each row first, so that the kernel that makes a row may find it."""
    tops = [tensor.abs().amax(-1).amax() for tensor in tensors]
    return (tops[0] if len(tops) == 1 else torch.stack(tops).amax()).float()


def unit_of(limit: Limit, dtype: torch.dtype) -> Float[Tensor, ""]:
    """The unit in which ``limit`` is the largest number of ``dtype``."""
    return limit.clamp(min=SMALLEST_LIMIT) / LARGEST[dtype]


def narrow(x: Tensor, limit: Limit) -> Narrow:
    """Inputs as they are read in forward; no number is larger than ``limit``."""
    unit = unit_of(limit.float(), E4M3)
    return Narrow((x.float() * unit.reciprocal()).to(E4M3), unit)


def narrow_weights(weights: Sequence[Tensor]) -> Narrow:
    """Weights below each other, with one unit."""
    unit = unit_of(_limit(*weights), E4M3)
    return Narrow((torch.cat(list(weights)).float() * unit.reciprocal()).to(E4M3), unit)


def product(a: Narrow, b: Narrow, *, fast: bool = False) -> Float[Tensor, "rows columns"]:
    """a (rows, summed) by the transpose of b (columns, summed), in bfloat16.

    A ``fast`` one adds up to 14 bits or so instead of float32's, as is usual for outputs but not for gradients.
    """
    return torch._scaled_mm(
        a.values, b.values.t(), scale_a=a.unit, scale_b=b.unit, out_dtype=torch.bfloat16, use_fast_accum=fast
    )


def turned_inputs(x: Narrow, grad: Narrow) -> Narrow:
    """The transpose, in memory too, made when the gradient is there."""
    return Narrow(turned(x.values, grad.unit), x.unit)


def turned_weights(weights: Narrow) -> Narrow:
    """The same of weights, which are small: left to the compiler."""
    return Narrow(weights.values.t().contiguous(), weights.unit)


def _gradient_in_both_orders(grad: Tensor, limit: Limit) -> tuple[Narrow, Narrow]:
    """A gradient in e5m2, and its transpose."""
    unit = unit_of(limit, E5M2)
    rows, columns = cast_in_both_orders(grad, unit.reciprocal())
    return Narrow(rows, unit), Narrow(columns, unit)


def linear(
    x: Float[Tensor, "tokens inputs"], weight: Float[Tensor, "outputs inputs"]
) -> Float[Tensor, "tokens outputs"]:
    """What a linear layer makes of ``x``, in bfloat16."""
    inputs = narrow(x.detach(), _limit(x.detach()))
    return _linear(x, weight.to(torch.bfloat16), *inputs, *narrow_weights([weight.detach()]))


def _linear_forward(x: Tensor, weight: Tensor, x8: Tensor, x_unit: Tensor, w8: Tensor, w_unit: Tensor) -> Tensor:
    del x, weight
    return product(Narrow(x8, x_unit), Narrow(w8, w_unit), fast=True)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_linear_gradients(grad, *ctx.saved_tensors), None, None, None, None


def _linear_gradients(grad: Tensor, x8: Tensor, x_unit: Tensor, w8: Tensor, w_unit: Tensor) -> tuple[Tensor, Tensor]:
    """Of input and weight."""
    rows, columns = _gradient_in_both_orders(grad, _limit(grad))
    grad_x = product(rows, turned_weights(Narrow(w8, w_unit)))
    return grad_x, product(columns, turned_inputs(Narrow(x8, x_unit), columns))


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    del output
    ctx.save_for_backward(*inputs[2:])


_linear: Any = torch_cuda.operator(
    "float8_linear(Tensor x, Tensor weight, Tensor x8, Tensor x_unit, Tensor w8, Tensor w_unit) -> Tensor",
    _linear_forward,
)
_linear.register_autograd(_linear_backward, setup_context=_save_linear)


def heads_of(
    x: Float[Tensor, "tokens inputs"],
    *weights: Float[Tensor, "outputs inputs"],
    cos: Float[Tensor, "rows 1 length half"],
    sin: Float[Tensor, "rows 1 length half"],
    heads: int,
    kv_heads: int,
    limit: Limit,
) -> tuple[
    Float[Tensor, "batch heads length head"],
    Float[Tensor, "batch kv length head"],
    Float[Tensor, "batch kv length head"],
]:
    """q and k, rotated, and v, in bfloat16, of these three weights; no number of ``x`` is larger than ``limit``."""
    inputs, own = narrow(x.detach(), limit.detach()), narrow_weights([weight.detach() for weight in weights])
    return _heads_of(x, torch.cat(weights).to(torch.bfloat16), *inputs, *own, cos, sin, heads, kv_heads)


def _heads_of_forward(
    x: Tensor,
    weight: Tensor,
    x8: Tensor,
    x_unit: Tensor,
    w8: Tensor,
    w_unit: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    together = _linear_forward(x, weight, x8, x_unit, w8, w_unit)
    return torch_cuda.split_heads(together, cos, sin, heads, kv_heads)


def _heads_of_backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
    *own, cos, sin = ctx.saved_tensors
    grad = torch_cuda.pack_rotary_gradients(grad_q, grad_k, grad_v, cos, sin)
    return *_linear_gradients(grad, *own), *(None,) * 8


def _save_heads_of(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    del output
    ctx.save_for_backward(*inputs[2:8])


_heads_of: Any = torch_cuda.operator(
    "float8_heads_of(Tensor x, Tensor weight, Tensor x8, Tensor x_unit, Tensor w8, Tensor w_unit, Tensor cos, Tensor sin, int heads, "
    "int kv_heads) -> (Tensor, Tensor, Tensor)",
    _heads_of_forward,
)
_heads_of.register_autograd(_heads_of_backward, setup_context=_save_heads_of)


def swiglu(
    x: Float[Tensor, "tokens inputs"],
    gate: Float[Tensor, "hidden inputs"],
    up: Float[Tensor, "hidden inputs"],
    down: Float[Tensor, "outputs hidden"],
    *,
    limit: Limit,
) -> Float[Tensor, "tokens outputs"]:
    """`down(silu(gate(x)) * up(x))` of these weights, in bfloat16; no number of ``x`` is larger than ``limit``."""
    inputs = narrow(x.detach(), limit.detach())
    first, second = narrow_weights([gate.detach(), up.detach()]), narrow_weights([down.detach()])
    wide = torch.cat((gate, up)).to(torch.bfloat16), down.to(torch.bfloat16)
    return _swiglu(x, *wide, *inputs, *first, *second)[0]


def _swiglu_forward(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    x8: Tensor,
    x_unit: Tensor,
    first8: Tensor,
    first_unit: Tensor,
    second8: Tensor,
    second_unit: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, and for backward gate and up, side by side, a unit that serves all rows of the hidden layer, and the largest number
    of gate and up.
    """
    del x, gate_up_weight, down_weight
    gate_up = product(Narrow(x8, x_unit), Narrow(first8, first_unit), fast=True)
    hidden, units, factors = swiglu_hidden(gate_up)
    made = product(Narrow(hidden, torch.ones_like(x_unit)), Narrow(second8, second_unit), fast=True)
    return (made.float() * units).to(torch.bfloat16), gate_up, units.amax(), factors.amax()


SILU_SLOPE = 1.1
"""The largest slope of silu is a little less."""
ROUNDING = 1.2
"""What rounding to e5m2, by an eighth at most, and to bfloat16 can add to a bound."""


def _swiglu_backward(ctx: Any, grad: Tensor, *_others: object) -> tuple[Tensor | None, ...]:
    x8, x_unit, first8, first_unit, second8, second_unit, gate_up, hidden_unit, factor_limit = ctx.saved_tensors
    first, second = Narrow(first8, first_unit), Narrow(second8, second_unit)
    lengths = grad.float().square().sum(-1).amax().sqrt()
    rows, columns = _gradient_in_both_orders(grad, _limit(grad))
    # A number of the hidden layer's gradient is the product of a row of `grad` and a column of the weight.
    column_lengths = second8.float().square().sum(0).amax().sqrt() * second_unit
    unit = unit_of(SILU_SLOPE * ROUNDING * lengths * column_lengths * factor_limit, E5M2)
    grad_hidden = product(rows, turned_weights(second))
    gradient, turned_gradient, turned_hidden = swiglu_gradients(
        gate_up, grad_hidden, unit.reciprocal(), hidden_unit.reciprocal()
    )
    grad_x = product(Narrow(gradient, unit), turned_weights(first))
    grad_first = product(Narrow(turned_gradient, unit), turned_inputs(Narrow(x8, x_unit), columns))
    grad_second = product(columns, Narrow(turned_hidden, hidden_unit))
    return grad_x, grad_first, grad_second, *(None,) * 6


def _save_swiglu(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[3:], *output[1:])


_swiglu: Any = torch_cuda.operator(
    "float8_swiglu(Tensor x, Tensor gate_up_weight, Tensor down_weight, Tensor x8, Tensor x_unit, Tensor first8, Tensor first_unit, "
    "Tensor second8, Tensor second_unit) -> (Tensor, Tensor, Tensor, Tensor)",
    _swiglu_forward,
)
_swiglu.register_autograd(_swiglu_backward, setup_context=_save_swiglu)


@torch.library.custom_op(
    "anarcho_model::float8_swiglu_hidden",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor gate_up) -> (Tensor, Tensor, Tensor)",
)
def swiglu_hidden(gate_up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `torch_float8_kernels.swiglu_hidden`; Triton is imported where it is used."""
    from anarcho_model.layers import torch_float8_kernels

    return torch_float8_kernels.swiglu_hidden(gate_up, largest=LARGEST[E4M3], smallest_limit=SMALLEST_LIMIT)


@swiglu_hidden.register_fake
def _(gate_up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens, both = gate_up.shape
    units, factors = (gate_up.new_empty((tokens, 1), dtype=torch.float32) for _ in range(2))
    return gate_up.new_empty((tokens, both // 2), dtype=E4M3), units, factors


@torch.library.custom_op(
    "anarcho_model::float8_swiglu_gradients",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor gate_up, Tensor grad_hidden, Tensor scale, Tensor hidden_scale) -> (Tensor, Tensor, Tensor)",
)
def swiglu_gradients(
    gate_up: Tensor, grad_hidden: Tensor, scale: Tensor, hidden_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `torch_float8_kernels.swiglu_gradients`."""
    from anarcho_model.layers import torch_float8_kernels

    return torch_float8_kernels.swiglu_gradients(gate_up, grad_hidden, scale, hidden_scale)


@swiglu_gradients.register_fake
def _(gate_up: Tensor, grad_hidden: Tensor, scale: Tensor, hidden_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    del scale, hidden_scale
    shape, hidden = gate_up.shape, grad_hidden.shape
    empty = grad_hidden.new_empty
    return empty(shape, dtype=E5M2), empty(shape[::-1], dtype=E5M2), empty(hidden[::-1], dtype=E4M3)


@torch.library.custom_op(
    "anarcho_model::float8_cast_in_both_orders",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor x, Tensor scale) -> (Tensor, Tensor)",
)
def cast_in_both_orders(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See `torch_float8_kernels.cast_in_both_orders`."""
    from anarcho_model.layers import torch_float8_kernels

    return torch_float8_kernels.cast_in_both_orders(x, scale)


@cast_in_both_orders.register_fake
def _(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    del scale
    return x.new_empty(x.shape, dtype=E5M2), x.new_empty(x.shape[::-1], dtype=E5M2)


@torch.library.custom_op(
    "anarcho_model::float8_turned", mutates_args=(), device_types="cuda", schema="(Tensor x, Tensor after) -> Tensor"
)
def turned(x: Tensor, after: Tensor) -> Tensor:
    """See `torch_float8_kernels.turned`; it follows ``after``, or the compiler would have it in forward, where it is done again in vain."""
    from anarcho_model.layers import torch_float8_kernels

    del after
    return torch_float8_kernels.turned(x)


@turned.register_fake
def _(x: Tensor, after: Tensor) -> Tensor:
    del after
    return x.new_empty(x.shape[::-1])
