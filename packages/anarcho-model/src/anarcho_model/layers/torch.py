"""The layers of the GPT in PyTorch: RMSNorm, rotary positions, causal attention, SwiGLU and the block they make up.

Notable:

* norms, rotary angles and the softmax are float32 whatever the weights' type; a norm hands its result on in the compute
  dtype, once for all of its readers;
* every linear layer reads a contiguous two-dimensional tensor, because Apple's back-end has computed others wrong
  without an error.

Shapes as in `anarcho_model.torch`. Sources: RMSNorm (arXiv:1910.07467), RoPE (arXiv:2104.09864), GQA (arXiv:2305.13245),
QK-norm (arXiv:2010.04245), SwiGLU (arXiv:2002.05202).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from anarcho_model.config import ModelConfig
from anarcho_model.layers import torch_cpu, torch_cuda, torch_documents, torch_float8
from anarcho_model.layers.torch_rotary import RotaryTables, rotate

__all__ = ["AttentionContext", "Block", "LayerCache", "RMSNorm", "RotaryTables", "compute_dtype", "widen"]


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The element type of matrix products: autocast's where it is on, else the weights' own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def widen(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 and returned in the compute dtype (arXiv:1910.07467)."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*shape size"]) -> Float[Tensor, "*shape size"]:
        weight = widen(self.weight)
        return F.rms_norm(widen(x), weight.shape, weight, self.eps).to(compute_dtype(self.weight))

    def limit(self) -> torch_float8.Limit:
        """No number that it returns is larger: one that is alone in its row becomes `sqrt(size)`, times its weight."""
        return math.sqrt(len(self.weight)) * self.weight.detach().abs().amax().float()


def project_all(x: Float[Tensor, "tokens inputs"], *layers: nn.Module) -> list[Float[Tensor, "tokens outputs"]]:
    """What each layer makes of `x`; compiled, linear layers are one product, and so is the gradient of `x`.

    Their weights stay apart; a copy of them side by side is part of the cast to the compute dtype.
    """
    on_cpu = x.device.type == "cpu" and compute_dtype(x) == torch.bfloat16
    if (on_cpu or x.is_cuda) and torch.compiler.is_compiling() and all(type(layer) is nn.Linear for layer in layers):
        weights: list[Any] = [layer.weight for layer in layers]
        together = torch_cpu.linear(x, *weights, dtype=compute_dtype(x)) if on_cpu else F.linear(x, torch.cat(weights))
        return list(together.split([len(weight) for weight in weights], dim=-1))
    return [layer(x) for layer in layers]


CUDA_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""The kernels of causal attention in training, by preference: with heads of 64 on an H100, cuDNN's takes 3.7 ms where PyTorch's own flash
attention takes 6.0 (16 sequences of 4096, 12 heads, forward and backward)."""


