"""Muon + AdamW on a small transformer made of MLX's own layers, as one compiled step.

    python examples/optim_mlx.py

Shown: routing, rates and momentum that change without another trace, and state that resumes exactly from a safetensors file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from anarcho_optim import OptimConfig, schedules
from anarcho_optim.mlx import MuonAdamW, param_groups
from mlx.utils import tree_flatten

STEPS = 60
VOCABULARY, LENGTH, DIM = 24, 8, 32
CONFIG = OptimConfig(lr=0.02, warmup_steps=5, momentum_warmup_steps=30)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, DIM)
        self.positions = nn.Embedding(LENGTH, DIM)
        self.layers = nn.TransformerEncoder(2, DIM, 4, 4 * DIM)
        self.head = nn.Linear(DIM, VOCABULARY, bias=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        h = self.tokens(tokens) + self.positions.weight
        mask = nn.MultiHeadAttention.create_additive_causal_mask(LENGTH)
        return self.head(self.layers(h, mask))


def batch(step: int) -> mx.array:
    """(16, LENGTH + 1) tokens: each sequence counts upwards from a random start by a random stride."""
    starts = mx.random.randint(0, VOCABULARY, (16, 1), key=mx.random.key(2 * step))
    strides = mx.random.randint(1, 5, (16, 1), key=mx.random.key(2 * step + 1))
    return (starts + strides * mx.arange(LENGTH + 1)) % VOCABULARY


def build() -> tuple[Transformer, MuonAdamW, Callable[[mx.array], mx.array]]:
    """A model, its optimizer and their compiled step from a batch to its loss."""
    mx.random.seed(0)
    model = Transformer()
    optimizer = MuonAdamW(param_groups(model, config=CONFIG))

    def loss(tokens: mx.array) -> mx.array:
        logits = model(tokens[:, :-1])[:, 1:]  # the stride is known from the second token on
        return nn.losses.cross_entropy(logits, tokens[:, 2:], reduction="mean")

    loss_and_gradients = nn.value_and_grad(model, loss)

    def update(tokens: mx.array) -> mx.array:
        value, gradients = loss_and_gradients(tokens)
        optimizer.update(model, gradients)
        return value

    # Rates, momenta and moments are arrays of the optimizer's state, so the compiled step sees them change.
    state = [model.state, optimizer.state]
    return model, optimizer, mx.compile(update, inputs=state, outputs=state)


def train(model: Transformer, optimizer: MuonAdamW, step: Callable[[mx.array], mx.array], steps: range) -> float:
    for index in steps:
        optimizer.learning_rate = CONFIG.lr * schedules.lr_scale(CONFIG, index, total_steps=STEPS)
        for group in optimizer.param_groups:
            if group["algorithm"] == "muon":
                group["momentum"] = schedules.momentum(CONFIG, index)
        loss = step(batch(index))
        mx.eval(loss, model.parameters(), optimizer.state)
        if index % 20 == 0:
            print(f"step {index:3} loss {loss.item():.3f}")
    return loss.item()


def main() -> None:
    model, optimizer, step = build()
    print(param_groups(model, config=CONFIG))
    train(model, optimizer, step, range(STEPS // 2))
    with tempfile.TemporaryDirectory() as folder:
        weights, moments = str(Path(folder, "model.safetensors")), str(Path(folder, "optimizer.safetensors"))
        model.save_weights(weights)
        mx.save_safetensors(moments, dict(tree_flatten(optimizer.state)))
        resumed = build()
        resumed[0].load_weights(weights)
        resumed[1].load_state_dict(mx.load(moments))
        mx.eval(resumed[0].parameters(), resumed[1].state)
    final = train(model, optimizer, step, range(STEPS // 2, STEPS))
    assert train(*resumed, range(STEPS // 2, STEPS)) == final, "the resumed run differs"
    print(f"final loss {final:.3f}")


if __name__ == "__main__":
    main()
