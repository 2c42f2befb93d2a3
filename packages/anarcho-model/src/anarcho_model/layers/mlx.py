"""The layers of the GPT in MLX: RMSNorm, rotary positions, causal attention, SwiGLU and the block they make up.

Notable:

* rotary angles and the softmax are float32 whatever the weights' type, and so are the sums of a norm, which reads and
  hands on numbers of the compute dtype; a linear layer computes in the type of what it reads;
* functions have gradients of their own where these keep less for backward: the rotation keeps nothing, the gated
  projection only its two factors;
* backward of a linear layer waits for the gradient of its weights, which MLX would put off, and keep its input for;
* what backward computes again depends on the incoming gradient (`mx.depends`), or `mx.compile` would find the same
  operation in the forward pass and keep its result instead.

Shapes as in `anarcho_model.mlx`. Sources: RMSNorm (arXiv:1910.07467), RoPE (arXiv:2104.09864), GQA (arXiv:2305.13245),
QK-norm (arXiv:2010.04245), SwiGLU (arXiv:2002.05202).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float, Int

from anarcho_model.config import ModelConfig
from anarcho_model.layers.mlx_attention import attend, attend_in_training
from anarcho_model.layers.mlx_cuda import (
    gated_gradients,
    has_gated_gradients,
    has_lookup,
    lookup,
)
from anarcho_model.layers.mlx_norm import has_norm_gradients, norm_gradients, sum_norm
from anarcho_model.layers.mlx_rotation import has_rotation_kernel, project_rotated, rotate_both

__all__ = [
    "AttentionContext",
    "Block",
    "LayerCache",
    "LayerStore",
    "Linear",
    "RMSNorm",
    "RotaryAngles",
    "Rotation",
    "embed",
    "widen",
]


def widen(x: Float[mx.array, "*shape"]) -> Float[mx.array, "*shape"]:
    """At least float32."""
    return x if x.dtype.size >= 4 else x.astype(mx.float32)


@mx.custom_function
def project(
    x: Float[mx.array, "*shape inputs"], *weights: Float[mx.array, "outputs inputs"]
) -> list[Float[mx.array, "*shape outputs"]]:
    """`x @ weight.T` for each of the weights; backward goes on to earlier layers when their gradients are there, and `x` is free."""
    return [x @ weight.T for weight in weights]


@project.vjp
def _project_vjp(
    primals: Sequence[mx.array], cotangents: Sequence[mx.array], _: Sequence[mx.array]
) -> tuple[mx.array, ...]:
    x, *weights = primals
    grad_weights = [_grad_weight(cotangent, x) for cotangent in cotangents]
    grad_x = cotangents[0] @ weights[0]
    for cotangent, weight in zip(cotangents[1:], weights[1:], strict=True):
        grad_x = mx.addmm(grad_x, cotangent, weight)  # the sum is part of the product, not a pass of its own
    return *mx.depends([grad_x], grad_weights), *grad_weights


def _grad_weight(
    cotangent: Float[mx.array, "*shape outputs"], x: Float[mx.array, "*shape inputs"]
) -> Float[mx.array, "outputs inputs"]:
    return cotangent.reshape(-1, cotangent.shape[-1]).T @ x.reshape(-1, x.shape[-1])


@mx.custom_function
def project_frozen(
    x: Float[mx.array, "*shape inputs"], weight: Float[mx.array, "outputs inputs"]
) -> Float[mx.array, "*shape outputs"]:
    """`x @ weight.T` with weights that have no gradient; backward keeps neither `x` nor the cast weights, but casts them again."""
    return x @ weight.astype(x.dtype).T


@project_frozen.vjp
def _project_frozen_vjp(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    weight = primals[1]
    return cotangent @ mx.depends(weight, cotangent).astype(cotangent.dtype), mx.zeros_like(weight)


class Linear(nn.Linear):
    """A linear layer without bias; its weights are cast to the type of its input, inside the graph."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def __call__(self, x: Float[mx.array, "*shape inputs"]) -> Float[mx.array, "*shape outputs"]:
        if is_frozen(self):
            return project_frozen(x, self.weight)  # pyright: ignore[reportReturnType]
        return project(x, self.weight.astype(x.dtype))[0]  # pyright: ignore[reportIndexIssue]


