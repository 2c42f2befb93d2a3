"""Sharded parameters are updated as on one device, whatever their placement, and with at most two collectives per bucket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cases
import pytest
import torch
from anarcho_optim.torch import MuonAdamW
from anarcho_optim.torch.distributed import extra_placements
from ranks import run
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
WORLDS = [(1, "cpu"), (2, "cpu"), (4, "cpu"), pytest.param(2, "cuda", marks=TWO_GPUS)]

ALL: dict[str, Any] = {
    "normuon": True,
    "row_equilibration": True,
    "frobenius_normalization": True,
    "cautious_weight_decay": True,
}
CASES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((8, 12), cases.muon()),
    ((8, 12), cases.muon(**ALL)),
    ((8, 12), cases.muon(normuon=True, normuon_axis=-2)),
    ((7, 5), cases.muon(normuon=True)),
    ((5, 7), cases.muon(normuon=True, normuon_axis=-2)),
    ((3, 2), cases.muon(**ALL)),
    ((1, 6), cases.muon()),
    ((1, 6), cases.muon(normuon=True)),
    ((6, 1), cases.muon(normuon=True, normuon_axis=-2)),
    ((1, 6), cases.adamw()),
    ((1, 1), cases.muon()),
    ((12, 5), cases.muon(split_sizes=(6, 4, 2), **ALL)),
    ((5, 12), cases.muon(num_heads=3, split_dim=1, normuon=True)),
    ((12, 5), cases.muon(num_heads=3, normuon=True, normuon_axis=-2)),
    ((6, 3, 2, 2), cases.muon(flatten=True, **ALL)),
    ((6, 3, 2, 2), cases.muon(flatten=True, normuon=True, normuon_axis=-2)),
    ((6, 2, 1), cases.muon(flatten=True, normuon=True, normuon_axis=-2)),
    ((3, 4, 6), cases.muon(flatten=False, normuon=True)),
    ((3, 4, 6), cases.muon(flatten=False, num_heads=2, normuon=True, normuon_axis=-2)),
    ((0, 4), cases.muon()),
    ((7, 5), cases.adamw()),
    ((5,), cases.adamw()),
]
"""Shapes and options; on four ranks, the first are even, then uneven, then there are empty shards."""


def numbers(*shape: int, seed: int) -> Tensor:
    """Equal on all ranks."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distributed(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """Distributes without communication what all ranks have."""
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


class Bucket:
    """``count`` parameters of one shape, the same twice: distributed and as plain tensors, with an optimizer each."""

    def __init__(
        self,
        mesh: DeviceMesh,
        placements: Sequence[Placement],
        shape: tuple[int, ...],
        options: dict[str, Any],
        *,
        count: int = 2,
    ) -> None:
        self.mesh, self.placements, self.shape = mesh, placements, shape
        starts = [numbers(*shape, seed=i).to(mesh.device_type) for i in range(count)]
        self.plain = [nn.Parameter(start.clone()) for start in starts]
        self.sharded = [nn.Parameter(distributed(start, mesh, placements)) for start in starts]
        self.reference = MuonAdamW([{"params": self.plain, **options}])
        self.optimizer = MuonAdamW([{"params": self.sharded, **options}])

    def step(self, step: int, *, gradient_placements: Sequence[Placement] | None = None) -> int:
        """One step of both; returns the number of collectives, which are counted in the first step only."""
        for i, (plain, sharded) in enumerate(zip(self.plain, self.sharded, strict=True)):
            plain.grad = numbers(*self.shape, seed=100 * step + i).to(self.mesh.device_type)
            sharded.grad = distributed(plain.grad, self.mesh, gradient_placements or self.placements)
        self.reference.step()
        if step > 0:
            self.optimizer.step()
            return 0
        with CommDebugMode() as collectives:
            self.optimizer.step()
        return collectives.get_total_counts()

    def check(self) -> None:
        """The weights and the whole state agree, and lie as they should."""
        for plain, sharded in zip(self.plain, self.sharded, strict=True):
            self._check(sharded.data, plain.data, tuple(self.placements))
            ours, theirs = self.optimizer.state[sharded], self.reference.state[plain]
            assert ours.keys() == theirs.keys()
            for key, value in ours.items():
                if key == "step":
                    assert torch.equal(value, theirs[key])
                else:
                    self._check(value, theirs[key], extra_placements(sharded, value.shape))

    def _check(self, found: Tensor, expected: Tensor, placements: tuple[Placement, ...]) -> None:
        where = (self.shape, placements)
        assert isinstance(found, DTensor)
        assert (found.placements, found.device_mesh, found.shape) == (placements, self.mesh, expected.shape), where
        mine = distributed(expected, self.mesh, placements).to_local()
        torch.testing.assert_close(found.to_local(), mine, atol=1e-6, rtol=1e-5, msg=lambda m: f"{where} {m}")


def one_dimensional_meshes(world_size: int, device: str) -> None:
    mesh = init_device_mesh(device, (world_size,))
    for shape, options in {1: CASES[::5], 2: CASES[1::2], 4: CASES}[world_size]:
        for placement in [*(Shard(dim) for dim in range(len(shape))), *([Replicate()] if world_size == 2 else [])]:
            bucket = Bucket(mesh, [placement], shape, options)
            counts = [bucket.step(step) for step in range(2)]
            is_exchanged = options["algorithm"] == "muon" and isinstance(placement, Shard) and 0 not in shape
            assert counts[0] == 2 * is_exchanged, (shape, placement, counts)
            bucket.check()


@pytest.mark.parametrize(("world_size", "device"), WORLDS)
def test_shards_are_updated_as_on_one_device_with_two_collectives_per_bucket(world_size: int, device: str) -> None:
    run(world_size, one_dimensional_meshes, world_size, device, device=device)


def two_dimensional_meshes() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    for placements, selected in {
        (Replicate(), Shard(0)): CASES[::2],
        (Shard(0), Shard(1)): CASES[1::3],
        (Shard(1), Shard(0)): CASES[::5],
        (Shard(0), Shard(0)): CASES[::6],
        (Shard(0), Replicate()): CASES[2::6],
        (Replicate(), Replicate()): CASES[4::6],
    }.items():
        for shape, options in selected:
            if max(getattr(placement, "dim", 0) for placement in placements) >= len(shape):
                continue
            bucket = Bucket(mesh, placements, shape, options)
            counts = [bucket.step(step) for step in range(2)]
            if {type(placement) for placement in placements} == {Replicate, Shard}:
                assert counts[0] == 2 * (options["algorithm"] == "muon" and 0 not in shape), (shape, placements, counts)
            bucket.check()


def test_meshes_of_two_dimensions_are_updated_as_one_device_is_replicas_with_two_collectives_per_bucket() -> None:
    run(4, two_dimensional_meshes)


def submesh() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))["shards"]
    bucket = Bucket(mesh, [Shard(0)], (7, 5), cases.muon(normuon=True))
    assert [bucket.step(step) for step in range(2)] == [2, 0]
    bucket.check()


def test_a_part_of_a_mesh_exchanges_shards_within_itself() -> None:
    run(4, submesh)


def misplaced_gradients() -> None:
    """Also of a single row, of which the second rank has nothing."""
    mesh = init_device_mesh("cpu", (2,))
    places = [(Shard(0), Replicate()), (Shard(0), Shard(1)), (Shard(1), Shard(0)), (Replicate(), Shard(0))]
    for options in (cases.muon(), cases.adamw()):
        for shape in ((6, 4), (1, 4)):
            for placement, gradient_placement in places:
                bucket = Bucket(mesh, [placement], shape, options)
                bucket.step(0, gradient_placements=[gradient_placement])
                bucket.check()


def test_gradients_that_lie_elsewhere_are_brought_to_their_parameters() -> None:
    run(2, misplaced_gradients)


def missing_gradients() -> None:
    mesh = init_device_mesh("cpu", (2,))
    first, second = (Bucket(mesh, [Shard(0)], (6, 4), cases.muon(normuon=True)) for _ in range(2))
    before = [p.full_tensor() for p in first.sharded]
    assert first.optimizer.step() is None
    assert all(torch.equal(p.full_tensor(), b) for p, b in zip(first.sharded, before, strict=True))
    for bucket in (first, second):
        bucket.step(0)
        for parameters in (bucket.plain, bucket.sharded):
            parameters[1].grad = None
        with CommDebugMode() as collectives:
            bucket.optimizer.step()
        bucket.reference.step()
        assert collectives.get_total_counts() == 2
        bucket.check()


def test_parameters_without_a_gradient_on_any_rank_are_left_alone() -> None:
    run(2, missing_gradients)


def half_precision() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for options in (cases.muon(normuon=True), cases.adamw()):
        plain = nn.Parameter(numbers(6, 4, seed=0).bfloat16())
        sharded = nn.Parameter(distributed(plain.data.clone(), mesh, [Shard(0)]))
        for parameter in (plain, sharded):
            gradient = numbers(6, 4, seed=1).bfloat16()
            parameter.grad = gradient if parameter is plain else distributed(gradient, mesh, [Shard(0)])
            MuonAdamW([{"params": [parameter], **options}]).step()
        torch.testing.assert_close(sharded.full_tensor(), plain.data, atol=0, rtol=2**-8)


def test_half_precision_shards_are_updated_in_float32() -> None:
    run(2, half_precision)


def many_buckets() -> None:
    """Shapes that differ, with one matrix each: the owners take turns."""
    mesh = init_device_mesh("cpu", (4,))
    shapes = [(4 + i, 5) for i in range(8)]
    parameters = [nn.Parameter(distributed(numbers(*s, seed=0), mesh, [Shard(0)])) for s in shapes]
    optimizer = MuonAdamW([{"params": parameters, **cases.muon()}])
    for p in parameters:
        p.grad = distributed(numbers(*p.shape, seed=1), mesh, [Shard(0)])
    owned: list[int] = []
    from anarcho_optim.torch import matrices

    orthogonal_blocks = matrices.orthogonal_blocks
    matrices.orthogonal_blocks = lambda stack, *rest: owned.append(len(stack)) or orthogonal_blocks(stack, *rest)
    optimizer.step()
    assert sum(owned) == 2, owned


def test_single_matrices_of_many_shapes_are_shared_out_evenly() -> None:
    run(4, many_buckets)


def capped_batches() -> None:
    """The cap is on what one owner works on, so that every rank has a matrix of each batch."""
    from anarcho_optim import memory

    memory.CPU_BATCH_BYTES = 4 * 6 * 4
    bucket = Bucket(init_device_mesh("cpu", (4,)), [Shard(0)], (6, 4), cases.muon(), count=8)
    assert bucket.step(0) == 4
    bucket.check()


def test_a_batch_holds_a_capful_of_matrices_for_every_owner() -> None:
    run(4, capped_batches)


def plain_state() -> None:
    bucket = Bucket(init_device_mesh("cpu", (2,)), [Shard(0)], (6, 4), cases.muon())
    with pytest.raises(
        ValueError,
        match=r"momentum in the state of parameter 0 .* lies as None; expected .*torch\.distributed\.checkpoint",
    ):
        bucket.optimizer.load_state_dict(bucket.reference.state_dict())


def test_a_state_that_lies_elsewhere_is_refused() -> None:
    run(2, plain_state)
