"""Does a device compute right? Matrix products, attention and a model's log-probabilities against float64.

GPU back-ends have returned wrong numbers without an error, for inputs that are not contiguous above all (PyTorch issue
162779), so `anarcho doctor` compares each device with a float64 reference on the CPU. It takes well under a second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

TOLERANCE = 1e-3
"""Largest absolute error that float32 may show here, where all results are of order 1; TF32 and bfloat16 exceed it."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One computation on one device."""

    device: str
    """Device that computed."""
    name: str
    """What was computed."""
    max_error: float
    """Largest absolute difference from the float64 reference; NaN where a result is not finite."""

    @property
    def passed(self) -> bool:
        """Whether the error is within float32's reach; False for NaN."""
        return self.max_error <= TOLERANCE


def torch_checks(device: str) -> list[Check]:
    """The self-test on a torch device (`cpu`, `mps`, `cuda`); a device that fails to compute raises RuntimeError."""
    import torch
    import torch.nn.functional as F

    def there(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.float32)).to(device)

    a, b = _matrices()
    q, k, v = _heads()
    product = there(a) @ there(b)
    strided = F.linear(there(a.T.copy()).T, there(b.T.copy()))
    mixed = F.scaled_dot_product_attention(there(q), there(k), there(v), is_causal=True)
    return [
        _check(device, "matmul", product.cpu().numpy(), a @ b),
        _check(device, "linear, not contiguous", strided.cpu().numpy(), a @ b),
        _check(device, "attention", mixed.cpu().numpy(), causal_attention(q, k, v)),
        Check(device=device, name="token_logprobs", max_error=_logprobs_error(device)),
    ]


def mlx_checks() -> list[Check]:
    """The self-test on MLX's default device."""
    import mlx.core as mx

    def there(array: np.ndarray) -> Any:
        return mx.array(array.astype(np.float32))

    a, b = _matrices()
    q, k, v = _heads()
    scale = 1 / math.sqrt(q.shape[-1])
    mixed = mx.fast.scaled_dot_product_attention(there(q), there(k), there(v), scale=scale, mask="causal")
    return [
        _check("mlx", "matmul", np.array(there(a) @ there(b)), a @ b),
        _check("mlx", "attention", np.array(mixed), causal_attention(q, k, v)),
    ]


def causal_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal softmax attention of arrays (batch, heads, length, head), in their own precision."""
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def _logprobs_error(device: str) -> float:
    """Largest error of a small GPT's log-probabilities on ``device`` against the same GPT in float64 on the CPU."""
    import torch
    from anarcho_model import InitConfig, ModelConfig
    from anarcho_model.torch import GPT

    config = ModelConfig(vocab_size=503, context_length=64, num_layers=2, dim=64, num_heads=4, num_kv_heads=2)
    model = GPT(config)
    model.init_weights(seed=0, init=InitConfig(embedding_std=0.3, zero_residual_outputs=False))
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, config.vocab_size, size=(2, 65)))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    with torch.no_grad():
        found = model.to(device).token_logprobs(inputs.to(device), targets.to(device)).cpu()
        logits = model.to("cpu").double()(inputs)
    expected = logits.log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]
    return _max_error(found.numpy(), expected.numpy())


def _matrices() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.standard_normal((96, 256)) / 16, random.standard_normal((256, 80))


def _heads() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q, k, v = np.random.default_rng(1).standard_normal((3, 2, 4, 64, 32))
    return q, k, v


def _check(device: str, name: str, found: np.ndarray, expected: np.ndarray) -> Check:
    return Check(device=device, name=name, max_error=_max_error(found, expected))


def _max_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found.astype(np.float64) - expected).max())
