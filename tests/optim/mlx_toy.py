"""A tiny language model in MLX and what it takes to train it a few steps, for the tests of the optimizers."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
from mlx.utils import tree_flatten


class FeedForward(nn.Module):
    """A matrix of each orientation and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 24)
        self.down = nn.Linear(24, 8, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down(mx.tanh(self.up(x)))


class TinyModel(nn.Module):
    """A tied embedding, two layers and a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.layers = [FeedForward() for _ in range(2)]
        self.norm = nn.RMSNorm(8)

    def __call__(self, tokens: mx.array) -> mx.array:
        h = self.embedding(tokens)
        for layer in self.layers:
            h = h + layer(h)
        return self.embedding.as_linear(self.norm(h))


def tiny_model() -> TinyModel:
    mx.random.seed(0)
    model = TinyModel()
    mx.eval(model.parameters())
    return model


def loss(model: nn.Module, tokens: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")


def tokens(seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, 20, (4, 6)))


def train(model: nn.Module, optimizer: mlx.optimizers.Optimizer, seeds: Iterable[int]) -> None:
    for seed in seeds:
        _, gradients = nn.value_and_grad(model, loss)(model, tokens(seed))
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)


def flat(tree) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


def same(first, second) -> bool:
    """Whether two trees have the same names and bits."""
    first, second = flat(first), flat(second)
    return first.keys() == second.keys() and all(mx.array_equal(first[k], second[k]).item() for k in first)
