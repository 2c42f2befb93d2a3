"""Models under FSDP2, HSDP and DDP are trained as on one device, and a sharded checkpoint resumes on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from anarcho_optim.torch import MuonAdamW, param_groups
from ranks import run
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch_toy import SPLITS, Toy, toy, toy_loss, toy_optimizer, train, weights_of

OPTIONS: dict[str, Any] = {"normuon": True, "cautious_weight_decay": True}
ONE_ALL_GATHER = {torch.ops.c10d._allgather_base_: 1}


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): p.full_tensor() if isinstance(p, DTensor) else p
        for name, p in weights_of(model).items()
    }


def check_weights(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found = full_weights(model)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def trained_alone(steps: int, **options: Any) -> dict[str, Tensor]:
    model = toy(**options)
    train(model, toy_optimizer(model, **OPTIONS), range(steps))
    return weights_of(model)


def sharded_toy(world_size: int, seed: int = 0, **options: Any) -> Toy:
    """A toy of which one part is a unit of its own, as the layers of a larger model are."""
    model = toy(seed, **options)
    mesh = init_device_mesh("cpu", (world_size,))
    fully_shard(model.qkv, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fsdp(world_size: int, tied: bool) -> None:
    model = sharded_toy(world_size, tied=tied)
    optimizer = toy_optimizer(model, **OPTIONS)
    train(model, optimizer, range(3))
    check_weights(model, trained_alone(3, tied=tied))
    if tied:
        assert model.head.weight is model.embedding.weight
    for parameter, state in optimizer.state.items():
        assert all(isinstance(value, DTensor) for key, value in state.items() if key != "step")
        assert {int(value) for key, value in state.items() if key == "step"} <= {3}
        momentum = state.get("momentum", state.get("exp_avg"))
        assert momentum.placements == parameter.placements


@pytest.mark.parametrize(("world_size", "tied"), [(1, True), (2, False), (4, True)])
def test_fsdp_trains_as_one_device_does(world_size: int, tied: bool) -> None:
    run(world_size, fsdp, world_size, tied)


def hsdp() -> None:
    model = toy()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")))
    train(model, toy_optimizer(model, **OPTIONS), range(2))
    check_weights(model, trained_alone(2))


def test_hybrid_sharding_trains_as_one_device_does() -> None:
    run(4, hsdp)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8, bias=False)
        self.down = nn.Linear(8, 6, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.down(self.up(h).tanh())


def tensor_parallel() -> None:
    """Sharded twice: along rows or columns between the ranks of a pair, and along rows between the pairs."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for options in ({}, {"normuon": True, "num_heads": 2}, {"normuon": True, "normuon_axis": -2}):
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            models.append(FeedForward())
        parallelize_module(models[0], mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(models[0], mesh=mesh["data"])
        for model in models:
            optimizer = MuonAdamW([{"params": list(model.named_parameters()), **cases.muon(**options)}])
            for step in range(2):
                optimizer.zero_grad()
                inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
                model(inputs).square().sum().backward()
                optimizer.step()
        check_weights(models[0], weights_of(models[1]))


def test_sharding_besides_tensor_parallelism_trains_as_one_device_does() -> None:
    run(4, tensor_parallel)


def distributed_data_parallel(world_size: int) -> None:
    model = DistributedDataParallel(toy())
    optimizer = toy_optimizer(model, process_group=dist.group.WORLD, **OPTIONS)
    plain = toy()
    assert [g["param_names"] for g in optimizer.param_groups] == [
        g["param_names"] for g in toy_optimizer(plain, **OPTIONS).param_groups
    ]
    plain_optimizer = toy_optimizer(plain, **OPTIONS)
    for step in range(3):
        optimizer.zero_grad()
        plain_optimizer.zero_grad()
        toy_loss(model, world_size * step + dist.get_rank()).backward()
        sum(toy_loss(plain, world_size * step + rank) / world_size for rank in range(world_size)).backward()
        optimizer.step()
        plain_optimizer.step()
    check_weights(model, weights_of(plain))


@pytest.mark.parametrize("world_size", [1, 3])
def test_distributed_data_parallel_trains_as_one_device_does(world_size: int) -> None:
    run(world_size, distributed_data_parallel, world_size)


def shares_of_replicas() -> None:
    """Five matrices on two ranks: one collective, and each rank orthogonalises its share only."""
    orthogonalized: list[int] = []
    from anarcho_optim.torch import matrices

    orthogonal_blocks = matrices.orthogonal_blocks
    matrices.orthogonal_blocks = lambda stack, *rest: (
        orthogonalized.append(len(stack)) or orthogonal_blocks(stack, *rest)
    )
    for shape, options in (
        ((6, 4), {}),
        ((6, 4), {"normuon": True, "num_heads": 2}),
        ((3, 4, 6), {"flatten": False}),
        ((6, 2, 2), {"flatten": True}),
    ):
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(5)]
        for p in parameters:
            p.grad = torch.randn(shape, generator=generator)
        plain = [nn.Parameter(p.detach().clone()) for p in parameters]
        for p, q in zip(parameters, plain, strict=True):
            q.grad = p.grad.clone()
        group = {"algorithm": "muon", "ns_dtype": "float32", **options}
        optimizer = MuonAdamW([group | {"params": parameters}], process_group=dist.group.WORLD)
        orthogonalized.clear()
        with CommDebugMode() as collectives:
            optimizer.step()
        assert collectives.get_comm_counts() == ONE_ALL_GATHER
        assert orthogonalized == [3 - dist.get_rank()]
        MuonAdamW([group | {"params": plain}]).step()
        for p, q in zip(parameters, plain, strict=True):
            torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)


