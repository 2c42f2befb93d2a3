"""Muon + AdamW under FSDP2 (`fully_shard`), stopped in the middle, saved with torch.distributed.checkpoint and resumed.

    torchrun --nproc-per-node 2 examples/optim_fsdp.py [FOLDER]

NCCL on CUDA, gloo on CPUs. Parameters, gradients and optimizer state stay in shards; for the step, the shards of each matrix meet at the
rank that owns it and the update travels back, one collective each way per batch of matrices. The checkpoint goes to FOLDER
(fsdp-checkpoint), and another number of ranks may read it.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from anarcho_optim import OptimConfig, schedules
from anarcho_optim.torch import MuonAdamW, param_groups
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR

STEPS = 30
VOCABULARY = 32
CONFIG = OptimConfig(lr=0.02, warmup_steps=3)


def build(device: torch.device) -> tuple[nn.Module, MuonAdamW, LambdaLR]:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)]
    model = nn.Sequential(nn.Embedding(VOCABULARY, 64), *layers, nn.Linear(64, VOCABULARY)).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # Sharding replaces the parameters, so the optimizer comes after it.
    optimizer = MuonAdamW(param_groups(model, config=CONFIG))
    scheduler = LambdaLR(optimizer, lambda step: schedules.lr_scale(CONFIG, step, total_steps=STEPS))
    return model, optimizer, scheduler


def train(model: nn.Module, optimizer: MuonAdamW, scheduler: LambdaLR, steps: range, device: torch.device) -> float:
    """Loss of the last step, averaged over the ranks."""
    for step in steps:
        tokens = counting(step).to(device)
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    return mean.item()


def counting(step: int) -> Tensor:
    """(32, 9) tokens of this rank at a step: sequences that count upwards from a random start."""
    generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
    starts = torch.randint(0, VOCABULARY, (32, 1), generator=generator)
    return (starts + torch.arange(9)) % VOCABULARY


def save(folder: str, model: nn.Module, optimizer: MuonAdamW, scheduler: LambdaLR) -> None:
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments, "scheduler": scheduler.state_dict()}, checkpoint_id=folder)


def load(folder: str, model: nn.Module, optimizer: MuonAdamW, scheduler: LambdaLR) -> None:
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments, "scheduler": scheduler.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])


def main() -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    folder = sys.argv[1] if len(sys.argv) > 1 else "fsdp-checkpoint"

    first = build(device)
    start = train(*first, range(STEPS // 2), device)
    save(folder, *first)
    uninterrupted = train(*first, range(STEPS // 2, STEPS), device)

    second = build(device)
    load(folder, *second)
    resumed = train(*second, range(STEPS // 2, STEPS), device)
    if dist.get_rank() == 0:
        print(f"loss after {STEPS // 2} steps {start:.3f}, after {STEPS} {uninterrupted:.3f}, resumed {resumed:.3f}")
        print(f"final loss {resumed:.3f}")
    dist.barrier()  # no rank leaves while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
