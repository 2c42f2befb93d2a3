"""How much memory a training step will take, in closed form, before anything is allocated.

The forecast counts what PyTorch's autograd keeps when `token_logprobs` runs op by op: it is derived tensor by tensor from
`anarcho_model.layers.torch`, and the tests compare it with the tensors that autograd really saves, and with the most that are alive
at a time. A compiled step keeps less. The interpreter, the libraries and the device's context are not in it. With an adapter
(`anarcho_model.lora`) only its weights have gradients and optimizer state; the frozen ones are kept, and in PyTorch their casts
with them. What MLX does in another way is in `anarcho_model.footprint_mlx`, what one of several processes holds in
`anarcho_model.footprint_ranks`.

Notable: a step's peak is not the sum of its parts. Activations are alive before the gradients that replace them, so the
total is the largest of the step's moments. One part is measured rather than derived, `allocator_slack`, and only where tensors lie
in the C library's heap: on a GPU there is none. glibc gives back only blocks of more than 32 MiB by itself, and can often not use the
place of a freed tensor for another of the same size; what that comes to differs from run to run. A process that has large blocks mapped
for themselves (`freed_is_returned`) has hardly any slack: twelve such runs were within 4 % of the forecast.

Units: bytes throughout. dim, query, kv, ffn = widths of the residual stream, of all query heads, of all key heads, of the
feed-forward layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from anarcho_model.config import ModelConfig
from anarcho_model.footprint_mlx import MLX_LOGITS_CHUNK_BYTES, in_mlx, is_fused, mlx_block_bytes
from anarcho_model.footprint_ranks import in_replicas, in_shards
from anarcho_model.logprobs.chunks import chunk_tokens, default_chunk_bytes, keeps_logits
from anarcho_model.lora.config import LoraConfig, adapter_shapes

__all__ = ["MemoryForecast", "block_activation_bytes", "training_memory"]

FLOAT = 4
"""Bytes of a float32 number: weights, gradients, residual stream, norms."""
HEAP_SLACK_SHARE, HEAP_SLACK_BYTES, HEAP_SLACK_RECOMPUTED = 0.6, 700 * 2**20, 1.7
"""Slack of a heap that keeps what is freed: this share of what passes in a step, at most so much, and this of what is recomputed."""
SMALL_SLACK_BYTES = 60 * 2**20
"""Slack of a heap of small blocks alone."""
MPS_SLACK_BYTES, MPS_SLACK_SHARE = 150 * 2**20, 0.3
"""On an Apple GPU, where it is not measured yet: at most so much (or twice what comes and goes), and this share of the weights."""


@dataclass(frozen=True, kw_only=True)
class MemoryForecast:
    """Bytes that training takes, by purpose; `total` is the peak."""

    weights: int
    """Parameters in float32, an adapter's included."""
    gradients: int
    """Gradients of what is trained, in float32 unless they may be narrow."""
    optimizer: int
    """The optimizer's state."""
    optimizer_scratch: int
    """What the optimizer's update needs besides."""
    activations: int
    """Tensors that backward needs, at the end of forward."""
    output_activations: int
    """Of these, what is free again when backward comes to the blocks: the final norm's, and the log-probabilities'."""
    first_block: int
    """What is there when backward comes to the first block: its activations, and the other blocks' gradients if none were held before."""
    recomputed: int
    """With gradient checkpointing: what one block's activations, made anew during backward, take besides."""
    weight_casts: int
    """Copies of the weights in the compute dtype, alive from forward to backward."""
    forward_casts: int
    """The same in forward alone, where a framework keeps them to its end although checkpointed blocks make them again."""
    forward_chunk: int
    """One chunk of logits, and the output layer's cast weights."""
    vocabulary_chunk: int
    """One chunk of logits with its gradient, and the output layer's cast weights and gradient."""
    norm_scratch: int
    """What the final norm's backward needs besides, beyond what is free by then."""
    backward_scratch: int
    """What one block's backward needs besides: gradients of activations and of one matrix."""
    head_gradient: int
    """The output layer's gradient, where it lies beside the others while the blocks' are computed."""
    embedding_gradient: int
    """What lies beside all gradients when the embedding's is made, the last one."""
    checkpoint_copy: int
    """The copy that is made while a checkpoint is written: one tensor, the matrices that an adapter is merged into, or from a
    device the larger file's tensors."""
    background_copy: int
    """The copy of weights and optimizer state that a checkpoint is written from while training goes on, in the same memory."""
    allocator_slack: int
    """Freed memory that the process has not given back; measured, not derived."""
    gradients_held: bool
    """Whether gradients of earlier micro-batches are kept while the next one is computed."""
    gradients_freed: bool = False
    """Whether gradients are used, and gone, as soon as a block's are there; `gradients` are then one block's, or the embedding's."""
    buckets: int = 0
    """What gradients travel in between processes that each have the whole model; when all are there, gradients are parts of it."""
    whole: int = 0
    """Of a model in shards: what is whole from the beginning of a pass to its end."""
    gathered: int = 0
    """Of a model in shards: one block that is whole, and what the next is gathered in."""
    handed_over: int = 0
    """Of a model in shards: one block's whole gradients, and what they are handed over in."""
    held_whole: int = 0
    """Of a model in shards: gradients of earlier micro-batches, where they are held."""
    start: int = 0
    """What a process of several needs before its first step, on top of weights and optimizer state."""
    scratch_kept: bool = False
    """Whether the optimizer's scratch stays with the process from step to step, as in a heap that keeps what is freed."""

    @property
    def total(self) -> int:
        """The peak of a training process, beyond the interpreter and its libraries."""
        scratch = self.optimizer_scratch if self.scratch_kept else 0
        return self.weights + self.optimizer + scratch + self.transient + self.background_copy + self.allocator_slack

    @property
    def before_update(self) -> int:
        """What there is of a step when the optimizer begins its update, or the first part of it."""
        if not self.gradients_freed:
            return self.gradients
        return self.gradients + self.activations + self.weight_casts - self.output_activations + self.head_gradient

    @property
    def transient(self) -> int:
        """The largest moment of a step: what comes and goes on top of weights and optimizer state."""
        around = self.buckets + self.whole + self.gathered
        held = around + ((self.held_whole or self.gradients) if self.gradients_held else 0)
        block = self.recomputed + self.backward_scratch + self.head_gradient + self.handed_over
        saved = self.activations + self.weight_casts
        return max(
            self.activations + self.forward_casts + self.forward_chunk + held,
            saved + self.vocabulary_chunk + held,
            saved + self.norm_scratch + self.head_gradient + held,
            saved - self.output_activations + block + held,
            self.first_block + block + held,
            self.gradients + self.embedding_gradient + self.whole,
            self.before_update + (0 if self.scratch_kept else self.optimizer_scratch),
            (self.gradients if self.whole or self.buckets else 0) + self.checkpoint_copy,
            self.start,
        )