def attend(
    q: Float[Tensor, "batch heads length head"],
    k: Float[Tensor, "batch heads keys head"],
    v: Float[Tensor, "batch heads keys head"],
    *,
    mask: Bool[Tensor, "batch 1 length keys"] | None,
) -> Float[Tensor, "batch heads length head"]:
    """Softmax attention scaled by 1/sqrt(head): to the keys where `mask` is true, or without one to all up to the query.

    Compiled for a CPU, sequences up to `torch_cpu.MAX_LENGTH` take products instead of torch's attention kernel, whose backward
    is slow there.
    """
    if mask is None and q.is_cuda and torch.is_grad_enabled():
        with sdpa_kernel(CUDA_BACKENDS, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    compiled_for_cpu = q.device.type == "cpu" and torch.compiler.is_compiling()
    if mask is None and compiled_for_cpu and q.shape[-2] <= torch_cpu.MAX_LENGTH:
        return torch_cpu.causal_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


class AttentionContext(NamedTuple):
    """What all layers of one forward pass share."""

    cos: Float[Tensor, "rows 1 length half"]
    """Cosines of the rotary angles."""
    sin: Float[Tensor, "rows 1 length half"]
    """Sines of the rotary angles."""
    mask: Bool[Tensor, "batch 1 length extent"] | None = None
    """True where a query may see a key; None means plain causal attention, unless there are `documents`."""
    documents: torch_documents.DocumentBlocks | None = None
    """In place of a mask, where `torch_documents` suits: what of each block of a row belongs to the documents of another."""
    positions: Int[Tensor, "batch length"] | None = None
    """With a cache: where the new tokens are stored."""
    extent: int = 0
    """With a cache: number of stored tokens to attend to."""
    float8: bool = False
    """Whether training multiplies in 8-bit floats what `torch_float8` suits."""


class LayerCache:
    """Keys and values of one layer; see `KVCache`. With `rows`, the batch is these rows of the stored ones."""

    def __init__(
        self,
        keys: Float[Tensor, "stored kv capacity head"],
        values: Float[Tensor, "stored kv capacity head"],
        *,
        rows: Int[Tensor, " batch"] | None = None,
    ) -> None:
        self.keys, self.values, self.rows = keys, values, rows

    def append(
        self,
        keys: Float[Tensor, "batch kv length head"],
        values: Float[Tensor, "batch kv length head"],
        context: AttentionContext,
    ) -> tuple[Float[Tensor, "batch kv extent head"], Float[Tensor, "batch kv extent head"]]:
        """Store the new tokens at their positions and return everything up to the furthest one."""
        rows = torch.arange(keys.shape[0], device=keys.device) if self.rows is None else self.rows
        self.keys[rows[:, None], :, context.positions] = keys.transpose(1, 2).to(self.keys.dtype)
        self.values[rows[:, None], :, context.positions] = values.transpose(1, 2).to(self.values.dtype)
        stored = self.keys[:, :, : context.extent], self.values[:, :, : context.extent]
        return stored if self.rows is None else (stored[0][self.rows], stored[1][self.rows])


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions, grouped key/value heads and optional QK-norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_size = config.num_heads, config.kv_heads, config.head_size
        self.q_proj = nn.Linear(config.dim, self.heads * self.head_size, bias=False)
        self.k_proj = nn.Linear(config.dim, self.kv_heads * self.head_size, bias=False)
        self.v_proj = nn.Linear(config.dim, self.kv_heads * self.head_size, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_size, config.dim, bias=False)
        self.q_norm = RMSNorm(self.head_size, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_size, eps=config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: AttentionContext,
        cache: LayerCache | None,
        *,
        limit: torch_float8.Limit | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """With a ``limit``, above all numbers of ``x``, products are in 8-bit floats where that gains."""
        batch, length, dim = x.shape
        q, k, v = self._heads_of(x, context, limit)
        if cache is not None:
            k, v = cache.append(k, v, context)
        if self.kv_heads != self.heads:  # repeated here, because not every device's kernel takes grouped heads
            group = self.heads // self.kv_heads
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        blocks = context.documents
        mixed = attend(q, k, v, mask=context.mask) if blocks is None else torch_documents.attend(q, k, v, blocks)
        joined = mixed.transpose(1, 2).reshape(batch * length, -1)
        if limit is not None and torch_float8.suits_linear(joined, self.o_proj, dtype=joined.dtype):
            return torch_float8.linear(joined, self.o_proj.weight).view(batch, length, dim)
        (result,) = project_all(joined, self.o_proj)
        return result.view(batch, length, dim)

    def _heads_of(
        self, x: Float[Tensor, "batch length dim"], context: AttentionContext, limit: torch_float8.Limit | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The rotated queries and keys, and the values, each (batch, heads, length, head)."""
        flat, cos, sin, dtype = x.reshape(-1, x.shape[-1]), context.cos, context.sin, compute_dtype(x)
        layers = self.q_proj, self.k_proj, self.v_proj
        plain = self.q_norm is None
        if plain and limit is not None and torch_float8.suits_linear(flat, *layers, dtype=dtype):
            weights = [layer.weight for layer in layers]
            sizes = {"heads": self.heads, "kv_heads": self.kv_heads}
            return torch_float8.heads_of(flat, *weights, cos=cos, sin=sin, limit=limit, **sizes)
        if plain and torch_cuda.suits(flat, *layers, dtype=dtype):
            weight = torch.cat([layer.weight for layer in layers]).to(dtype)
            return torch_cuda.heads_of(flat.to(dtype), weight, cos, sin, heads=self.heads, kv_heads=self.kv_heads)
        q, k, v = (part.view(*x.shape[:2], -1, self.head_size) for part in project_all(flat, *layers))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class SwiGLU(nn.Module):
    """Gated feed-forward layer: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_size, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_size, config.dim, bias=False)

    def forward(
        self, x: Float[Tensor, "batch length dim"], *, limit: torch_float8.Limit | None = None
    ) -> Float[Tensor, "batch length dim"]:
        """With a ``limit``, above all numbers of ``x``, products are in 8-bit floats where that gains."""
        flat, dtype = x.reshape(-1, x.shape[-1]), compute_dtype(x)
        layers = self.gate_proj, self.up_proj, self.down_proj
        if limit is not None and torch_float8.suits_swiglu(flat, *layers, dtype=dtype):
            return torch_float8.swiglu(flat, *(layer.weight for layer in layers), limit=limit).view(x.shape)
        if torch_cuda.suits(flat, *layers, dtype=dtype):
            gate_up = F.linear(flat, torch.cat((self.gate_proj.weight, self.up_proj.weight)))
            return torch_cuda.swiglu(gate_up, self.down_proj.weight.to(dtype)).view(x.shape)
        gate, up = project_all(flat, self.gate_proj, self.up_proj)
        (result,) = project_all(F.silu(gate) * up, self.down_proj)
        return result.view(x.shape)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(config.dim, eps=config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.dim, eps=config.norm_eps)

    def forward(
        self, x: Float[Tensor, "batch length dim"], context: AttentionContext, cache: LayerCache | None = None
    ) -> Float[Tensor, "batch length dim"]:
        norms = self.input_layernorm, self.post_attention_layernorm
        limits = [norm.limit() if context.float8 else None for norm in norms]
        h = x + self.self_attn(self.input_layernorm(x), context, cache, limit=limits[0])
        return h + self.mlp(self.post_attention_layernorm(h), limit=limits[1])