def project_all(x: Float[mx.array, "*shape inputs"], *layers: nn.Module) -> list[Float[mx.array, "*shape outputs"]]:
    """What each layer makes of `x`; trained linear layers have one gradient for it together."""
    if are_trained(*layers):
        weights = (layer.weight.astype(x.dtype) for layer in layers)  # pyright: ignore[reportOptionalMemberAccess]
        return project(x, *weights)  # pyright: ignore[reportReturnType]
    return [layer(x) for layer in layers]  # pyright: ignore[reportCallIssue]


def are_trained(*layers: nn.Module) -> bool:
    """Whether all are linear layers whose own weights are trained."""
    return all(type(layer) is Linear and not is_frozen(layer) for layer in layers)


def is_frozen(layer: nn.Module) -> bool:
    """Whether `layer.freeze()` has taken its weights out of training."""
    return "weight" not in layer.trainable_parameters()


def embed(
    layer: nn.Module, tokens: Int[mx.array, "*shape"], *, dtype: mx.Dtype | None
) -> Float[mx.array, "*shape dim"]:
    """The rows of an embedding, as `dtype`; None means at least float32."""
    if type(layer) is nn.Embedding and has_lookup(layer.weight, dtype or mx.float32):
        return _looked_up(dtype or mx.float32)(layer.weight, tokens)
    rows: mx.array = layer(tokens)  # pyright: ignore[reportCallIssue]
    return widen(rows) if dtype is None else rows.astype(dtype)


