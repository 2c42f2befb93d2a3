"""The GPT in MLX: the same model, names, files and numbers as `anarcho_model.torch`.

Notable:

* parameters have Hugging Face's names and layout (Llama; Qwen3 with QK-norm), rotary embeddings turn the two halves of
  a head; the tied output layer is the embedding's own array, so its gradient is the sum of both uses;
* weights are kept in float32 and cast to `compute_dtype` inside the graph; the residual stream and every norm are
  float32;
* everything works inside `mx.compile` and `nn.value_and_grad`; only a cache reads a number back, on the CPU's stream;
* `token_logprobs` is all that a trainer needs, and never holds the logits whole (see `anarcho_model.logprobs.mlx`).

Shapes: batch, length = sequences and tokens; dim = width of the residual stream; heads, kv = query and key/value heads;
    head = width of one head.
Sources: Llama (arXiv:2302.13971), SwiGLU (arXiv:2002.05202), GQA (arXiv:2305.13245), RoPE (arXiv:2104.09864), QK-norm
    (arXiv:2010.04245).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jaxtyping import Float, Int
from mlx.utils import tree_flatten, tree_map_with_path

from anarcho_model.config import InitConfig, ModelConfig
from anarcho_model.errors import ContextError
from anarcho_model.initial_draws import standard_normal
from anarcho_model.layers.mlx import (
    AttentionContext,
    Block,
    LayerCache,
    LayerStore,
    Linear,
    RMSNorm,
    RotaryAngles,
    embed,
    is_frozen,
)
from anarcho_model.logprobs.mlx import chunked_logprobs

if TYPE_CHECKING:
    from anarcho_model.lora.mlx import Adapter

__all__ = ["GPT", "ContextError", "KVCache"]


class KVCache:
    """Keys and values of the tokens read so far, for decoding without reading them again.

    Each row has its own length, so that prompts of different lengths decode together: fill the cache with prompts
    padded on the right, then set `lengths` to the true ones; what lies beyond a row's length is never attended to and
    is overwritten as the row grows. With `bits` (4 or 8), keys and values are stored quantised in groups of 32 to 128
    numbers of a head, which takes about a quarter or a half of bfloat16's memory and is read back in the compute dtype.
    """

    def __init__(self, model: GPT, *, batch: int, capacity: int, bits: int | None = None) -> None:
        config = model.config
        if capacity > config.context_length:
            raise ContextError(
                f"A cache of {capacity} tokens was asked for, but the model's context is {config.context_length}."
            )
        shape = (batch, config.kv_heads, capacity, config.head_size)
        group_size = 0 if bits is None else _group_size(config.head_size, bits=bits)
        stores = [
            LayerStore(shape, dtype=model.compute_dtype, bits=bits, group_size=group_size)
            for _ in range(2 * config.num_layers)
        ]
        self.layers = [LayerCache(*pair) for pair in zip(stores[::2], stores[1::2], strict=True)]
        self.lengths = mx.zeros((batch,), dtype=mx.int32, stream=mx.cpu)
        self.capacity = capacity

    def select(self, rows: Sequence[int]) -> KVCache:
        """A cache of these rows alone, in this order, over the same storage, with lengths of its own."""
        view = copy.copy(self)
        index = mx.array(list(rows), dtype=mx.int32)
        view.lengths = mx.take(self.lengths, index, axis=0, stream=mx.cpu)
        view.layers = [
            LayerCache(layer.keys, layer.values, rows=index if layer.rows is None else layer.rows[index])
            for layer in self.layers
        ]
        return view

    def next_positions(self, length: int) -> Int[mx.array, "batch length"]:
        """Positions of `length` new tokens a row; ContextError if the longest row has no room for them."""
        return self.placement(length)[0]

    def placement(self, length: int) -> tuple[Int[mx.array, "batch length"], int | None, int]:
        """Positions of `length` new tokens a row, the first of them if it is the same in all rows, and the end of the furthest."""
        lengths = np.array(self.lengths)
        used = int(lengths.max())
        if used + length > self.capacity:
            raise ContextError(f"The cache holds {used} of {self.capacity} tokens, so {length} more do not fit.")
        positions = mx.array(lengths[:, None] + np.arange(length, dtype=np.int32))
        return positions, used if lengths.min() == used else None, used + length


class Decoder(nn.Module):
    """The modules under Hugging Face's prefix `model.`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = [Block(config) for _ in range(config.num_layers)]
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.rotary = RotaryAngles(config)


