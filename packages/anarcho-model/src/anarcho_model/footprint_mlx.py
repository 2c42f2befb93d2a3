"""What MLX's training step holds in another way than PyTorch's, for `anarcho_model.footprint`; free of any framework.

MLX keeps about the same for backward, so its forecast is the same but for what follows, which is measured where nothing else is said
(MLX 0.32 on a CPU, whose allocator counts exactly). A block's backward holds several copies of a chunk of attention scores, which
PyTorch's kernels never have; a chunk of logits is larger and held in several copies; a checkpointed block's activations overlap with
its neighbours'; and what the optimizer's update needs is free again for the next step. With an adapter, MLX keeps neither the casts of
frozen weights, nor dropout's factors, nor the feed-forward layer's activated gate.

On CUDA, where attention's gradient is a kernel (`anarcho_model.layers.mlx_attention`), there are no scores at all. What a block keeps is
derived from `anarcho_model.layers.mlx` there: norms read and write the compute dtype, and of the feed-forward layer its two factors are
kept alone. 30 to 38 bytes a token and number of the residual stream were measured where ffn = 4 dim; this comes to 34.

Freed buffers that MLX keeps are not counted: they fill what is left, up to a limit that the program sets.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from anarcho_model.config import ModelConfig
from anarcho_model.lora.config import LoraConfig

if TYPE_CHECKING:
    from anarcho_model.footprint import MemoryForecast

FLOAT = 4
"""Bytes of a float32 number."""
MLX_SCORES = 10
"""Copies of a block's attention scores, or of a chunk of them, that its backward holds where there is no kernel for it."""
MLX_SCORES_CHUNK_ELEMENTS = 64 * 2**20
"""Elements of the largest chunk of scores."""
MLX_LOGITS_COPIES = 3.5
"""Float32 copies of a chunk of logits beyond those that PyTorch has."""
MLX_CUDA_LOGITS_COPIES = 0.5
"""The same on CUDA, whose kernels read logits in the compute dtype: with it the reference model's forecast was that of an H100."""
MLX_LOGITS_CHUNK_BYTES = 256 * 2**20
"""The attribute `logits_chunk_bytes` of the MLX model."""
MLX_RECOMPUTED = 2.6
"""Blocks whose recomputed activations exist at a time."""
MLX_ADAPTER_COPIES, MLX_DROPOUT_COPIES = 3, 4
"""Further copies of a feed-forward layer's activations that backward holds with an adapter, and float32 ones with its dropout."""


def is_fused(config: ModelConfig, *, length: int, compute: int, device: str) -> bool:
    """Whether attention's gradient is a kernel, by the conditions of `anarcho_model.layers.mlx_attention.has_fused_gradient`."""
    head = config.head_size
    return device == "cuda" and compute == 2 and head % 8 == 0 and head <= 128 and length % 128 == 0


def mlx_block_bytes(config: ModelConfig, *, compute: int) -> int:
    """Bytes per token that a trained block leaves for backward on CUDA."""
    query, kv = config.num_heads * config.head_size, config.kv_heads * config.head_size
    norm = 2 * compute * config.dim  # input and output
    attention = compute * (3 * query + 2 * kv) + FLOAT * config.num_heads  # q, k, v, result twice; normaliser
    if config.qk_norm:
        attention += compute * (query + kv)
    return 2 * norm + attention + compute * 2 * config.ffn_size


def in_mlx(
    forecast: MemoryForecast,
    config: ModelConfig,
    *,
    micro_batch: int,
    length: int,
    compute: int,
    chunk_bytes: int,
    adapter: LoraConfig | None,
    device: str,
) -> MemoryForecast:
    """The forecast of a step in PyTorch with what MLX does in another way."""
    tokens, trained = micro_batch * length, adapter is None
    fused = is_fused(config, length=length, compute=compute, device=device)
    head = config.vocab_size * config.dim
    chunk = min(max(1, chunk_bytes // (FLOAT * config.vocab_size)), tokens) * config.vocab_size
    logits = min(tokens * config.vocab_size * FLOAT, max(chunk_bytes, config.vocab_size * FLOAT))
    vocabulary = (FLOAT * head if trained else 0) + tokens * config.dim * compute
    if compute == FLOAT:
        vocabulary += FLOAT * chunk
    else:
        product = compute * (chunk + (head if trained else 0))
        vocabulary += compute * head + max((FLOAT + compute) * chunk, product)
    scratch = 3 * tokens * compute * config.ffn_size + (compute + FLOAT) * config.dim * config.ffn_size
    if not fused:
        scratch += MLX_SCORES * compute * min(tokens * config.num_heads * length, MLX_SCORES_CHUNK_ELEMENTS)
    if adapter is not None:
        copies = MLX_ADAPTER_COPIES * compute + (MLX_DROPOUT_COPIES * FLOAT if adapter.dropout else 0)
        scratch += copies * tokens * config.ffn_size
    # A checkpointed block's input is counted with its recomputed activations, too.
    recomputed = forecast.recomputed + (tokens * FLOAT * config.dim if forecast.recomputed else 0)
    waiting = FLOAT * head if config.tie_embeddings and trained else 0
    return replace(
        forecast,
        output_activations=0,
        first_block=0,
        recomputed=int(MLX_RECOMPUTED * recomputed),
        forward_casts=forecast.weight_casts,
        forward_chunk=0,
        norm_scratch=0,
        vocabulary_chunk=vocabulary + int((MLX_CUDA_LOGITS_COPIES if fused else MLX_LOGITS_COPIES) * logits),
        backward_scratch=scratch,
        head_gradient=waiting,
        embedding_gradient=waiting * (2 if forecast.gradients_held else 1),
    )
