"""The layers of models that are compiled for CUDA whose backward the compiler writes slowly, with kernels of our own for that.

Notable:

* SwiGLU keeps gate and up for backward, side by side as their product made them; the hidden layer is computed again by the kernel that
  computes their gradient, for the gradient of the weight that reads it, and lies where its own gradient was;
* the gradients of q, k and v, in whatever order they lie, become that of their joint product in one pass;
* the layers are operators of their own, which PyTorch's tracers open after they have derived the gradients: with checkpointing they are
  computed again like all others (what a traced `autograd.Function` returns is not, in PyTorch 2.11). Forward is left to the compiler.

Both round products to the compute dtype, as autocast does everywhere. Shapes as in `anarcho_model.torch`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from anarcho_model.layers.torch_rotary import rotate_halves

FunctionalTensorMode: Any
try:
    from torch._subclasses.functional_tensor import FunctionalTensorMode
except ImportError:  # It is not public: where a later PyTorch has none, the compiler's own backward passes serve.
    FunctionalTensorMode = None

__all__ = ["heads_of", "operator", "pack_rotary_gradients", "split_heads", "suits", "swiglu"]

AVAILABLE = FunctionalTensorMode is not None and importlib.util.find_spec("triton") is not None
"""Whether the kernels can be compiled."""
DEVICE_TYPE = "cuda"
"""Where they run."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""The compute dtypes that arithmetic in float32 serves."""


def suits(x: Float[Tensor, "tokens inputs"], *layers: nn.Module, dtype: torch.dtype) -> bool:
    """Whether this is training, compiled for CUDA, of plain linear layers with a gradient and products in `dtype`."""
    if not (AVAILABLE and x.device.type == DEVICE_TYPE and torch.compiler.is_compiling() and torch.is_grad_enabled()):
        return False
    return dtype in DTYPES and all(type(layer) is nn.Linear and layer.weight.requires_grad for layer in layers)


def operator(signature: str, function: Callable[..., Any]) -> Any:
    """An operator that is differentiated whole and then traced through, as `torch.library.triton_op` makes them.

    That function would import Triton with this module, and warn where there is none.
    """
    name, _, schema = signature.partition("(")
    whole = torch.library.custom_op(f"anarcho_model::{name}", function, mutates_args=(), schema=f"({schema}")
    whole.register_fake(function)

    def traced(mode: Any, _operator: object, _types: object, args: Any, kwargs: Any) -> Any:
        with mode:
            return function(*args, **kwargs)

    if FunctionalTensorMode is not None:
        whole.register_torch_dispatch(FunctionalTensorMode, traced)
    return whole


def swiglu(
    gate_up: Float[Tensor, "tokens both"], weight: Float[Tensor, "outputs hidden"]
) -> Float[Tensor, "tokens outputs"]:
    """`silu(gate) * up` by `weight`, of the same dtype; gate and up lie side by side."""
    return _swiglu(gate_up, weight)


def _swiglu_forward(gate_up: Tensor, weight: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) * up) @ weight.t()


def _swiglu_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    gate_up, weight = ctx.saved_tensors
    hidden = grad @ weight  # its gradient, until the next line
    grad_gate_up = swiglu_gradients(gate_up, hidden)
    return grad_gate_up, grad.t() @ hidden


def _save(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    del output
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))


_swiglu = operator("swiglu(Tensor gate_up, Tensor weight) -> Tensor", _swiglu_forward)
_swiglu.register_autograd(_swiglu_backward, setup_context=_save)


def heads_of(
    x: Float[Tensor, "tokens inputs"],
    weight: Float[Tensor, "all_heads inputs"],
    cos: Float[Tensor, "rows 1 length half"],
    sin: Float[Tensor, "rows 1 length half"],
    *,
    heads: int,
    kv_heads: int,
) -> tuple[
    Float[Tensor, "batch heads length head"],
    Float[Tensor, "batch kv length head"],
    Float[Tensor, "batch kv length head"],
]:
    """q and k, rotated, and v: what the rows of `weight` for them, one below the other, make of `x`, of the same dtype."""
    return _heads_of(x, weight, cos, sin, heads, kv_heads)


def _heads_of_forward(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    return split_heads(x @ weight.t(), cos, sin, heads, kv_heads)


def split_heads(together: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q and k, rotated, and v, which is a view of ``together``, where all heads of a token lie side by side."""
    length, head_size = cos.shape[2], 2 * cos.shape[3]
    parts = together.view(-1, length, heads + 2 * kv_heads, head_size).split((heads, kv_heads, kv_heads), dim=2)
    q, k, v = (part.transpose(1, 2) for part in parts)
    return rotate_halves(q, cos, sin), rotate_halves(k, cos, sin), v


def _heads_of_backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, cos, sin = ctx.saved_tensors
    grad = pack_rotary_gradients(grad_q, grad_k, grad_v, cos, sin)
    return grad @ weight, grad.t() @ x, None, None, None, None


_heads_of = operator(
    "heads_of(Tensor x, Tensor weight, Tensor cos, Tensor sin, int heads, int kv_heads) -> (Tensor, Tensor, Tensor)",
    _heads_of_forward,
)
_heads_of.register_autograd(_heads_of_backward, setup_context=_save)


@torch.library.custom_op(
    "anarcho_model::swiglu_gradients",
    mutates_args=("hidden",),
    device_types="cuda",
    schema="(Tensor gate_up, Tensor(a!) hidden) -> Tensor",
)
def swiglu_gradients(gate_up: Tensor, hidden: Tensor) -> Tensor:
    """See `torch_cuda_kernels.swiglu_gradients`; Triton is imported where it is used."""
    from anarcho_model.layers import torch_cuda_kernels

    return torch_cuda_kernels.swiglu_gradients(gate_up, hidden)


@swiglu_gradients.register_fake
def _(gate_up: Tensor, hidden: Tensor) -> Tensor:
    del hidden
    return gate_up.new_empty(gate_up.shape)


@torch.library.custom_op(
    "anarcho_model::pack_rotary_gradients",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor cos, Tensor sin) -> Tensor",
)
def pack_rotary_gradients(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `torch_cuda_kernels.pack_rotary_gradients`."""
    from anarcho_model.layers import torch_cuda_kernels

    return torch_cuda_kernels.pack_rotary_gradients(grad_q, grad_k, grad_v, cos, sin)


@pack_rotary_gradients.register_fake
def _(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, heads, length, head_size = grad_q.shape
    return grad_q.new_empty((batch * length, (heads + 2 * grad_k.shape[1]) * head_size))
