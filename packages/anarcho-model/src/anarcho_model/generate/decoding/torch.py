"""Reading a few new tokens of each row of a cache with PyTorch: what a model does again and again while it generates.

Notable:

* it computes what `GPT.hidden_states` and `unembed` do, as one function without modules; layers that read the same
  input are one product (see `anarcho_model.generate.linear.torch`);
* grouped query heads are taken for further queries of their key/value head, so that keys and values are never repeated;
* only the filled part of the cache is read, and only the positions whose logits are wanted meet the output layer;
* on CUDA a step of one token a row is a graph (see `anarcho_model.generate.graphs.torch`);
* a model with layers of another kind, such as adapters, or on another device reads with its own modules.

A reader belongs to its model, and is made anew when a weight has changed (see `reader_of`). Its copies of the weights
take up to as much memory as the model on a GPU and in bfloat16, and up to twice as much in float32 on a CPU, where one
layout serves single rows and one several.
"""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from anarcho_model.generate.linear.large_pages import LargePages
from anarcho_model.generate.linear.torch import FewRowsLinear
from anarcho_model.layers.torch import Block, LayerCache, RMSNorm, compute_dtype, widen
from anarcho_model.torch import GPT

if TYPE_CHECKING:
    from anarcho_model.generate.graphs.torch import StepGraphs

__all__ = ["Reader", "reader_of"]


class _Norm:
    """An RMS norm of a few float32 rows: three operations on a CPU, where torch's own is eight small ones."""

    def __init__(self, norm: RMSNorm) -> None:
        self.weight, self.eps = widen(norm.weight.detach()), norm.eps
        size = self.weight.shape[0]
        self.scaled = self.weight * math.sqrt(size)
        self.least = torch.tensor(math.sqrt(size * norm.eps), device=self.weight.device, dtype=self.weight.dtype)

    def __call__(self, x: Float[Tensor, "rows size"]) -> Float[Tensor, "rows size"]:
        if x.device.type != "cpu":
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * self.scaled).div_(torch.hypot(length, self.least))


