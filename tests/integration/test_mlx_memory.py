"""The forecast of a training step's memory on MLX, against what its allocator counts."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
from anarcho_model import LoraConfig, ModelConfig
from anarcho_model.footprint import training_memory
from anarcho_model.lora.config import adapter_shapes
from anarcho_optim.memory import mlx_scratch_bytes
from anarcho_tokenize import Batch
from anarcho_train import StepSchedule, TrainConfig, TrainingDraws

mx = pytest.importorskip("mlx.core")

SMALL = {"vocab_size": 64, "context_length": 256, "num_layers": 2, "dim": 64, "num_heads": 2, "hidden_dim": 256}


def nothing(model: object, directory: Path) -> None:
    """What saves and loads no model."""


@pytest.mark.parametrize(
    ("shape", "micro_batch", "length", "adapter"),
    [
        ({}, 2, 64, LoraConfig()),
        ({}, 2, 256, LoraConfig()),
        ({"vocab_size": 4096, "num_layers": 1}, 4, 64, LoraConfig()),
        ({"num_layers": 4}, 8, 64, LoraConfig(rank=8)),
        ({"num_layers": 4}, 8, 64, LoraConfig(rank=8, dropout=0.1)),
    ],
    ids=["update", "attention scores", "logits", "adapter", "dropout"],
)
def test_a_step_takes_no_more_than_the_forecast_and_not_much_less(
    shape, micro_batch: int, length: int, adapter
) -> None:
    from anarcho_model.lora.mlx import add_adapter
    from anarcho_model.mlx import GPT
    from anarcho_optim.mlx import MuonAdamW, param_groups
    from anarcho_train.steps.mlx import MlxStep

    config = ModelConfig(**SMALL | shape)
    gc.collect()
    before = mx.get_active_memory()
    model = GPT(config)
    model.init_weights(seed=0)
    if adapter.rank:
        add_adapter(model, adapter, seed=0)
    draws = TrainingDraws(seed=0, dim=config.dim, dropout=True) if adapter.dropout else None
    train = TrainConfig(steps=2, batch_tokens=2 * micro_batch * length, micro_batch=micro_batch, precision="float32")
    optimizer = MuonAdamW(param_groups(model))
    step = MlxStep(model, optimizer, config=train, save_model=nothing, load_model=nothing, draws=draws)
    ids = np.random.default_rng(0).integers(config.vocab_size, size=(micro_batch, length + 1), dtype=np.int32)
    weights = np.ones((micro_batch, length), np.float32)
    batch = Batch(tokens=ids[:, :-1], targets=ids[:, 1:], weights=weights, positions=None, segments=None)
    mx.reset_peak_memory()
    for number in range(2):
        step.train([batch, batch], schedule=StepSchedule(lr_scale=1.0, number=number))
    measured = mx.get_peak_memory() - before
    shapes = adapter_shapes(config, adapter).values()
    matrices = sum(a * b for a, b in shapes) or config.num_parameters - config.vocab_size * config.dim
    forecast = training_memory(
        config,
        micro_batch=micro_batch,
        length=length,
        compute_dtype_bytes=4,
        optimizer_scratch_bytes=mlx_scratch_bytes("cpu", matrices),
        adapter=adapter,
        framework="mlx",
    )
    assert measured <= forecast.total <= 1.7 * measured
