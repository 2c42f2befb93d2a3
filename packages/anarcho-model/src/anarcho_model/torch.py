"""The GPT in PyTorch: pre-norm RMSNorm, rotary causal attention, SwiGLU, no biases, output layer tied to the embedding.

Notable:

* parameters have Hugging Face's names and layout (Llama; Qwen3 with QK-norm), rotary embeddings turn the two halves of
  a head;
* the residual stream and every norm are float32 (at least) under autocast; a norm hands its result on in the compute
  dtype, once for all of its readers;
* every linear layer reads a contiguous two-dimensional tensor, because Apple's back-end has computed others wrong
  without an error;
* `token_logprobs` is all that a trainer needs, and never holds the logits whole (see `anarcho_model.logprobs.torch`).

Shapes: batch, length = sequences and tokens; dim = width of the residual stream; heads, kv = query and key/value heads;
    head = width of one head.
Sources: Llama (arXiv:2302.13971), SwiGLU (arXiv:2002.05202), GQA (arXiv:2305.13245), RoPE (arXiv:2104.09864), QK-norm
    (arXiv:2010.04245).
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anarcho_model.config import InitConfig, ModelConfig
from anarcho_model.errors import ContextError
from anarcho_model.layers import torch_documents
from anarcho_model.layers.torch import AttentionContext, Block, LayerCache, RMSNorm, RotaryTables, compute_dtype, widen
from anarcho_model.logprobs.chunks import default_chunk_bytes
from anarcho_model.logprobs.torch import chunked_logprobs

if TYPE_CHECKING:
    from anarcho_model.lora.torch import Adapter

__all__ = ["GPT", "ContextError", "KVCache"]


class KVCache:
    """Keys and values of the tokens read so far, for decoding without reading them again.

    Each row has its own length, so that prompts of different lengths decode together: fill the cache with prompts
    padded on the right, then set `lengths` to the true ones; what lies beyond a row's length is never attended to and
    is overwritten as the row grows.
    """

    def __init__(self, model: GPT, *, batch: int, capacity: int) -> None:
        config, weight = model.config, model.head_weight
        if capacity > config.context_length:
            raise ContextError(
                f"A cache of {capacity} tokens was asked for, but the model's context is {config.context_length}."
            )
        shape = (batch, config.kv_heads, capacity, config.head_size)
        dtype = compute_dtype(weight)
        stores = [torch.zeros(shape, device=weight.device, dtype=dtype) for _ in range(2 * config.num_layers)]
        self.layers = [LayerCache(*pair) for pair in zip(stores[::2], stores[1::2], strict=True)]
        self.lengths = torch.zeros(batch, dtype=torch.long, device=weight.device)
        self.capacity = capacity

    def select(self, rows: Sequence[int]) -> KVCache:
        """A cache of these rows alone, in this order, over the same storage, with lengths of its own.

        Rows that follow each other are read where they lie; others are copied for each reading.
        """
        view = copy.copy(self)
        index = torch.tensor(rows, device=self.lengths.device)
        view.lengths = self.lengths[index]
        first, stop = rows[0], rows[0] + len(rows)
        if list(rows) == list(range(first, stop)):
            view.layers = [LayerCache(layer.keys[first:stop], layer.values[first:stop]) for layer in self.layers]
        else:
            view.layers = [LayerCache(layer.keys, layer.values, rows=index) for layer in self.layers]
        return view

    def next_positions(self, length: int) -> Int[Tensor, "batch length"]:
        """Positions of `length` new tokens a row; ContextError if the longest row has no room for them."""
        used = int(self.lengths.max())
        if used + length > self.capacity:
            raise ContextError(f"The cache holds {used} of {self.capacity} tokens, so {length} more do not fit.")
        return self.lengths[:, None] + torch.arange(length, device=self.lengths.device)


class Decoder(nn.Module):
    """The modules under Hugging Face's prefix `model.`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.rotary = RotaryTables(config)