class GPT(nn.Module):
    """A decoder-only language model. A new one needs `init_weights` before training, or `weights_mlx.load_weights`."""

    gradient_checkpointing: bool = False
    """Keep only each block's input for backward and compute the rest again: less memory for about a third more time."""
    logits_chunk_bytes: int = 256 * 2**20
    """Bound of the float32 logits that `token_logprobs` holds at a time."""
    narrow_residual: bool = False
    """Keep the residual stream in the compute dtype instead of float32: a block moves fewer bytes, and each sum is rounded."""
    compute_dtype: mx.Dtype = mx.float32
    """Element type of matrix products and of what lies between them; weights are cast to it inside the graph."""
    adapter: Adapter | None = None
    """The low-rank adapter that `anarcho_model.lora.mlx.add_adapter` has given it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_embeddings else Linear(config.dim, config.vocab_size)

    @property
    def head(self) -> nn.Embedding | Linear:
        """The module of the output layer's weights: the embedding, unless they are untied."""
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    @property
    def head_weight(self) -> Float[mx.array, "vocab dim"]:
        """The output layer's weights."""
        return self.head.weight

    def named_parameters(self) -> dict[str, mx.array]:
        """Hugging Face's name of each parameter -> its array."""
        return dict(tree_flatten(self.parameters()))  # pyright: ignore[reportReturnType] - it may also flatten strings

    def narrowed(self, parameters: dict) -> dict:
        """The tree of trainable parameters as `token_logprobs` computes with them: the blocks' matrices in the compute dtype.

        The gradient of a cast matrix is as exact as that of the matrix, and half as large; that of the output layer is a sum
        over chunks, in float32. With gradient checkpointing each block casts its own again in backward, so nothing is cast.
        """
        if self.compute_dtype == mx.float32 or self.gradient_checkpointing:
            return parameters
        layers = self.model.named_modules()
        linear = {f"model.{name}.weight" for name, module in layers if isinstance(module, nn.Linear)}
        return tree_map_with_path(
            lambda name, array: array.astype(self.compute_dtype) if name in linear else array, parameters
        )

    def init_weights(self, *, seed: int, init: InitConfig | None = None) -> None:
        """Draw all weights anew; the same seed gives the same weights on every device, and those of PyTorch but for last bits.

        Each tensor has its own random stream, derived from the seed and its name, so that changing one option, or
        adding a layer, leaves the other tensors' draws as they are.

        | tensor | value |
        |---|---|
        | norms | 1; QK-norm `init.qk_norm_gain` |
        | embedding | normal, `init.embedding_std` |
        | untied output layer | normal, `init.head_std` |
        | q, k, v, gate, up | normal, `init.linear_scale / sqrt(inputs)` |
        | o, down | 0; without `init.zero_residual_outputs` as above, divided by `sqrt(2 * num_layers)` |
        """
        init = InitConfig() if init is None else init
        drawn = []
        for name, parameter in self.named_parameters().items():
            if parameter.ndim == 1:
                drawn.append((name, mx.full(parameter.shape, init.gain(name), dtype=parameter.dtype)))
                continue
            std = init.std(name, parameter.shape, num_layers=self.config.num_layers)
            draw = standard_normal(parameter.shape, seed=seed, name=name)
            drawn.append((name, mx.array(draw * np.float32(std)).astype(parameter.dtype)))
        self.load_weights(drawn)
        mx.eval(self.parameters())

    def hidden_states(
        self,
        tokens: Int[mx.array, "batch length"],
        *,
        positions: Int[mx.array, "batch length"] | None = None,
        segments: Int[mx.array, "batch length"] | None = None,
        cache: KVCache | None = None,
        embedding_noise: Float[mx.array, "batch length dim"] | None = None,
        dropout_keys: Int[mx.array, " batch"] | None = None,
    ) -> Float[mx.array, "batch length dim"]:
        """The final norm's output, in the compute dtype.

        Args:
            tokens: ids under `vocab_size`. positions: rotary position of each token, under `context_length`; None
                counts from 0. segments: number of the document that each token belongs to; a token sees only its own
                document. None means one document.
            cache: read and extended by these tokens; it decides the positions, so `positions` and `segments` must be
                None.
            embedding_noise: is added to the embeddings, for training.
            dropout_keys: for the adapter's dropout in training, a number under 2**32 for each row, drawn anew for each
                step; a negative one means no dropout.

        Raises:
            ContextError: there are more tokens than the context, or the cache, holds.
        """
        context = self._attention_context(tokens.shape[1], positions, segments, cache)
        if self.adapter is not None:
            self.adapter.begin(dropout_keys, length=tokens.shape[1])
        x = embed(self.model.embed_tokens, tokens, dtype=self.compute_dtype if self.narrow_residual else None)
        if embedding_noise is not None:
            x = x + embedding_noise
        added: mx.array | None = None
        for index, block in enumerate(self.model.layers):
            if cache is not None:
                x, added = block(x, context, cache.layers[index], added=added)
            elif self.gradient_checkpointing:
                x = _checkpointed(block, x, context)
            else:
                x, added = block(x, context, added=added)
        if cache is not None:
            cache.lengths = mx.add(cache.lengths, tokens.shape[1], stream=mx.cpu)
        return self.model.norm.of_sum(x, added, dtype=self.compute_dtype)[1]

    def unembed(self, hidden: Float[mx.array, "*shape dim"]) -> Float[mx.array, "*shape vocab"]:
        """Logits of hidden states, in the compute dtype."""
        return hidden @ self.head_weight.astype(hidden.dtype).T

    def __call__(
        self,
        tokens: Int[mx.array, "batch length"],
        *,
        positions: Int[mx.array, "batch length"] | None = None,
        segments: Int[mx.array, "batch length"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[mx.array, "batch length vocab"]:
        """Logits of the next token at every position, in the compute dtype; arguments and errors as in `hidden_states`."""
        return self.unembed(self.hidden_states(tokens, positions=positions, segments=segments, cache=cache))

    def token_logprobs(
        self,
        tokens: Int[mx.array, "batch length"],
        targets: Int[mx.array, "batch length"],
        *,
        positions: Int[mx.array, "batch length"] | None = None,
        segments: Int[mx.array, "batch length"] | None = None,
        embedding_noise: Float[mx.array, "batch length dim"] | None = None,
        dropout_keys: Int[mx.array, " batch"] | None = None,
    ) -> Float[mx.array, "batch length"]:
        """Log-probability in nats of each target after its token and all before it: float32, differentiable once.

        Every target must be a valid id; positions that do not count are weighted with 0 by the caller. At most
        `logits_chunk_bytes` of logits exist at a time, in forward and in backward. Arguments and errors otherwise as in
        `hidden_states`.
        """
        hidden = self.hidden_states(
            tokens,
            positions=positions,
            segments=segments,
            embedding_noise=embedding_noise,
            dropout_keys=dropout_keys,
        )
        logprobs = chunked_logprobs(
            hidden.reshape(-1, hidden.shape[-1]),
            self.head_weight,
            targets.reshape(-1),
            compute_dtype=self.compute_dtype,
            chunk_bytes=self.logits_chunk_bytes,
            frozen=is_frozen(self.head),
        )
        return logprobs.reshape(tokens.shape)

    def _attention_context(
        self, length: int, positions: mx.array | None, segments: mx.array | None, cache: KVCache | None
    ) -> AttentionContext:
        dtype, rotary = self.compute_dtype, self.model.rotary
        if length > self.config.context_length:
            raise ContextError(
                f"A sequence of {length} tokens was given, but the model's context is {self.config.context_length}."
            )
        if cache is not None:
            if positions is not None or segments is not None:
                raise ValueError("positions and segments must be None with a cache, which decides the positions.")
            places, start, extent = cache.placement(length)
            mask = None  # rows of equal length are plain causal attention, aligned at the end
            if start is None:
                mask = _additive(mx.arange(extent) <= places[:, None, :, None], dtype)
            rotation = rotary(places, start=start)
            return AttentionContext(dtype, rotation, mask=mask, positions=places, start=start, extent=extent)
        rotation = rotary(mx.arange(length)[None], start=0) if positions is None else rotary(positions, start=None)
        mask = None
        if segments is not None:
            ids = mx.arange(length)
            causal = ids <= ids[:, None]
            mask = _additive((segments[:, None, :, None] == segments[:, None, None, :]) & causal, dtype)
        return AttentionContext(dtype, rotation, mask=mask)


def _additive(visible: mx.array, dtype: mx.Dtype) -> mx.array:
    """A mask as it is added to scores: MLX makes one of every head out of a boolean mask on CUDA."""
    return mx.where(visible, mx.array(0, dtype), mx.array(-math.inf, dtype))


def _checkpointed(block: Block, x: mx.array, context: AttentionContext) -> mx.array:
    """The block's sum of all, of which backward keeps the input alone; the parameters are inputs, or they had no gradient.

    It is one array, the next block's input, because MLX keeps all outputs of what is checkpointed until their backward.
    """

    def run(parameters: dict, x: mx.array) -> mx.array:
        own = block.trainable_parameters()
        block.update(parameters)
        try:
            stream, added = block(x, context)
            return stream + added
        finally:
            block.update(own)

    return mx.checkpoint(run)(block.trainable_parameters(), x)


def _group_size(head_size: int, *, bits: int) -> int:
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}, expected 4 or 8, or None for a cache that is not quantised.")
    for size in (128, 64, 32):
        if head_size % size == 0:
            return size
    raise ValueError(f"A quantised cache needs heads of a multiple of 32, but the model's are {head_size} wide.")
