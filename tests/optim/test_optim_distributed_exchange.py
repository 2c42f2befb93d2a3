"""Properties of `anarcho_optim.torch.distributed`: nothing changes on the way, each way is one collective, bad input is named."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from anarcho_optim.torch.distributed import (
    OwnedShares,
    ShardExchange,
    extra_placements,
    kind,
    local,
    local_shard,
    owner_shares,
    whole,
)
from ranks import run
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

ALL_TO_ALL = {torch.ops.c10d.alltoall_base_: 1}
ALL_GATHER = {torch.ops.c10d._allgather_base_: 1}
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
WORLDS = [(1, "cpu"), (2, "cpu"), (4, "cpu"), pytest.param(2, "cuda", marks=TWO_GPUS)]
# On four ranks: even, uneven, with empty shards, a single row or column, stacks and convolutions.
SHAPES = [(8, 4), (7, 5), (6, 9), (3, 2), (1, 6), (6, 1), (1, 1), (5, 3, 4), (2, 3, 2, 2)]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Equal on all ranks; a number that lost bits of its mantissa on the way would show."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sharded(tensors: Tensor, mesh: DeviceMesh, placements: list[Placement] | tuple[Placement, ...]) -> list[DTensor]:
    return [distribute_tensor(tensor, mesh, placements) for tensor in tensors]


def equal(got: list[Tensor], expected: list[Tensor]) -> bool:
    """The same number of tensors, and the same dtype, shape and bits of each."""
    return len(got) == len(expected) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in zip(got, expected, strict=True)
    )


def extra_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Second moments of the rows, of the columns, of the rows of blocks, and with a dimension for the stack in front."""
    *stack, rows, columns = shape
    return [(*stack, rows, 1), (*stack, 1, columns), (*stack, rows, 3), (*stack, 2, columns), (1, *stack, rows, 1)]


def exchange_buckets(world_size: int, device: str) -> None:
    mesh = init_device_mesh(device, (world_size,))
    for shape in SHAPES:
        for dim in (0, 1):
            for index, extra_shape in enumerate(extra_shapes(shape)):
                exchange_bucket(mesh, shape, dim, extra_shape, count=1 + 2 * index, first=index)


def exchange_bucket(
    mesh: DeviceMesh, shape: tuple[int, ...], dim: int, extra_shape: tuple[int, ...], *, count: int, first: int
) -> None:
    matrices = numbers(count, *shape, seed=dim).to(mesh.device_type)
    parameters = sharded(matrices, mesh, [Shard(dim)])
    extras = numbers(count, *extra_shape, seed=2).to(mesh.device_type)
    extras_here = sharded(extras, mesh, extra_placements(parameters[0], extra_shape))
    shards, extra_shards = [local(p) for p in parameters], [local(e) for e in extras_here]
    exchange = ShardExchange(parameters[0], count, extra_shape=extra_shape, first=first)

    with CommDebugMode() as collectives:
        wholes, whole_extras = exchange.gather(shards, extra_shards)
    assert collectives.get_comm_counts() == ALL_TO_ALL
    mine = slice(exchange.owned.start, exchange.owned.stop)
    assert equal([wholes, whole_extras], [matrices[mine], extras[mine]]), (shape, dim, extra_shape)

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with CommDebugMode() as collectives:
            shards_back, extras_back = exchange.scatter(wholes, whole_extras, dtype=dtype)
        assert collectives.get_comm_counts() == ALL_TO_ALL
        assert equal(shards_back, [shard.to(dtype) for shard in shards]), (shape, dim, extra_shape, dtype)
        assert equal(extras_back, extra_shards), (shape, dim, extra_shape, dtype)

    plain = ShardExchange(parameters[0], count, first=first)
    wholes, nothing = plain.gather([shard.bfloat16() for shard in shards])
    assert nothing is None
    assert equal([wholes], [matrices[mine].bfloat16().float()]), (shape, dim)
    shards_back, nothing = plain.scatter(matrices[mine])
    assert nothing is None
    assert equal(shards_back, shards), (shape, dim)


@pytest.mark.parametrize(("world_size", "device"), WORLDS)
def test_owners_get_whole_matrices_and_every_rank_its_shards_back_bit_for_bit_with_one_collective_each_way(
    world_size: int, device: str
) -> None:
    run(world_size, exchange_buckets, world_size, device, device=device)