class _Layer:
    """One block's weights, ready for few rows."""

    def __init__(self, block: Block, *, dtype: torch.dtype, pages: LargePages) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.heads, self.kv_heads, self.head_size = attention.heads, attention.kv_heads, attention.head_size
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.qkv = FewRowsLinear([p.weight for p in projections], dtype=dtype, pages=pages)
        self.out = FewRowsLinear([attention.o_proj.weight], dtype=dtype, pages=pages)
        self.gate_up = FewRowsLinear([mlp.gate_proj.weight, mlp.up_proj.weight], dtype=dtype, pages=pages)
        self.down = FewRowsLinear([mlp.down_proj.weight], dtype=dtype, pages=pages)
        self.input_norm = _Norm(block.input_layernorm)
        self.mlp_norm = _Norm(block.post_attention_layernorm)
        self.eps = block.input_layernorm.eps
        self.head_norms: Tensor | None = None
        if attention.q_norm is not None and attention.k_norm is not None:
            repeats = torch.tensor([self.heads, self.kv_heads], device=attention.q_norm.weight.device)
            weights = torch.stack([attention.q_norm.weight, attention.k_norm.weight]).detach()
            self.head_norms = widen(weights).repeat_interleave(repeats, dim=0)

    def read(self, x: Tensor, step: _Step, keys: Tensor, values: Tensor) -> Tensor:
        """The residual stream after this block, float32, one row a token; extends `keys` and `values`."""
        dtype, tokens, turned = self.qkv.dtype, x.shape[0], self.heads + self.kv_heads
        qkv = self.qkv(self.input_norm(x).to(dtype)).view(tokens, turned + self.kv_heads, self.head_size)
        turning = qkv[:, :turned]
        if self.head_norms is not None:
            turning = (F.rms_norm(widen(turning), (self.head_size,), None, self.eps) * self.head_norms).to(dtype)
        turning = widen(turning)
        turning = torch.addcmul(turning * step.cos, turning.roll(self.head_size // 2, -1), step.sin).to(dtype)
        keys.view(-1, self.head_size).index_copy_(0, step.places, turning[:, self.heads :].reshape(-1, self.head_size))
        values.view(-1, self.head_size).index_copy_(0, step.places, qkv[:, turned:].reshape(-1, self.head_size))
        mixed = self._attend(turning[:, : self.heads], step, keys, values)
        h = x + self.out(mixed)
        gate, up = self.gate_up(self.mlp_norm(h).to(dtype)).chunk(2, dim=-1)
        return h + self.down(F.silu(gate) * up)

    def _attend(self, q: Tensor, step: _Step, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of each row's new tokens to the cache, with the heads side by side again."""
        k, v = keys[step.rows, :, : step.extent], values[step.rows, :, : step.extent]
        rows, group = k.shape[0], self.heads // self.kv_heads
        length = q.shape[0] // rows
        # The queries of a group follow each other: (rows, kv, group * length, head).
        q = q.view(rows, length, self.kv_heads, group, self.head_size).permute(0, 2, 3, 1, 4)
        q = q.reshape(rows, self.kv_heads, group * length, self.head_size)
        mask = step.mask
        if mask is not None and length > 1:
            mask = mask.repeat(1, 1, group, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mixed = mixed.view(rows, self.kv_heads, group, length, self.head_size).permute(0, 3, 1, 2, 4)
        return mixed.reshape(rows * length, self.heads * self.head_size)


class _Step(NamedTuple):
    """What all layers of one step share."""

    rows: slice | Tensor
    """Those of the cache that the step belongs to: read where they lie, or copied where they do not follow each other."""
    extent: int
    """Number of stored positions that are attended to."""
    cos: Float[Tensor, "tokens 1 head"]
    sin: Float[Tensor, "tokens 1 head"]
    """Negative in the first half, so that one product turns both halves."""
    places: Int[Tensor, " stored"]
    """Of each new key, token by token and head by head: its row in the cache seen as (rows * kv * capacity, head)."""
    mask: Bool[Tensor, "rows 1 length extent"] | None
    """None where every token sees everything up to the extent."""


class Reader:
    """A model's weights, ready to read a few tokens a row."""

    def __init__(self, model: GPT) -> None:
        config, self.dtype = model.config, compute_dtype(model.head_weight)
        self.kv_heads = config.kv_heads
        self.embedding = model.model.embed_tokens.weight.detach()
        pages, blocks = LargePages(), [block for block in model.model.layers if isinstance(block, Block)]
        self.layers = [_Layer(block, dtype=self.dtype, pages=pages) for block in blocks]
        self.head = FewRowsLinear([model.head_weight], dtype=self.dtype, pages=pages)
        self.norm = _Norm(model.model.norm)
        self.spare: StepGraphs | None = None
        """A cache that nobody uses at present, with its graphs, so that the next text need not record them again."""
        rotary = model.model.rotary
        self.cos = torch.cat([rotary.cos, rotary.cos], dim=-1)[:, None]
        self.sin = torch.cat([-rotary.sin, rotary.sin], dim=-1)[:, None]

    def read(
        self,
        tokens: Int[Tensor, "rows length"],
        positions: Int[Tensor, "rows length"],
        *,
        layers: list[LayerCache],
        rows: slice | Int[Tensor, " rows"],
        extent: int,
        alike: bool,
    ) -> Float[Tensor, "tokens vocab"]:
        """Logits after each of these tokens, which stand at these positions of these rows of the cache, in the compute dtype.

        `extent` is at least the furthest position plus one; `alike` promises that every token stands at the last
        position of the extent, so that nothing has to be masked.
        """
        flat = positions.reshape(-1)
        stored, _, capacity, _ = layers[0].keys.shape
        numbers = torch.arange(stored, device=flat.device)[rows] if isinstance(rows, slice) else rows
        heads = numbers[:, None, None] * self.kv_heads + torch.arange(self.kv_heads, device=flat.device)
        places = (heads * capacity + positions[:, :, None]).reshape(-1)
        mask = None if alike else torch.arange(extent, device=flat.device) <= positions[:, None, :, None]
        step = _Step(rows, extent, self.cos[flat], self.sin[flat], places, mask)
        x = widen(F.embedding(tokens.reshape(-1), self.embedding))
        for layer, cache in zip(self.layers, layers, strict=True):
            x = layer.read(x, step, cache.keys, cache.values)
        return self.head(self.norm(x).to(self.dtype))


_READERS: weakref.WeakKeyDictionary[GPT, tuple[object, Reader]] = weakref.WeakKeyDictionary()


def reader_of(model: GPT) -> Reader | None:
    """The model's reader, made anew if a weight has been changed; None where the model's own modules have to read."""
    if model.head_weight.device.type not in ("cpu", "cuda") or not _is_plain(model):
        return None
    state = (compute_dtype(model.head_weight), [_version(parameter) for parameter in model.parameters()])
    known = _READERS.get(model)
    if known is not None and known[0] == state:
        return known[1]
    _READERS.pop(model, None)  # before the new copies are made, or both would be in memory
    reader = Reader(model)
    _READERS[model] = (state, reader)
    return reader


def _is_plain(model: GPT) -> bool:
    """Whether every layer is one that a reader knows; adapters replace or wrap some."""
    kinds = {type(module) for name, module in model.model.named_modules() if name.endswith("_proj")}
    return kinds == {nn.Linear} and not any(hasattr(module, "parametrizations") for module in model.modules())


def _version(parameter: Tensor) -> tuple[int, int]:
    return parameter.data_ptr(), -1 if parameter.is_inference() else parameter._version
