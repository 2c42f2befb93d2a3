"""Muon + AdamW under DistributedDataParallel: each rank orthogonalises a share of the matrices.

    torchrun --nproc-per-node 2 examples/optim_ddp.py

NCCL on CUDA, gloo on CPUs. The model learns to tell which token of a sequence comes next when every sequence counts upwards.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from anarcho_optim import OptimConfig, schedules
from anarcho_optim.torch import MuonAdamW, param_groups
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

STEPS = 30
VOCABULARY = 32


def counting(batch: int, generator: torch.Generator) -> Tensor:
    """(batch, 9) tokens: sequences that count upwards from a random start."""
    starts = torch.randint(0, VOCABULARY, (batch, 1), generator=generator)
    return (starts + torch.arange(9)) % VOCABULARY


def train(device: torch.device) -> float:
    """Loss of the last step, averaged over the ranks."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)]
    model = nn.Sequential(nn.Embedding(VOCABULARY, 64), *layers, nn.Linear(64, VOCABULARY)).to(device)
    ddp = DistributedDataParallel(model)

    config = OptimConfig(lr=0.02, warmup_steps=3)
    # DDP has averaged the gradients before the step; with the process group, one collective per batch of matrices gathers the shares.
    optimizer = MuonAdamW(param_groups(model, config=config), process_group=dist.group.WORLD)
    scheduler = LambdaLR(optimizer, lambda step: schedules.lr_scale(config, step, total_steps=STEPS))

    data = torch.Generator().manual_seed(dist.get_rank())  # every rank sees its own sequences
    for step in range(STEPS):
        tokens = counting(32, data).to(device)
        loss = nn.functional.cross_entropy(ddp(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 10 == 0 and dist.get_rank() == 0:
            print(f"step {step:3} loss {loss.item():.3f}")

    of_rank_0 = [p.detach().clone() for p in model.parameters()]
    for weight in of_rank_0:
        dist.broadcast(weight, src=0)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), of_rank_0, strict=True)), "the replicas differ"
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    return mean.item()


def main() -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    final = train(device)
    if dist.get_rank() == 0:
        print(f"final loss {final:.3f}")
    dist.barrier()  # no rank leaves while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