def training_memory(
    config: ModelConfig,
    *,
    micro_batch: int,
    length: int,
    compute_dtype_bytes: int = 2,
    weight_dtype_bytes: int = FLOAT,
    gradient_checkpointing: bool = False,
    narrow_residual: bool = False,
    matrix_optimizer_bytes: int = 4,
    other_optimizer_bytes: int = 8,
    optimizer_scratch_bytes: int = 0,
    logits_chunk_bytes: int | None = None,
    gradients_held: bool = True,
    narrow_gradients: bool = False,
    gradients_freed: bool = False,
    segments: bool = False,
    host_copy: bool = False,
    background_copy: bool = False,
    adapter: LoraConfig | None = None,
    framework: Literal["torch", "mlx"] = "torch",
    device: Literal["cpu", "mps", "cuda"] = "cpu",
    compiled: bool = False,
    freed_is_returned: bool = False,
    shards: int | None = None,
) -> MemoryForecast:
    """Forecast the memory of training steps.

    Args:
        micro_batch: sequences computed at a time.
        length: tokens of a sequence.
        compute_dtype_bytes: 2 for bfloat16 or float16 autocast, 4 for none.
        weight_dtype_bytes: 4, or 2 for weights of the compute dtype.
        gradient_checkpointing: as the model's attribute.
        narrow_residual: as the model's attribute.
        matrix_optimizer_bytes: optimizer state per parameter of the blocks' matrices (Muon: 4, AdamW: 8).
        other_optimizer_bytes: optimizer state per parameter of embeddings, output layer and norms (AdamW: 8).
        optimizer_scratch_bytes: what the optimizer's update needs besides.
        logits_chunk_bytes: as the model's attribute; None is what it is by default.
        gradients_held: whether a step has several micro-batches, or gradients are zeroed in place rather than freed.
        narrow_gradients: whether gradients that are not held stay in the compute dtype where nothing is added to them.
        gradients_freed: whether gradients are used, and gone, within the backward pass, as soon as a block's are there.
        segments: whether documents are isolated by a mask.
        host_copy: whether saving copies from a device into the same memory, as on a Mac.
        background_copy: whether checkpoints are written from a copy in the same memory while training goes on.
        adapter: trained in place of the model's own weights; None, or one of rank 0, trains these.
        framework: whose model it is.
        device: where it computes; `mps` is an Apple GPU in either framework. On `cuda` what is forecast is what the allocator hands out.
        compiled: whether PyTorch's layers are compiled, and not in float8: on `cuda` they have kernels of their own then.
        freed_is_returned: on a CPU, whether large freed blocks go back to the system at once.
        shards: of one of several processes (of PyTorch), into how many the model is parted, 1 where each has all of it; None is a process
            alone. What a process computes at once is still `micro_batch`.

    Raises:
        ValueError: a size is not positive, `compute_dtype_bytes` is neither 2 nor 4, `weight_dtype_bytes` is neither this nor 4, or the
            adapter does not fit.
    """
    _check(micro_batch=micro_batch, length=length)
    if logits_chunk_bytes is None:
        chosen = default_chunk_bytes(micro_batch * length, vocab_size=config.vocab_size, device=device)
        logits_chunk_bytes = chosen if framework == "torch" else MLX_LOGITS_CHUNK_BYTES
    _check(logits_chunk_bytes=logits_chunk_bytes)
    if compute_dtype_bytes not in (2, FLOAT):
        raise ValueError(f"compute_dtype_bytes is {compute_dtype_bytes}, expected 2 or 4.")
    if weight_dtype_bytes not in (compute_dtype_bytes, FLOAT):
        raise ValueError(f"weight_dtype_bytes is {weight_dtype_bytes}, expected 4 or {compute_dtype_bytes}.")
    tokens, compute, stored = micro_batch * length, compute_dtype_bytes, weight_dtype_bytes
    lora = adapter if adapter is not None and adapter.rank else None
    narrow = narrow_gradients and not gradients_held
    gradient = compute if narrow else FLOAT  # a number of a matrix's gradient
    other_gradient = stored if narrow else FLOAT
    head = other_gradient * config.vocab_size * config.dim
    matrices = config.num_layers * _block_matrix_parameters(config)
    added = 0 if lora is None else sum(rows * columns for rows, columns in adapter_shapes(config, lora).values())
    weights = stored * (config.num_parameters + added)
    freed = gradients_freed and not gradients_held
    if lora is None:
        gradients = gradient * matrices + other_gradient * (config.num_parameters - matrices)
        if freed:
            gradients = max(gradient * matrices // config.num_layers, head)
        optimizer = matrix_optimizer_bytes * matrices + other_optimizer_bytes * (config.num_parameters - matrices)
    else:
        gradients = gradient * added
        optimizer = (matrix_optimizer_bytes if lora.optimizer == "muon" else other_optimizer_bytes) * added
    own_copy = stored * config.vocab_size * config.dim
    if lora is not None:
        own_copy = max(own_copy, stored * _target_parameters(config, lora))
    own_kernels = compiled and device == "cuda" and framework == "torch"
    kinds = {"segments": segments and not own_kernels, "adapter": lora, "framework": framework, "device": device}
    block = tokens * block_activation_bytes(config, length=length, compute_dtype_bytes=compute, **kinds)
    logits = 0
    shape = {"vocab_size": config.vocab_size, "chunk_bytes": logits_chunk_bytes}
    if framework == "torch" and keeps_logits(tokens, dtype_bytes=compute, **shape):
        logits = compute * tokens * config.vocab_size
    # Norms keep what they read in float32, whatever the type of the residual stream.
    kept = tokens * (compute if narrow_residual else FLOAT) * config.dim if gradient_checkpointing else block
    fused_norm = device == "cuda" and framework == "torch"
    output = _output_activations(config, tokens=tokens, compute=compute, frozen=lora is not None, fused_norm=fused_norm)
    output += logits
    own_casts = 0 if lora is not None and framework == "mlx" else _block_matrix_parameters(config)
    casts = compute * (own_casts + added // config.num_layers) if compute != stored else 0
    all_casts = config.num_layers * casts
    tied, trained = config.tie_embeddings, lora is None
    later = gradient * (matrices if trained else added) * (config.num_layers - 1) // config.num_layers
    rows = chunk_tokens(tokens, vocab_size=config.vocab_size, chunk_bytes=logits_chunk_bytes)
    forecast = MemoryForecast(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        optimizer_scratch=optimizer_scratch_bytes,
        activations=config.num_layers * kept + output,
        output_activations=output,
        first_block=kept + (0 if gradient_checkpointing else casts) + (0 if gradients_held or freed else later),
        recomputed=block - kept + casts if gradient_checkpointing else 0,
        weight_casts=0 if gradient_checkpointing else all_casts,
        forward_casts=0 if gradient_checkpointing else all_casts,
        forward_chunk=_forward_chunk(config, rows=rows, compute=compute, casts=compute != stored, kept=bool(logits)),
        vocabulary_chunk=_vocabulary_chunk(
            config,
            tokens=tokens,
            rows=rows,
            compute=compute,
            frozen=not trained,
            widens=device == "cpu",
            casts=compute != stored,
        ),
        norm_scratch=tokens * (((2 if fused_norm else 4) * FLOAT - compute) * config.dim - 2 * FLOAT - 16),
        backward_scratch=_backward_scratch(
            config,
            tokens=tokens,
            compute=compute,
            frozen=not trained,
            own=0 if gradients_held else gradient,
            widens=compute != gradient or compute != stored,
            in_place=own_kernels,
        ),
        head_gradient=head if trained and (tied or not gradients_held) else 0,
        embedding_gradient=head * (gradients_held + tied) if trained else 0,
        checkpoint_copy=max(weights, optimizer, own_copy) if host_copy else own_copy,
        background_copy=weights + optimizer if background_copy else 0,
        allocator_slack=0,
        gradients_held=gradients_held,
        gradients_freed=freed,
    )
    if framework == "mlx":
        return in_mlx(
            forecast,
            config,
            micro_batch=micro_batch,
            length=length,
            compute=compute,
            chunk_bytes=logits_chunk_bytes,
            adapter=lora,
            device=device,
        )
    if shards == 1:
        forecast = in_replicas(forecast)
    elif shards is not None:
        own = _block_matrix_parameters(config) + 2 * config.dim + added // config.num_layers
        forecast = in_shards(
            replace(forecast, recomputed=block - kept if gradient_checkpointing else 0),
            config,
            shards=shards,
            block_parameters=own,
            trained_block_parameters=own if lora is None else added // config.num_layers,
            compute=compute,
            cpu=device == "cpu",
        )
    return _with_slack(forecast, device=device, freed_is_returned=freed_is_returned)


def _with_slack(forecast: MemoryForecast, *, device: str, freed_is_returned: bool) -> MemoryForecast:
    """The forecast with what a process holds beyond its tensors; a CUDA allocator's count has none of it."""
    passing = forecast.transient
    if device == "cuda":
        return forecast
    if device == "mps":
        slack = min(MPS_SLACK_BYTES, 2 * passing) + int(MPS_SLACK_SHARE * forecast.weights)
        return replace(forecast, allocator_slack=slack, scratch_kept=True)
    if freed_is_returned:
        return replace(forecast, allocator_slack=min(SMALL_SLACK_BYTES, passing))
    slack = min(HEAP_SLACK_BYTES, int(HEAP_SLACK_SHARE * passing))
    slack += int(HEAP_SLACK_RECOMPUTED * forecast.recomputed)
    return replace(forecast, allocator_slack=slack)


def block_activation_bytes(
    config: ModelConfig,
    *,
    length: int,
    compute_dtype_bytes: int,
    segments: bool = False,
    adapter: LoraConfig | None = None,
    framework: Literal["torch", "mlx"] = "torch",
    device: Literal["cpu", "mps", "cuda"] = "cpu",
) -> int:
    """Bytes per token that one block's forward leaves for its backward."""
    compute, mlx, frozen = compute_dtype_bytes, framework == "mlx", adapter is not None
    if mlx and not frozen and is_fused(config, length=length, compute=compute, device=device):
        return mlx_block_bytes(config, compute=compute)
    fused_norm = device == "cuda" and not mlx
    own = _block_bytes(config, length=length, compute=compute, segments=segments, frozen=frozen, fused_norm=fused_norm)
    return own if adapter is None else own + compute * _adapter_activations(config, adapter, framework)


def _block_bytes(
    config: ModelConfig, *, length: int, compute: int, segments: bool, frozen: bool, fused_norm: bool
) -> int:
    query, kv = config.num_heads * config.head_size, config.kv_heads * config.head_size
    normalised = (
        0 if frozen or fused_norm else FLOAT
    )  # what a norm's own gradient needs; CUDA's kernel computes it again
    norm = (FLOAT + normalised + compute) * config.dim + FLOAT  # input, the same normalised, output; rstd
    attention = compute * 5 * query + FLOAT * config.num_heads  # q, k, v, result twice; normaliser
    if config.qk_norm:
        attention += (FLOAT + normalised) * (query + kv) + FLOAT * (config.num_heads + config.kv_heads)
    if segments:
        attention += compute * length  # the mask as the attention kernel keeps it
    return 2 * norm + attention + compute * 4 * config.ffn_size


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


def _output_activations(config: ModelConfig, *, tokens: int, compute: int, frozen: bool, fused_norm: bool) -> int:
    """What the final norm and the log-probabilities leave for backward, and the ids of the embedding."""
    normalised = 0 if frozen or fused_norm else FLOAT * config.dim
    ids = 8 if frozen else 16
    return tokens * ((FLOAT + compute) * config.dim + normalised + 2 * FLOAT + ids)


def _forward_chunk(config: ModelConfig, *, rows: int, compute: int, casts: bool, kept: bool) -> int:
    """Logits as they come and as they are exponentiated; the former are no part of it where they are ``kept``."""
    chunk, head = rows * config.vocab_size, config.vocab_size * config.dim
    if compute == FLOAT:
        return FLOAT * chunk
    return compute * head * casts + (FLOAT + (0 if kept else compute)) * chunk


def _vocabulary_chunk(
    config: ModelConfig, *, tokens: int, rows: int, compute: int, frozen: bool, widens: bool, casts: bool
) -> int:
    """The larger of the last chunk's two moments in the output layer's backward: logits being widened, gradient being multiplied.

    Where it ``widens``, the matrix product is copied in float32 before it is added to the gradient, as torch does on a CPU.
    """
    chunk, head = rows * config.vocab_size, config.vocab_size * config.dim
    gradient, hidden = (0 if frozen else FLOAT * head), tokens * config.dim * compute
    if compute == FLOAT:
        return gradient + hidden + FLOAT * chunk
    earlier = (tokens - rows) * config.dim * compute
    product = 0 if frozen else (compute + (FLOAT if widens else 0)) * head
    return (
        gradient + compute * head * casts + max((FLOAT + compute) * chunk + earlier, compute * chunk + hidden + product)
    )


def _backward_scratch(
    config: ModelConfig, *, tokens: int, compute: int, frozen: bool, own: int, widens: bool, in_place: bool
) -> int:
    """The largest moment of the feed-forward layer's backward, beyond its activations.

    These are: the last matrix's gradients; its gradient widened, if it is not float32; and the gradients of both factors beside that of
    their product, which lies in the place of the product itself. Where layers compiled for CUDA are trained, that is one place in all,
    ``in_place``. ``own`` are the bytes of a number of a gradient that is new.
    """
    matrix = 0 if frozen else config.dim * config.ffn_size
    product = tokens * compute * config.ffn_size
    cast = tokens * compute * config.dim if compute != FLOAT else 0
    widened = (compute + FLOAT) * matrix if compute != FLOAT and widens else 0
    factors = product if in_place and not frozen else 2 * product
    return tokens * FLOAT * config.dim + max(product + compute * matrix + cast, widened, factors + own * matrix)


def _check(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1.")