@functools.cache
def _looked_up(dtype: mx.Dtype) -> Callable[[mx.array, mx.array], mx.array]:
    """`lookup`, and its gradient."""

    @mx.custom_function
    def rows(table: mx.array, tokens: mx.array) -> mx.array:
        return lookup(table, tokens, dtype)

    @rows.vjp
    def _(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        table, tokens = primals
        added = cotangent.reshape(-1, cotangent.shape[-1]).astype(table.dtype)
        return mx.zeros_like(table).at[tokens.reshape(-1)].add(added), mx.zeros_like(tokens)

    return rows  # pyright: ignore[reportReturnType]


class RMSNorm(nn.Module):
    """Root-mean-square norm of numbers of `dtype`, which is that of the result, too (arXiv:1910.07467).

    MLX sums in float32. A float32 residual stream is rounded before the norm, which its next reader would do after it: so
    the norm and its gradient, bound by memory, move half of the bytes, and backward keeps half.
    """

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((size,))
        self.eps = eps

    def __call__(self, x: Float[mx.array, "*shape size"], *, dtype: mx.Dtype) -> Float[mx.array, "*shape size"]:
        x, weight = x.astype(dtype), self.weight.astype(dtype)
        if has_norm_gradients(x.shape[-1], dtype):
            return _norm_on_cuda(self.eps)(x, weight)  # pyright: ignore[reportReturnType]
        return mx.fast.rms_norm(x, weight, self.eps)

    def of_sum(
        self, x: Float[mx.array, "*shape size"], added: Float[mx.array, "*shape size"] | None, *, dtype: mx.Dtype
    ) -> tuple[Float[mx.array, "*shape size"], Float[mx.array, "*shape size"]]:
        """`x + added` in the type of `x`, and the norm of that; `added` None means nothing."""
        if added is None:
            return x, self(x, dtype=dtype)
        if x.dtype == added.dtype == dtype and has_norm_gradients(x.shape[-1], dtype):
            total, normed = _sum_norm_on_cuda(self.eps)(x, added, self.weight.astype(dtype))
            return total, normed
        x = x + added
        return x, self(x, dtype=dtype)


@functools.cache
def _sum_norm_on_cuda(eps: float) -> Callable[[mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]:
    """`sum_norm`, and its gradient."""

    @mx.custom_function
    def summed(x: mx.array, added: mx.array, weight: mx.array) -> list[mx.array]:
        return sum_norm(x, added, weight, eps=eps)

    @summed.vjp
    def _(
        primals: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
    ) -> tuple[mx.array, mx.array, mx.array]:
        grad, grad_weight = norm_gradients(outputs[0], primals[2], cotangents[1], cotangents[0], eps=eps)
        return grad, grad, grad_weight

    return summed  # pyright: ignore[reportReturnType]


@functools.cache
def _norm_on_cuda(eps: float) -> Callable[[mx.array, mx.array], mx.array]:
    """The norm with `norm_gradients`."""

    @mx.custom_function
    def norm(x: mx.array, weight: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, weight, eps)

    @norm.vjp
    def _(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        x, weight = primals
        return norm_gradients(x, weight, cotangent, eps=eps)

    return norm  # pyright: ignore[reportReturnType]


class Rotation(NamedTuple):
    """The rotary angles of one forward pass; MLX computes of it only what is used."""

    cos: Float[mx.array, "rows 1 length half"]
    """Cosines of the angles."""
    sin: Float[mx.array, "rows 1 length half"]
    """Sines of the angles."""
    periods: Float[mx.array, " half"]
    """Tokens per radian."""
    start: int | None
    """Where positions count up from here in every row, the first one; else None."""

    def __call__(self, x: Float[mx.array, "batch heads length head"]) -> Float[mx.array, "batch heads length head"]:
        """`rotate` by these angles, in one kernel where its precision is enough."""
        if self.start is None or not has_fused_rotation(x):
            return rotate(x, self.cos, self.sin)  # pyright: ignore[reportReturnType]
        return mx.fast.rope(
            x, x.shape[-1], traditional=False, base=None, scale=1.0, offset=self.start, freqs=self.periods
        )


class RotaryAngles:
    """The rotary frequencies in float32, whatever the weights are cast to; not part of the parameters."""

    def __init__(self, config: ModelConfig) -> None:
        exponents = np.arange(0, config.head_size, 2, dtype=np.float32) / np.float32(config.head_size)
        frequencies = np.float32(1) / np.float32(config.rope_theta) ** exponents  # in float32 like Transformers
        if config.rope_scaling is not None:
            scaled = [config.rope_scaling.scale(frequency) for frequency in frequencies.tolist()]
            frequencies = np.array(scaled, dtype=np.float32)
        self.frequencies, self.periods = mx.array(frequencies), mx.array(1 / frequencies)
        mx.eval(self.frequencies, self.periods)

    def __call__(self, positions: Int[mx.array, "rows length"], *, start: int | None) -> Rotation:
        """The angles at the given positions, which count up from `start` in every row unless it is None."""
        angles = positions.astype(mx.float32)[:, None, :, None] * self.frequencies
        return Rotation(mx.cos(angles), mx.sin(angles), self.periods, start)


def has_fused_rotation(x: Float[mx.array, "batch heads length head"]) -> bool:
    """Whether MLX's own rotation is as precise as ours: on a GPU it computes in float32, on a CPU in the type of `x`.

    Its angles are periods' reciprocals, which at position 4096 may be off by 5e-4: too much for float32 alone.
    """
    return x.dtype.size == 2 and mx.default_device() == mx.gpu


@mx.custom_function
def rotate(
    x: Float[mx.array, "batch heads length head"],
    cos: Float[mx.array, "rows 1 length half"],
    sin: Float[mx.array, "rows 1 length half"],
) -> Float[mx.array, "batch heads length head"]:
    """Turn the pairs (i, i + head/2) of each head by its position's angles, in float32; returned in the type of `x`."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    turned = [(first * cos - second * sin).astype(x.dtype), (second * cos + first * sin).astype(x.dtype)]
    return mx.concatenate(turned, axis=-1)


@rotate.vjp
def _rotate_vjp(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """The gradient is turned back; angles have none."""
    _, cos, sin = primals
    return rotate(cotangent, cos, -sin), mx.zeros_like(cos), mx.zeros_like(sin)  # pyright: ignore[reportReturnType]


@mx.custom_function
def gated(
    gate: Float[mx.array, "*shape hidden"], up: Float[mx.array, "*shape hidden"]
) -> Float[mx.array, "*shape hidden"]:
    """`silu(gate) * up`; backward keeps its two factors alone."""
    return nn.silu(gate) * up


@gated.vjp
def _gated_vjp(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    gate, up = mx.depends(list(primals), [cotangent])
    return _grad_gated(gate, up, cotangent)


def _grad_gated(gate: mx.array, up: mx.array, grad: mx.array) -> tuple[mx.array, mx.array]:
    """Gradients of the factors, from that of `gated`; each silu is computed for itself, see `project_gated`."""
    grad_up = grad * nn.silu(gate)
    gate = mx.depends(gate, grad_up)
    sigmoid = mx.sigmoid(gate)
    return grad * up * (sigmoid * (1 + gate * (1 - sigmoid))), grad_up


@mx.custom_function
def project_gated(
    gate: Float[mx.array, "*shape hidden"],
    up: Float[mx.array, "*shape hidden"],
    weight: Float[mx.array, "dim hidden"],
) -> Float[mx.array, "*shape dim"]:
    """`(silu(gate) * up) @ weight.T`; backward keeps `gate` and `up` alone and multiplies them again.

    It does so once for each result: MLX writes down whatever two of them would share, and reading twice costs less.
    """
    return (nn.silu(gate) * up) @ weight.T


@project_gated.vjp
def _project_gated_vjp(
    primals: Sequence[mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    gate, up, weight = mx.depends(list(primals), [cotangent])
    if has_gated_gradients(gate):
        *grads, product = gated_gradients(gate, up, cotangent @ weight)
        grad_weight = _grad_weight(cotangent, product)
        return *mx.depends(grads, [grad_weight]), grad_weight  # pyright: ignore[reportReturnType]
    grad_weight = _grad_weight(cotangent, nn.silu(gate) * up)
    grad, gate = mx.depends([cotangent @ weight, gate], [grad_weight])
    return *_grad_gated(gate, up, grad), grad_weight


class AttentionContext(NamedTuple):
    """What all layers of one forward pass share."""

    dtype: mx.Dtype
    """The compute dtype."""
    rotation: Rotation
    """By which queries and keys are turned."""
    mask: Float[mx.array, "rows 1 length extent"] | None = None
    """Added to the scores: 0 where a query may see a key, else minus infinity; None means plain causal attention."""
    positions: Int[mx.array, "batch length"] | None = None
    """With a cache: where the new tokens are stored."""
    start: int | None = None
    """With a cache: the first new token's place, if it is the same in all rows."""
    extent: int = 0
    """With a cache: number of stored tokens to attend to."""


class LayerStore:
    """Storage of one layer's keys or values: (rows, kv, capacity, head), as they are or quantised by `mx.quantize`."""

    def __init__(self, shape: tuple[int, int, int, int], *, dtype: mx.Dtype, bits: int | None, group_size: int) -> None:
        empty = mx.zeros(shape, dtype=dtype)
        self.bits, self.group_size, self.dtype = bits, group_size, dtype
        self.parts = self._packed(empty)

    def write(
        self, new: Float[mx.array, "batch kv length head"], rows: mx.array | None, context: AttentionContext
    ) -> None:
        """Store new tokens at their positions, in these rows (None: in all)."""
        parts = list(self.parts)
        for index, values in enumerate(self._packed(new.astype(self.dtype))):
            if rows is None and context.start is not None:
                parts[index][:, :, context.start : context.start + new.shape[2]] = values
            else:
                places = mx.arange(new.shape[0]) if rows is None else rows
                parts[index][places[:, None], :, context.positions] = values.transpose(0, 2, 1, 3)
        self.parts = tuple(parts)

    def read(self, rows: mx.array | None, extent: int) -> Float[mx.array, "batch kv extent head"]:
        """The first `extent` tokens of these rows (None: of all)."""
        parts = [part[:, :, :extent] for part in self.parts]
        if rows is not None:
            parts = [part[rows] for part in parts]
        if self.bits is None:
            return parts[0]
        return mx.dequantize(*parts, group_size=self.group_size, bits=self.bits).astype(self.dtype)

    def _packed(self, values: mx.array) -> tuple[mx.array, ...]:
        if self.bits is None:
            return (values,)
        return tuple(mx.quantize(values, group_size=self.group_size, bits=self.bits))


class LayerCache:
    """Keys and values of one layer; see `KVCache`. With `rows`, the batch is these rows of the stored ones."""

    def __init__(self, keys: LayerStore, values: LayerStore, *, rows: Int[mx.array, " batch"] | None = None) -> None:
        self.keys, self.values, self.rows = keys, values, rows

    def append(
        self,
        keys: Float[mx.array, "batch kv length head"],
        values: Float[mx.array, "batch kv length head"],
        context: AttentionContext,
    ) -> tuple[Float[mx.array, "batch kv extent head"], Float[mx.array, "batch kv extent head"]]:
        """Store the new tokens at their positions and return everything up to the furthest one."""
        self.keys.write(keys, self.rows, context)
        self.values.write(values, self.rows, context)
        return self.keys.read(self.rows, context.extent), self.values.read(self.rows, context.extent)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions, grouped key/value heads and optional QK-norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_size = config.num_heads, config.kv_heads, config.head_size
        self.q_proj = Linear(config.dim, self.heads * self.head_size)
        self.k_proj = Linear(config.dim, self.kv_heads * self.head_size)
        self.v_proj = Linear(config.dim, self.kv_heads * self.head_size)
        self.o_proj = Linear(self.heads * self.head_size, config.dim)
        self.q_norm = RMSNorm(self.head_size, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_size, eps=config.norm_eps) if config.qk_norm else None

    def __call__(
        self, x: Float[mx.array, "batch length dim"], context: AttentionContext, cache: LayerCache | None
    ) -> Float[mx.array, "batch length dim"]:
        batch, length, _ = x.shape
        q, k, v = (heads.transpose(0, 2, 1, 3) for heads in self._turned(x, context, in_table=cache is None))
        if cache is None:
            mixed = attend_in_training(q, k, v, mask=context.mask)
        else:
            mixed = attend(q, *cache.append(k, v, context), mask=context.mask)
        return self.o_proj(mixed.transpose(0, 2, 1, 3).reshape(batch, length, -1))

    def _turned(
        self, x: Float[mx.array, "batch length dim"], context: AttentionContext, *, in_table: bool
    ) -> Sequence[Float[mx.array, "batch length _ head"]]:
        """Queries, keys and values, the first two turned; `in_table` says whether a table of angles is worth its making."""
        layers, rotation = (self.q_proj, self.k_proj, self.v_proj), context.rotation
        in_table = in_table and has_rotation_kernel(self.head_size, x.dtype)
        if in_table and self.q_norm is None and are_trained(*layers):
            weights = (layer.weight.astype(x.dtype) for layer in layers)
            return project_rotated(x, *weights, rotation.cos, rotation.sin)  # pyright: ignore[reportReturnType]
        q, k, v = (heads.reshape(*x.shape[:2], -1, self.head_size) for heads in project_all(x, *layers))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, dtype=x.dtype), self.k_norm(k, dtype=x.dtype)
        if in_table:
            return *rotate_both(q, k, rotation.cos, rotation.sin), v  # pyright: ignore[reportReturnType, reportGeneralTypeIssues]
        q, k = (rotation(heads.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for heads in (q, k))
        return q, k, v


class SwiGLU(nn.Module):
    """Gated feed-forward layer: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.dim, config.ffn_size)
        self.up_proj = Linear(config.dim, config.ffn_size)
        self.down_proj = Linear(config.ffn_size, config.dim)

    def __call__(self, x: Float[mx.array, "*shape dim"]) -> Float[mx.array, "*shape dim"]:
        gate, up = project_all(x, self.gate_proj, self.up_proj)
        if is_frozen(self.down_proj):
            return self.down_proj(gated(gate, up))  # pyright: ignore[reportArgumentType]
        return project_gated(gate, up, self.down_proj.weight.astype(x.dtype))  # pyright: ignore[reportReturnType]


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(config.dim, eps=config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.dim, eps=config.norm_eps)

    def __call__(
        self,
        x: Float[mx.array, "batch length dim"],
        context: AttentionContext,
        cache: LayerCache | None = None,
        *,
        added: Float[mx.array, "batch length dim"] | None = None,
    ) -> tuple[Float[mx.array, "batch length dim"], Float[mx.array, "batch length dim"]]:
        """The residual stream `x + added` with the attention added, and what is still to be added: whoever norms next does both at once."""
        x, normed = self.input_layernorm.of_sum(x, added, dtype=context.dtype)
        mixed = self.self_attn(normed, context, cache)
        x, normed = self.post_attention_layernorm.of_sum(x, mixed, dtype=context.dtype)
        return x, self.mlp(normed)
