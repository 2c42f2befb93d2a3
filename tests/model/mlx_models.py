"""The small PyTorch models of this folder as MLX models with the same weights, and batches for both."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from anarcho_model.mlx import GPT
from anarcho_model.torch import GPT as TorchGPT
from anarcho_model.weights import save_pretrained
from anarcho_model.weights_mlx import load_pretrained
from mlx.utils import tree_flatten

mx.set_default_device(mx.cpu)


def converted(model: TorchGPT, directory: Path) -> GPT:
    """The same model in MLX, by way of its file."""
    save_pretrained(model, directory, eos_token_id=1, pad_token_id=2)
    return load_pretrained(directory)


def sample(model: GPT | TorchGPT, *, batch: int = 2, length: int = 23, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and their targets."""
    tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size, (batch, length + 1), dtype=np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model: GPT, loss, *arrays: mx.array) -> tuple[float, dict[str, np.ndarray]]:
    """Value and gradients of a loss by parameter name."""
    value, grads = nn.value_and_grad(model, loss)(*arrays)
    return value.item(), {name: np.array(grad) for name, grad in tree_flatten(grads)}


def torch_gradients(model: TorchGPT, loss: torch.Tensor) -> dict[str, np.ndarray]:
    """Gradients of a loss by parameter name."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return {name: grad.numpy() for name, grad in zip(names, torch.autograd.grad(loss, parameters), strict=True)}


def assert_same_gradients(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], *, relative: float) -> None:
    """Each gradient is near the other one, in units of its largest element."""
    assert set(found) == set(expected) != set()
    for name, gradient in expected.items():
        assert np.abs(found[name] - gradient).max() <= relative * np.abs(gradient).max(), name