class GPT(nn.Module):
    """A decoder-only language model. A new one needs `init_weights` before training, or `weights.load_weights`."""

    gradient_checkpointing: bool = False
    """Keep only each block's input for backward and compute the rest again: less memory for about a third more time."""
    logits_chunk_bytes: int | None = None
    """Bound of the float32 logits that `token_logprobs` holds at a time; None is what suits the device."""
    narrow_residual: bool = False
    """Keep the residual stream in the compute dtype: a twentieth faster on an H100, at the price of rounding it in every block."""
    float8: bool = False
    """Multiply in 8-bit floats when training, compiled for CUDA, in bfloat16, where that is faster: see `layers.torch_float8`."""
    adapter: Adapter | None = None
    """The low-rank adapter that `anarcho_model.lora.torch.add_adapter` has given it."""
    compiled_parts: str | None = None
    """The backend of torch.compile that `compile_parts` has compiled it with."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Float[Tensor, "vocab dim"]:
        """The output layer's weights: the embedding's, unless they are untied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @torch.no_grad()
    def init_weights(self, *, seed: int, init: InitConfig | None = None) -> None:
        """Draw all weights anew; the same seed gives the same weights on every device.

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
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(init.gain(name))
                continue
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            draw = torch.randn(parameter.shape, generator=generator, device="cpu")
            parameter.copy_(draw.mul_(init.std(name, parameter.shape, num_layers=self.config.num_layers)))

    def hidden_states(
        self,
        tokens: Int[Tensor, "batch length"],
        *,
        positions: Int[Tensor, "batch length"] | None = None,
        segments: Int[Tensor, "batch length"] | None = None,
        cache: KVCache | None = None,
        embedding_noise: Float[Tensor, "batch length dim"] | None = None,
        dropout_keys: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch length dim"]:
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
        x = self.model.embed_tokens(tokens)
        x = x.to(compute_dtype(x)) if self.narrow_residual else widen(x)
        if embedding_noise is not None:
            x = x + embedding_noise
        for index, block in enumerate(self.model.layers):
            layer_cache = None if cache is None else cache.layers[index]
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, context, layer_cache, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, context, layer_cache)
        if cache is not None:
            cache.lengths += tokens.shape[1]
        return self.model.norm(x)

    def product_weights(self) -> list[Tensor]:
        """The weights with a gradient that one product in the compute dtype makes, under autocast: it is no more precise than that."""
        linear = (module for module in self.model.layers.modules() if isinstance(module, nn.Linear))
        return [module.weight for module in linear if module.weight.requires_grad]

    def update_parts(self) -> list[list[Tensor]]:
        """The weights whose gradients become whole at about the same time: a block's, and all others each by itself."""
        blocks: list[list[Tensor]] = [list(block.parameters()) for block in self.model.layers]
        known = {id(parameter) for block in blocks for parameter in block}
        return [*blocks, *([p] for p in self.parameters() if id(p) not in known)]

    def compile_parts(self, backend: str | None = "inductor") -> None:
        """Compile each block, and the log-probabilities, by itself, with a backend of torch.compile; None takes that back.

        Compared with a model that is compiled whole, a block's gradients leave it before the next block's are computed, which
        saves memory with `gradient_checkpointing`; and what is compiled once serves all blocks.
        """
        self.compiled_parts = backend
        for block in self.model.layers:
            if backend is None:
                block._compiled_call_impl = None
            else:
                block.compile(dynamic=False, backend=backend)

    def unembed(self, hidden: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape vocab"]:
        """Logits of hidden states, in the compute dtype."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return F.linear(flat, self.head_weight).view(*hidden.shape[:-1], -1)

    def forward(
        self,
        tokens: Int[Tensor, "batch length"],
        *,
        positions: Int[Tensor, "batch length"] | None = None,
        segments: Int[Tensor, "batch length"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch length vocab"]:
        """Logits of the next token at every position, in the compute dtype; arguments and errors as in `hidden_states`."""
        return self.unembed(self.hidden_states(tokens, positions=positions, segments=segments, cache=cache))

    def token_logprobs(
        self,
        tokens: Int[Tensor, "batch length"],
        targets: Int[Tensor, "batch length"],
        *,
        positions: Int[Tensor, "batch length"] | None = None,
        segments: Int[Tensor, "batch length"] | None = None,
        embedding_noise: Float[Tensor, "batch length dim"] | None = None,
        dropout_keys: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch length"]:
        """Log-probability in nats of each target after its token and all before it: float32, differentiable once.

        Every target must be a valid id; positions that do not count are weighted with 0 by the caller. At most
        `logits_chunk_bytes` of float32 logits exist at a time, in forward and in backward; compiled, all exist in the compute dtype
        between the two. Arguments and errors otherwise as in
        `hidden_states`.
        """
        hidden = self.hidden_states(
            tokens,
            positions=positions,
            segments=segments,
            embedding_noise=embedding_noise,
            dropout_keys=dropout_keys,
        )
        logprobs_of = chunked_logprobs if self.compiled_parts is None else _compiled_logprobs(self.compiled_parts)
        logprobs = logprobs_of(
            hidden.reshape(-1, hidden.shape[-1]),
            self.head_weight,
            targets.reshape(-1),
            compute_dtype=compute_dtype(self.head_weight),
            chunk_bytes=self.chunk_bytes(targets.numel()),
            limit=self.model.norm.limit() if self.float8 else None,
        )
        return logprobs.view(tokens.shape)

    def chunk_bytes(self, num_tokens: int) -> int:
        """Bound of the float32 logits of so many tokens: `logits_chunk_bytes`, or what suits the device."""
        if self.logits_chunk_bytes is not None:
            return self.logits_chunk_bytes
        weight = self.head_weight
        return default_chunk_bytes(num_tokens, vocab_size=weight.shape[0], device=weight.device.type)

    def _attention_context(
        self, length: int, positions: Tensor | None, segments: Tensor | None, cache: KVCache | None
    ) -> AttentionContext:
        if length > self.config.context_length:
            raise ContextError(
                f"A sequence of {length} tokens was given, but the model's context is {self.config.context_length}."
            )
        if cache is not None:
            if positions is not None or segments is not None:
                raise ValueError("positions and segments must be None with a cache, which decides the positions.")
            positions = cache.next_positions(length)
            extent = int(positions.max()) + 1
            mask = torch.arange(extent, device=positions.device) <= positions[:, None, :, None]
            cos, sin = self.model.rotary(positions, length=length)
            return AttentionContext(cos=cos, sin=sin, mask=mask, positions=positions, extent=extent)
        cos, sin = self.model.rotary(positions, length=length)
        mask = documents = None
        compiled = torch.compiler.is_compiling() or self.compiled_parts is not None
        if segments is not None and torch_documents.suits(segments, head_size=self.config.head_size, compiled=compiled):
            documents = torch_documents.document_blocks(segments)
        elif segments is not None:
            causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
            mask = (segments[:, None, :, None] == segments[:, None, None, :]) & causal
        return AttentionContext(cos=cos, sin=sin, mask=mask, documents=documents, float8=self.float8)


@functools.cache
def _compiled_logprobs(backend: str) -> Callable[..., Tensor]:
    """`chunked_logprobs`, compiled for itself."""
    return torch.compile(chunked_logprobs, dynamic=False, backend=backend)
