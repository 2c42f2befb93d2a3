"""Muon + AdamW on a small transformer made of torch's own layers.

    python examples/optim_torch.py

Shown: routing with a fused query-key-value weight, one scheduler for both halves, a momentum warm-up, and state that resumes exactly.
"""

from __future__ import annotations

import copy

import torch
from anarcho_optim import OptimConfig, schedules
from anarcho_optim.torch import MuonAdamW, param_groups
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

STEPS = 60
VOCABULARY, LENGTH, DIM = 24, 8, 32
CONFIG = OptimConfig(lr=0.02, warmup_steps=5, momentum_warmup_steps=30)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, DIM)
        self.positions = nn.Embedding(LENGTH, DIM)
        layer = nn.TransformerEncoderLayer(DIM, 4, 4 * DIM, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(DIM, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tokens(tokens) + self.positions.weight
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        return self.head(self.layers(h, mask=mask, is_causal=True))


def batch(step: int) -> Tensor:
    """(16, LENGTH + 1) tokens: each sequence counts upwards from a random start by a random stride."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, VOCABULARY, (16, 1), generator=generator)
    strides = torch.randint(1, 5, (16, 1), generator=generator)
    return (starts + strides * torch.arange(LENGTH + 1)) % VOCABULARY


def build() -> tuple[Transformer, MuonAdamW, LambdaLR]:
    torch.manual_seed(0)
    model = Transformer()
    # `in_proj_weight` holds query, key and value: three matrices, orthogonalised apart from each other.
    groups = param_groups(model, config=CONFIG, split_sizes={"*.in_proj_weight": (DIM, DIM, DIM)})
    optimizer = MuonAdamW(groups)
    return model, optimizer, LambdaLR(optimizer, lambda step: schedules.lr_scale(CONFIG, step, total_steps=STEPS))


def train(model: Transformer, optimizer: MuonAdamW, scheduler: LambdaLR, steps: range) -> float:
    for step in steps:
        for group in optimizer.param_groups:
            if group["algorithm"] == "muon":
                group["momentum"] = schedules.momentum(CONFIG, step)
        tokens = batch(step)
        logits = model(tokens[:, :-1])[:, 1:]  # the stride is known from the second token on
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step:3} loss {loss.item():.3f}")
    return loss.item()


def main() -> None:
    model, optimizer, scheduler = build()
    print(param_groups(model, config=CONFIG, split_sizes={"*.in_proj_weight": (DIM, DIM, DIM)}))
    train(model, optimizer, scheduler, range(STEPS // 2))
    saved = copy.deepcopy([part.state_dict() for part in (model, optimizer, scheduler)])
    final = train(model, optimizer, scheduler, range(STEPS // 2, STEPS))

    resumed = build()
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    assert train(*resumed, range(STEPS // 2, STEPS)) == final, "the resumed run differs"
    print(f"final loss {final:.3f}")


if __name__ == "__main__":
    main()
