"""How much memory a training step will take, in closed form, before anything is allocated.

The forecast counts what PyTorch's autograd keeps when `token_logprobs` runs op by op: it is derived tensor by tensor from
`anarcho_model.layers.torch`, and the tests compare it with the tensors that autograd really saves. A compiled step keeps
less. The interpreter, the libraries and the device's context are not in it. With an adapter (`anarcho_model.lora`) only its
weights have gradients and optimizer state; the frozen ones are kept, and in PyTorch their casts with them.

Notable: a step's peak is not the sum of its parts. Activations are alive before the gradients that replace them, so the
total is the largest of the step's moments. One part is measured rather than derived, `allocator_slack`: the C library
returns only blocks over 32 MiB to the system, and a process keeps the freed smaller ones. With that switched off
(`MALLOC_MMAP_THRESHOLD_=262144`) steps of the reference model took 2 to 6 % more than the derived parts.

MLX keeps about the same for backward, so its forecast is the same but for four things, which are measured (MLX 0.32 on a
CPU, where its allocator counts exactly): a block's backward holds several copies of a chunk of attention scores, which
PyTorch's kernels never have; a chunk of logits is larger and held in several copies; a checkpointed block's activations
overlap with its neighbours'; and what the optimizer's update needs is free again for the next step. With an adapter, MLX keeps
neither the casts of frozen weights, nor dropout's factors, nor the feed-forward layer's activated gate. Freed buffers that
MLX keeps are not counted: they fill what is left, up to a limit that the program sets.

Units: bytes throughout. dim, query, kv, ffn = widths of the residual stream, of all query heads, of all key heads, of the
feed-forward layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from anarcho_model.config import ModelConfig
from anarcho_model.lora.config import LoraConfig, adapter_shapes

__all__ = ["MemoryForecast", "block_activation_bytes", "training_memory"]

FLOAT = 4
"""Bytes of a float32 number: weights, gradients, residual stream, norms."""
SLACK_BYTES, SLACK_SHARE = 150 * 2**20, 0.3
"""Allocator slack: at most this (twice the step's passing tensors if that is less), and this share of the weights.
Measured with glibc over six eager runs (5 and 138 million parameters, both precisions, with and without checkpointing)."""

MLX_SCORES = 10
"""Copies of a block's attention scores, or of a chunk of them, that its backward in MLX holds where there is no kernel for it."""
MLX_SCORES_CHUNK_ELEMENTS = 64 * 2**20
"""Elements of the largest chunk of scores in MLX."""
MLX_LOGITS_COPIES = 3.5
"""Float32 copies of a chunk of logits in MLX beyond those that PyTorch has."""
MLX_LOGITS_CHUNK_BYTES = 256 * 2**20
"""The attribute `logits_chunk_bytes` of the MLX model."""
MLX_RECOMPUTED = 2.6
"""Blocks whose recomputed activations MLX holds at a time."""
MLX_ADAPTER_COPIES, MLX_DROPOUT_COPIES = 3, 4
"""Further copies of a feed-forward layer's activations that backward in MLX holds with an adapter, and float32 ones with its dropout."""


@dataclass(frozen=True, kw_only=True)
class MemoryForecast:
    """Bytes that training takes, by purpose; `total` is the peak."""

    weights: int
    """Parameters in float32, an adapter's included."""
    gradients: int
    """Gradients in float32, of what is trained."""
    optimizer: int
    """The optimizer's state."""
    optimizer_scratch: int
    """What the optimizer's update needs besides; counted throughout, because allocators keep it from step to step."""
    activations: int
    """Tensors that backward needs, at the end of forward."""
    recomputed: int
    """With gradient checkpointing: one block's activations, made anew during backward."""
    weight_casts: int
    """Copies of the weights in the compute dtype, alive from forward to backward."""
    vocabulary_chunk: int
    """One chunk of logits with its gradient, and the output layer's cast weights and gradient."""
    backward_scratch: int
    """What one block's backward needs besides: gradients of activations and of one matrix."""
    embedding_gradient: int
    """The part of the embedding's gradient that waits for the other one, when the output layer is tied to it."""
    checkpoint_copy: int
    """The copy that is made while a checkpoint is written: one tensor, the matrices that an adapter is merged into, or from a
    device the larger file's tensors."""
    background_copy: int
    """The copy of weights and optimizer state that a checkpoint is written from while training goes on, in the same memory."""
    allocator_slack: int
    """Freed memory that the process has not given back; measured, not derived."""
    gradients_held: bool
    """Whether gradients of earlier micro-batches are kept while the next one is computed."""
    scratch_kept: bool = True
    """Whether the allocator keeps the optimizer's scratch from step to step, as PyTorch's do; MLX's gives it to what comes next."""

    @property
    def total(self) -> int:
        """The peak of a training process, beyond the interpreter and its libraries."""
        scratch = self.optimizer_scratch if self.scratch_kept else 0
        return self.weights + self.optimizer + scratch + self.transient + self.background_copy + self.allocator_slack

    @property
    def transient(self) -> int:
        """The largest moment of a step: what comes and goes on top of weights and optimizer state."""
        held = self.gradients if self.gradients_held else 0
        saved = self.activations + self.weight_casts
        return max(
            saved + self.vocabulary_chunk + held,
            saved + self.recomputed + self.backward_scratch + self.embedding_gradient + held,
            self.gradients + self.embedding_gradient * (2 if self.gradients_held else 1),
            self.gradients + (0 if self.scratch_kept else self.optimizer_scratch),
            self.checkpoint_copy,
        )


def training_memory(
    config: ModelConfig,
    *,
    micro_batch: int,
    length: int,
    compute_dtype_bytes: int = 2,
    gradient_checkpointing: bool = False,
    matrix_optimizer_bytes: int = 4,
    other_optimizer_bytes: int = 8,
    optimizer_scratch_bytes: int = 0,
    logits_chunk_bytes: int | None = None,
    gradients_held: bool = True,
    segments: bool = False,
    host_copy: bool = False,
    background_copy: bool = False,
    adapter: LoraConfig | None = None,
    framework: Literal["torch", "mlx"] = "torch",
) -> MemoryForecast:
    """Forecast the memory of training steps, with float32 weights and gradients.

    Args:
        micro_batch: sequences computed at a time.
        length: tokens of a sequence.
        compute_dtype_bytes: 2 for bfloat16 or float16 autocast, 4 for none.
        gradient_checkpointing: as the model's attribute.
        matrix_optimizer_bytes: optimizer state per parameter of the blocks' matrices (Muon: 4, AdamW: 8).
        other_optimizer_bytes: optimizer state per parameter of embeddings, output layer and norms (AdamW: 8).
        optimizer_scratch_bytes: what the optimizer's update needs besides.
        logits_chunk_bytes: as the model's attribute; None is what it is by default.
        gradients_held: whether a step has several micro-batches, or gradients are zeroed in place rather than freed.
        segments: whether documents are isolated by a mask.
        host_copy: whether saving copies from a device into the same memory, as on a Mac.
        background_copy: whether checkpoints are written from a copy in the same memory while training goes on.
        adapter: trained in place of the model's own weights; None, or one of rank 0, trains these.
        framework: whose model it is.

    Raises:
        ValueError: a size is not positive, `compute_dtype_bytes` is neither 2 nor 4, or the adapter does not fit.
    """
    if logits_chunk_bytes is None:
        logits_chunk_bytes = 64 * 2**20 if framework == "torch" else MLX_LOGITS_CHUNK_BYTES
    _check(micro_batch=micro_batch, length=length, logits_chunk_bytes=logits_chunk_bytes)
    if compute_dtype_bytes not in (2, FLOAT):
        raise ValueError(f"compute_dtype_bytes is {compute_dtype_bytes}, expected 2 or 4.")
    tokens, compute = micro_batch * length, compute_dtype_bytes
    lora = adapter if adapter is not None and adapter.rank else None
    cast = compute != FLOAT
    head = config.vocab_size * config.dim
    matrices = config.num_layers * _block_matrix_parameters(config)
    added = 0 if lora is None else sum(rows * columns for rows, columns in adapter_shapes(config, lora).values())
    weights = FLOAT * (config.num_parameters + added)
    if lora is None:
        gradients = weights
        optimizer = matrix_optimizer_bytes * matrices + other_optimizer_bytes * (config.num_parameters - matrices)
    else:
        gradients = FLOAT * added
        optimizer = (matrix_optimizer_bytes if lora.optimizer == "muon" else other_optimizer_bytes) * added
    per_token = block_activation_bytes(
        config,
        length=length,
        compute_dtype_bytes=compute,
        segments=segments,
        adapter=lora,
        framework=framework,
    )
    block = tokens * per_token
    kept_casts = 0 if lora is not None and framework == "mlx" else _block_matrix_parameters(config)
    block_casts = compute * (kept_casts + added // config.num_layers) if cast else 0
    kept_per_block = tokens * FLOAT * config.dim if gradient_checkpointing else block
    final = tokens * (2 * FLOAT * config.dim + compute * config.dim + 2 * FLOAT + 16)
    if lora is not None:  # neither the normalised input nor the ids of the embedding are kept
        final -= tokens * (FLOAT * config.dim + 8)
    vocabulary = _vocabulary_chunk(
        config, tokens=tokens, compute=compute, chunk_bytes=logits_chunk_bytes, frozen=lora is not None
    )
    own_copy = FLOAT * (head if lora is None else max(head, _target_parameters(config, lora)))
    forecast = MemoryForecast(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        optimizer_scratch=optimizer_scratch_bytes,
        activations=config.num_layers * kept_per_block + final,
        recomputed=block + block_casts if gradient_checkpointing else 0,
        weight_casts=0 if gradient_checkpointing else config.num_layers * block_casts,
        vocabulary_chunk=vocabulary,
        backward_scratch=3 * tokens * compute * config.ffn_size + (compute + FLOAT) * config.dim * config.ffn_size,
        embedding_gradient=FLOAT * head if config.tie_embeddings and lora is None else 0,
        checkpoint_copy=max(weights, optimizer, own_copy) if host_copy else own_copy,
        background_copy=weights + optimizer if background_copy else 0,
        allocator_slack=0,
        gradients_held=gradients_held,
    )
    if framework == "mlx":
        forecast = _in_mlx(
            forecast, config, tokens=tokens, length=length, compute=compute, chunk_bytes=logits_chunk_bytes
        )
        if lora is None:
            return forecast
        copies = MLX_ADAPTER_COPIES * compute + (MLX_DROPOUT_COPIES * FLOAT if lora.dropout else 0)
        return replace(forecast, backward_scratch=forecast.backward_scratch + copies * tokens * config.ffn_size)
    slack = min(SLACK_BYTES, 2 * forecast.transient) + int(SLACK_SHARE * weights)
    return replace(forecast, allocator_slack=slack)


def _in_mlx(
    forecast: MemoryForecast, config: ModelConfig, *, tokens: int, length: int, compute: int, chunk_bytes: int
) -> MemoryForecast:
    """The forecast with what MLX does in another way; see above."""
    scores = min(tokens * config.num_heads * length, MLX_SCORES_CHUNK_ELEMENTS)
    logits = min(tokens * config.vocab_size * FLOAT, max(chunk_bytes, config.vocab_size * FLOAT))
    return replace(
        forecast,
        backward_scratch=forecast.backward_scratch + MLX_SCORES * compute * scores,
        vocabulary_chunk=forecast.vocabulary_chunk + int(MLX_LOGITS_COPIES * logits),
        recomputed=int(MLX_RECOMPUTED * forecast.recomputed),
        scratch_kept=False,
    )


def block_activation_bytes(
    config: ModelConfig,
    *,
    length: int,
    compute_dtype_bytes: int,
    segments: bool = False,
    adapter: LoraConfig | None = None,
    framework: Literal["torch", "mlx"] = "torch",
) -> int:
    """Bytes per token that one block's forward leaves for its backward."""
    query, kv = config.num_heads * config.head_size, config.kv_heads * config.head_size
    normalised = FLOAT if adapter is None else 0  # input that a norm's own gradient needs
    norm = (FLOAT + normalised + compute_dtype_bytes) * config.dim + FLOAT  # input, the same normalised, output; rstd
    attention = compute_dtype_bytes * 5 * query + FLOAT * config.num_heads  # q, k, v, result twice; normaliser
    if config.qk_norm:
        attention += (FLOAT + normalised) * (query + kv) + FLOAT * (config.num_heads + config.kv_heads)
    if segments:
        attention += compute_dtype_bytes * length  # the mask as the attention kernel keeps it
    own = 2 * norm + attention + compute_dtype_bytes * 4 * config.ffn_size
    return own if adapter is None else own + compute_dtype_bytes * _adapter_activations(config, adapter, framework)


def _adapter_activations(config: ModelConfig, lora: LoraConfig, framework: Literal["torch", "mlx"]) -> int:
    """Numbers per token that an adapter adds to a block's activations, less what no frozen matrix needs."""
    torch = framework == "torch"
    inputs = {"o": config.num_heads * config.head_size, "down": config.ffn_size}
    added = lora.rank * len(lora.targets)  # what A makes of its input
    if lora.dropout:  # what it leaves, and its factors
        added += (2 if torch else 1) * sum(inputs.get(target, config.dim) for target in lora.targets)
    if not torch:  # silu(gate)
        added -= config.ffn_size
    for readers in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)):
        if lora.dropout or not set(readers) & set(lora.targets):
            added -= inputs.get(readers[0], config.dim)
    return added


def _target_parameters(config: ModelConfig, lora: LoraConfig) -> int:
    """Numbers in the matrices that an adapter is added to."""
    shapes = config.tensor_shapes().items()
    return sum(math.prod(shape) for name, shape in shapes if lora.is_target(name.removesuffix(".weight")))


def _block_matrix_parameters(config: ModelConfig) -> int:
    query, kv = config.num_heads * config.head_size, config.kv_heads * config.head_size
    return config.dim * (2 * query + 2 * kv + 3 * config.ffn_size)


def _vocabulary_chunk(config: ModelConfig, *, tokens: int, compute: int, chunk_bytes: int, frozen: bool) -> int:
    """The larger of the two moments of the output layer's backward: logits being widened, gradient being multiplied."""
    chunk = min(max(1, chunk_bytes // (FLOAT * config.vocab_size)), tokens) * config.vocab_size
    head = config.vocab_size * config.dim
    gradient = (0 if frozen else FLOAT * head) + tokens * config.dim * compute
    if compute == FLOAT:
        return gradient + FLOAT * chunk
    return gradient + compute * head + max((FLOAT + compute) * chunk, compute * (chunk + (0 if frozen else head)))


def _check(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1.")