def exchange_model_shards() -> None:
    """Shards of FSDP2's own making, on ranks of which the last has none of a single row; on one dimension of a larger mesh; replicated."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 5), nn.Linear(5, 6), nn.Linear(6, 6))
    reference = copy.deepcopy(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    model(torch.ones(2, 6)).sum().backward()
    reference(torch.ones(2, 6)).sum().backward()
    for module, expected in zip(model, reference, strict=True):
        exchange_gradient(module.weight.grad, expected.weight.grad)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    exchange_gradient(distribute_tensor(numbers(3, 5), mesh["shards"], [Shard(1)]), numbers(3, 5))
    exchange_gradient(distribute_tensor(numbers(3, 5), mesh, [Replicate(), Shard(0)]), numbers(3, 5))


def exchange_gradient(gradient: DTensor, expected: Tensor) -> None:
    assert kind(gradient) == "sharded"
    exchange = ShardExchange(gradient, 1)
    wholes, _ = exchange.gather([local(gradient)])
    torch.testing.assert_close(wholes, expected.expand(len(exchange.owned), *expected.shape))
    (shard,), _ = exchange.scatter(wholes)
    assert equal([shard], [local(gradient)])


def test_shards_that_fsdp_made_and_those_of_a_part_of_a_mesh_are_exchanged() -> None:
    run(4, exchange_model_shards)


def cut_and_join() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    for placements in ([Shard(0), Shard(1)], [Replicate(), Shard(0)], [Shard(1), Replicate()], [Shard(0), Shard(0)]):
        for shape in ((8, 4), (7, 5), (1, 6), (5, 3, 4)):
            cut(distribute_tensor(numbers(*shape), mesh, placements), numbers(*shape))
    for style in (ColwiseParallel(), RowwiseParallel()):
        torch.manual_seed(0)
        layer = nn.Linear(8, 12, bias=False)
        full = layer.weight.detach().clone()
        parallel = fully_shard(parallelize_module(layer, mesh["b"], style), mesh=mesh["a"])
        cut(parallel.weight, full)


def cut(parameter: DTensor, full: Tensor) -> None:
    replicated = any(isinstance(placement, Replicate) for placement in parameter.placements)
    assert kind(parameter) == ("sharded" if replicated else "general")
    with torch.no_grad():
        assert equal([whole(parameter)], [full]), parameter.placements
        with CommDebugMode() as collectives:
            shard = local_shard(full, parameter)
        assert collectives.get_total_counts() == 0, parameter.placements
        assert equal([shard], [local(parameter)]), parameter.placements
        extra = distribute_like(full.sum(dim=-1, keepdim=True), parameter)
        assert equal([whole(extra)], [full.sum(dim=-1, keepdim=True)]), parameter.placements


def distribute_like(extra: Tensor, like: DTensor) -> DTensor:
    placements = extra_placements(like, extra.shape)
    replicas = DTensor.from_local(extra, like.device_mesh, [Replicate()] * like.device_mesh.ndim)
    return replicas.redistribute(placements=placements)


def test_any_other_placement_is_joined_and_cut_again_without_communication() -> None:
    run(4, cut_and_join)


def share_out(device: str) -> None:
    for count in (1, 2, 3, 4, 5, 8):
        for dtype in (torch.float32, torch.bfloat16):
            shares = OwnedShares(None, count=count, shape=(3, 2), dtype=dtype, first=count)
            matrices = numbers(count, 3, 2).to(device)
            with CommDebugMode() as collectives:
                updates = shares.all_gather(matrices[shares.owned.start : shares.owned.stop])
            assert collectives.get_comm_counts() == ALL_GATHER
            assert equal([updates], [matrices.to(dtype)]), (count, dtype)
    with pytest.raises(ValueError, match=r"stack has shape \(9, 3, 2\)"):
        shares.all_gather(numbers(9, 3, 2))


@pytest.mark.parametrize(("world_size", "device"), WORLDS)
def test_replicas_share_out_any_number_of_matrices_and_gather_them_in_order_with_one_collective(
    world_size: int, device: str
) -> None:
    run(world_size, share_out, device, device=device)


def refuse() -> None:
    mesh = init_device_mesh("cpu", (2,))
    replicated = distribute_tensor(numbers(4, 3), mesh, [Replicate()])
    assert kind(replicated) == "plain"
    assert equal([local(replicated)], [numbers(4, 3)])
    with pytest.raises(ValueError, match=r"like has placements \(Replicate\(\),\); expected one Shard"):
        ShardExchange(replicated, 1)
    exchange = ShardExchange(distribute_tensor(numbers(4, 3), mesh, [Shard(0)]), 2)
    with pytest.raises(ValueError, match=r"expected 2 of each of \[\(2, 3\)\]"):
        exchange.gather([numbers(2, 3)])
    with pytest.raises(ValueError, match=r"expected 1 of each of \[\(1, 4, 3\)\]"):
        exchange.scatter(numbers(1, 4, 3), numbers(1, 4, 1))


def test_what_would_hang_the_other_ranks_is_refused() -> None:
    run(2, refuse)


def fail_on_the_last_rank() -> None:
    if dist.get_rank() == 1:
        raise ArithmeticError("only here")
    dist.barrier()


def test_a_failure_on_one_rank_is_raised_here() -> None:
    with pytest.raises(AssertionError, match="ArithmeticError: only here"):
        run(2, fail_on_the_last_rank)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_every_matrix_has_one_owner_and_no_rank_owns_two_more_than_another(count: int, num_ranks: int) -> None:
    for first in range(num_ranks):
        shares = owner_shares(count, num_ranks, first=first)
        assert [matrix for share in shares for matrix in share] == list(range(count))
        assert [len(share) for share in shares].count(math.ceil(count / num_ranks)) == (count % num_ranks or num_ranks)
        assert len(shares[first]) == math.ceil(count / num_ranks)


def test_a_plain_tensor_is_its_own_part_and_its_own_whole() -> None:
    weight = nn.Parameter(numbers(2, 3))
    assert kind(weight) == "plain"
    assert local(weight) is weight
    assert whole(weight) is weight