def test_replicas_share_the_matrices_of_a_batch_and_gather_them_once() -> None:
    run(2, shares_of_replicas)


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def checkpoint_of(model: nn.Module, optimizer: MuonAdamW) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=FLAT),
    }


def optimizer_with_scheduler(model: nn.Module) -> tuple[MuonAdamW, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = toy_optimizer(model, **OPTIONS)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)


def train_on_schedule(model: nn.Module, optimizer: MuonAdamW, scheduler: Any, steps: range) -> None:
    for step in steps:
        train(model, optimizer, range(step, step + 1))
        scheduler.step()


def save(directory: str) -> None:
    """Two steps, a checkpoint and two more, whose whole weights are saved, too."""
    model = sharded_toy(dist.get_world_size())
    optimizer, scheduler = optimizer_with_scheduler(model)
    train_on_schedule(model, optimizer, scheduler, range(2))
    dcp.save(checkpoint_of(model, optimizer), checkpoint_id=f"{directory}/checkpoint")
    schedule = scheduler.state_dict()
    train_on_schedule(model, optimizer, scheduler, range(2, 4))
    final = {"weights": full_weights(model), "scheduler": schedule}
    if dist.get_rank() == 0:
        torch.save(final, f"{directory}/final.pt")


def resume(directory: str) -> None:
    model = sharded_toy(dist.get_world_size(), seed=1)
    optimizer, scheduler = optimizer_with_scheduler(model)
    loaded = checkpoint_of(model, optimizer)
    dcp.load(loaded, checkpoint_id=f"{directory}/checkpoint")
    set_model_state_dict(model, loaded["model"])
    set_optimizer_state_dict(model, optimizer, loaded["optimizer"], options=FLAT)
    final = torch.load(f"{directory}/final.pt", weights_only=True)
    scheduler.load_state_dict(final["scheduler"])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02 * 0.8**2)
    for parameter, state in optimizer.state.items():
        momentum = state.get("momentum", state.get("exp_avg"))
        assert momentum.placements == parameter.placements
        assert momentum.dtype == torch.float32
    train_on_schedule(model, optimizer, scheduler, range(2, 4))
    check_weights(model, final["weights"])


def test_a_checkpoint_of_four_ranks_resumes_on_fewer(tmp_path: Path) -> None:
    run(4, save, str(tmp_path))
    for world_size in (1, 2):
        run(world_size, resume, str(tmp_path))


def whole_state() -> None:
    """The state of shards, gathered whole, is the one of a single device; and a single device's is taken over by shards."""
    model = sharded_toy(2)
    optimizer = toy_optimizer(model, **OPTIONS)
    train(model, optimizer, range(2))
    alone = toy()
    single = toy_optimizer(alone, **OPTIONS)
    train(alone, single, range(2))
    options = StateDictOptions(full_state_dict=True)
    ours, theirs = get_optimizer_state_dict(model, optimizer, options=options), get_optimizer_state_dict(alone, single)
    assert ours["state"].keys() == theirs["state"].keys()
    for name, state in theirs["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(ours["state"][name][key], value, atol=1e-6, rtol=1e-5)
    set_optimizer_state_dict(model, optimizer, theirs, options=options)
    train(model, optimizer, range(2, 4))
    train(alone, single, range(2, 4))
    check_weights(model, weights_of(alone))


def test_whole_states_move_between_one_device_and_shards() -> None:
    run(2, whole_state)


def routes() -> None:
    model = toy()
    expected = {n: g["name"] for g in param_groups(model, split_sizes=SPLITS) for n, _ in g["params"]}
    wrapped = sharded_toy(2)
    assert {n: g["name"] for g in param_groups(wrapped, split_sizes=SPLITS) for n, _ in g["params"]} == expected
    parallel = torch.compile(DistributedDataParallel(toy()), backend="eager")
    assert {n: g["name"] for g in param_groups(parallel, split_sizes=SPLITS) for n, _ in g["params"]} == expected


def test_sharding_and_replication_change_neither_names_nor_routes() -> None:
    run(2, routes)
