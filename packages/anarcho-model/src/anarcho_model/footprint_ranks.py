"""What one of several processes of PyTorch holds of a training, made of the forecast for one that is alone.

Notable, and measured with gloo on a CPU:

* DistributedDataParallel keeps buckets for all gradients; those of earlier micro-batches lie beside them until the last one, from which
  time on gradients are parts of the buckets. It begins by sending all weights, a quarter of a gigabyte at a time;
* FSDP2 has the embedding, the output layer and the final norm whole from the beginning of a pass to its end, and of the blocks one, beside
  what it or the next one was gathered in. In backward there are that block's gradients besides, what they are handed over in, and over gloo
  a copy of this. Matrices are gathered in the compute dtype, so autocast makes no copies. Gradients of earlier micro-batches stay whole.
* the first process makes a whole copy of the model for a checkpoint, and each begins with a whole one on the CPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from anarcho_model.config import ModelConfig

if TYPE_CHECKING:
    from anarcho_model.footprint import MemoryForecast

FLOAT = 4
BROADCAST_BYTES = 250 * 2**20
"""Weights that DistributedDataParallel sends at a time when it begins."""


def in_replicas(alone: MemoryForecast) -> MemoryForecast:
    """The forecast of a process with the whole model, of several that average their gradients."""
    return replace(alone, buckets=alone.gradients, start=min(alone.weights, BROADCAST_BYTES))


def in_shards(
    alone: MemoryForecast,
    config: ModelConfig,
    *,
    shards: int,
    block_parameters: int,
    trained_block_parameters: int,
    compute: int,
    cpu: bool,
) -> MemoryForecast:
    """The forecast of a process with one of so many ``shards`` of a model, of whose blocks each has so many parameters."""
    trained = trained_block_parameters == block_parameters
    heads = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    head = FLOAT * config.vocab_size * config.dim
    handed_over = FLOAT * (2 if cpu else 1)  # Over gloo, with a copy.
    casts = alone.weight_casts // config.num_layers
    block_gradients = FLOAT * trained_block_parameters
    later = 0 if alone.gradients_held else block_gradients * (config.num_layers - 1)
    return replace(
        alone,
        weights=alone.weights // shards,
        gradients=alone.gradients // shards,
        optimizer=alone.optimizer // shards,
        held_whole=alone.gradients,
        whole=FLOAT * (heads + config.dim),
        gathered=2 * compute * block_parameters,
        handed_over=trained_block_parameters * (compute + handed_over),
        weight_casts=0,
        forward_casts=0,
        first_block=alone.first_block - casts - later + later // shards,
        head_gradient=head if trained else 0,
        embedding_gradient=2 * head + handed_over * heads if trained else 0,
        checkpoint_copy=alone.weights if cpu else head,
        start=max(0, alone.weights + head - (alone.weights + alone.optimizer) // shards) if cpu else 0,
    )
