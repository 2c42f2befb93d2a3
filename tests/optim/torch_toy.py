"""A small model with a parameter of every kind, and gradients for it that depend on nothing but the weights and the step."""

from __future__ import annotations

from typing import Any

import torch
from anarcho_optim import OptimConfig
from anarcho_optim.torch import MuonAdamW, param_groups
from torch import Tensor, nn

VOCABULARY, WIDTH = 20, 8


class Toy(nn.Module):
    """A tied embedding, two convolutions, one depthwise, a fused weight, two matrices of one shape, a single row, gains and biases."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.depthwise = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.norm = nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.first = nn.Linear(2 * WIDTH, WIDTH)
        self.second = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, 1, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens).mT
        h = self.norm((h + self.depthwise(self.conv(h).tanh())).mT)
        h = h + (self.first(self.qkv(h).tanh()) * self.second(self.qkv(h))).tanh() * self.gate(h).sigmoid()
        return self.head(h)


SPLITS: dict[str, tuple[int, ...]] = {"qkv.weight": (8, 4, 4)}


def toy(seed: int = 0, **options: Any) -> Toy:
    torch.manual_seed(seed)
    return Toy(**options)


def toy_optimizer(
    model: nn.Module, *, splits: dict[str, tuple[int, ...]] = SPLITS, process_group: Any = None, **options: Any
) -> MuonAdamW:
    """`MuonAdamW` with ``options`` of `OptimConfig`, in float32 unless they say otherwise."""
    config = OptimConfig(**{"lr": 0.02, "adamw_weight_decay": 0.1, "ns_dtype": "float32"} | options)
    return MuonAdamW(param_groups(model, config=config, split_sizes=splits), process_group=process_group)


def tokens_of(step: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(step))


def toy_loss(model: nn.Module, step: int) -> Tensor:
    tokens = tokens_of(step)
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        toy_loss(model, step).backward()
        optimizer.step()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
