"""Movement of matrices between ranks: an orthogonalised update needs whole matrices, while parameters and their state lie in shards.

Notable: nothing here computes. `kind` says how a parameter lies, and each kind has its way:

* ``sharded`` (FSDP2, one Shard; HSDP, one Shard and replicas of it): `ShardExchange` brings the shards of each matrix of a bucket to the
  rank that owns it, and the shards of the results back; one collective each way, however many matrices there are and whatever travels
  beside them. Replicas do the same beside each other, so nothing travels between them;
* ``general`` (FSDP with tensor parallelism, any other placement): `whole` gathers a tensor on every rank, `local_shard` cuts it;
* ``plain`` (one process, or replicas under DDP): nothing has to move, or `OwnedShares` lets each rank compute a share of the updates.

Every rank of the mesh or group has to make the same calls in the same order, also one that holds or owns nothing. Call them under
``torch.no_grad()``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

Kind = Literal["plain", "sharded", "general"]


def kind(tensor: Tensor) -> Kind:
    """How ``tensor`` lies: ``plain`` (this rank holds all of it), ``sharded`` (one Shard, its replicas apart) or ``general``."""
    if not isinstance(tensor, DTensor) or all(isinstance(placement, Replicate) for placement in tensor.placements):
        return "plain"
    return "sharded" if is_sharded(tensor) else "general"


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether ``tensor`` is a DTensor with a Shard, and not a strided one, along one dimension of its mesh, and replicas along others."""
    # The exact type: in some releases of torch a strided shard is a subclass of Shard.
    kinds = [type(placement) for placement in tensor.placements] if isinstance(tensor, DTensor) else []
    return kinds.count(Shard) == 1 and kinds.count(Replicate) == len(kinds) - 1


def sharded_dim(tensor: DTensor) -> int:
    """The dimension of its mesh along which a tensor that `is_sharded` is cut."""
    return next(dim for dim, placement in enumerate(tensor.placements) if isinstance(placement, Shard))


def num_shards(tensor: DTensor) -> int:
    """How many shards make up a tensor that `is_sharded`."""
    return tensor.device_mesh.size(sharded_dim(tensor))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of ``tensor``: under ``torch.no_grad()`` the very storage of a DTensor; a plain tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor`` on every rank of its mesh, in its global shape; as many collectives as `DTensor.full_tensor` needs."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(full: Tensor, like: DTensor) -> Tensor:
    """This rank's part of ``full`` as ``like`` is placed, without communication.

    ``full`` has the global shape of ``like`` and is equal on all ranks.
    """
    replicas = DTensor.from_local(full, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return replicas.redistribute(placements=like.placements).to_local()


def extra_placements(like: DTensor, extra_shape: Sequence[int]) -> tuple[Placement, ...]:
    """Placements of a tensor of ``extra_shape`` that is kept beside ``like``, such as a second moment of its rows.

    Sharded as ``like`` is wherever its length along the sharded dimension is that of ``like``, replicated otherwise.
    """
    return tuple(
        Replicate() if _shared_dim(placement, like.shape, extra_shape) is None else placement
        for placement in like.placements
    )


def _shared_dim(placement: Placement, shape: Sequence[int], extra_shape: Sequence[int]) -> int | None:
    """The dimension along which both a tensor of ``shape`` and its extra are sharded, None where the extra is replicated."""
    dim = getattr(placement, "dim", None)
    return dim if dim is not None and tuple(extra_shape[dim : dim + 1]) == (shape[dim],) else None


def owner_shares(count: int, num_ranks: int, *, first: int = 0) -> list[range]:
    """Contiguous ranges of ``count`` matrices, one per rank; where they do not divide, ranks from ``first`` on own one more.

    A different ``first`` per bucket spreads the remainders of many small buckets.
    """
    share, rest = divmod(count, num_ranks)
    lengths = [share + ((rank - first) % num_ranks < rest) for rank in range(num_ranks)]
    return [range(start, stop) for start, stop in pairwise(accumulate(lengths, initial=0))]


@dataclass(frozen=True)
class _Layout:
    """What each of ``num_ranks`` ranks holds of a tensor of ``shape``: a chunk along ``dim``, or all of it where that is None."""

    shape: tuple[int, ...]
    dim: int | None
    num_ranks: int

    def _lengths(self, dim: int) -> list[int]:
        """Length of every rank's chunk along ``dim``, by the rule of torch.chunk, with empty chunks for the last ranks."""
        chunk = math.ceil(self.shape[dim] / self.num_ranks)
        return [min(chunk, max(0, self.shape[dim] - rank * chunk)) for rank in range(self.num_ranks)]

    @cached_property
    def local_shapes(self) -> list[tuple[int, ...]]:
        """The shape that each rank holds."""
        if self.dim is None:
            return [self.shape] * self.num_ranks
        before, after = self.shape[: self.dim], self.shape[self.dim + 1 :]
        return [(*before, length, *after) for length in self._lengths(self.dim)]

    def split(self, stack: Tensor) -> Sequence[Tensor]:
        """Cuts a stack of whole tensors, (matrices, ``*shape``), into a stack per rank of what that rank holds."""
        if self.dim is None:
            return [stack] * self.num_ranks
        return stack.split(self._lengths(self.dim), dim=self.dim + 1)

    def join(self, stacks: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`, of what is sharded."""
        assert self.dim is not None
        return torch.cat(list(stacks), dim=self.dim + 1)


class ShardExchange:
    """Moves the shards of a bucket of matrices to the ranks that own them, and the results back: one collective each way.

    A bucket is ``count`` tensors with the global shape, the mesh and the placement of ``like``, for which `kind` is ``sharded``; they may
    have any number of dimensions. Each may have an extra, a float32 tensor of ``extra_shape`` that lies as `extra_placements` says.
    ``owned`` is the range of the matrices that this rank owns; `owner_shares` explains ``first``. One exchange serves any number of steps.
    Raises ValueError for a ``like`` of another kind.
    """

    def __init__(self, like: DTensor, count: int, *, extra_shape: Sequence[int] | None = None, first: int = 0) -> None:
        if not is_sharded(like):
            raise ValueError(
                f"like has placements {like.placements}; expected one Shard, and Replicate along any other dimension of the mesh: "
                "use whole and local_shard for the rest"
            )
        dim = sharded_dim(like)
        mesh, placement, num_ranks = like.device_mesh, like.placements[dim], num_shards(like)
        self._group = mesh.get_group(dim)
        self._rank = mesh.get_local_rank(dim)
        self._count = count
        self._shares = owner_shares(count, num_ranks, first=first)
        self._layouts = [
            _Layout(tuple(shape), _shared_dim(placement, like.shape, shape), num_ranks)
            for shape in (like.shape, extra_shape)
            if shape is not None
        ]
        self.owned = self._shares[self._rank]

    def gather(self, shards: Sequence[Tensor], extras: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        """The whole matrices that this rank owns, (owned, ``*shape``), and their whole extras, (owned, ``*extra_shape``), both float32.

        ``shards`` are this rank's parts of all matrices and ``extras`` its parts of all extras, in order. A replicated extra does not
        travel: the owner has it. Raises ValueError for a wrong number or shape of the tensors.
        """
        payloads = [shards] if extras is None else [shards, extras]
        self._check(payloads, [layout.local_shapes[self._rank] for layout in self._layouts], self._count)
        owned = len(self.owned)
        outgoing = [list(shards[share.start : share.stop]) for share in self._shares]
        incoming = [[(owned, *shape)] for shape in self._layouts[0].local_shapes]
        travels = extras is not None and self._layouts[1].dim is not None
        if extras is not None and travels:
            for tensors, share in zip(outgoing, self._shares, strict=True):
                tensors.extend(extras[share.start : share.stop])
            for shapes, shape in zip(incoming, self._layouts[1].local_shapes, strict=True):
                shapes.append((owned, *shape))
        received = self._exchange(outgoing, incoming, torch.float32)
        wholes = self._layouts[0].join([parts[0] for parts in received])
        if extras is None:
            return wholes, None
        if travels:
            return wholes, self._layouts[1].join([parts[1] for parts in received])
        return wholes, torch.stack(list(extras))[self.owned.start : self.owned.stop].float()

    def scatter(
        self, wholes: Tensor, extras: Tensor | None = None, *, dtype: torch.dtype = torch.float32
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """This rank's parts of all matrices and of all extras, in order, from what their owners pass: the inverse of `gather`.

        ``wholes`` is (owned, ``*shape``) and ``extras`` float32 (owned, ``*extra_shape``). The matrices travel and arrive in ``dtype``,
        float32 or narrower, as views of one buffer; extras arrive bit for bit. Raises ValueError for a wrong shape.
        """
        payloads = [[wholes]] if extras is None else [[wholes], [extras]]
        self._check(payloads, [(len(self.owned), *layout.shape) for layout in self._layouts], 1)
        here = [layout.local_shapes[self._rank] for layout in self._layouts]
        outgoing = [[part] for part in self._layouts[0].split(wholes)]
        incoming = [[(len(share), *here[0])] for share in self._shares]
        if extras is not None:
            words = math.prod(here[1]) * (torch.float32.itemsize // dtype.itemsize)
            for tensors, part in zip(outgoing, self._layouts[1].split(extras), strict=True):
                tensors.append(part.clone(memory_format=torch.contiguous_format).view(-1).view(dtype))
            for shapes, share in zip(incoming, self._shares, strict=True):
                shapes.append((len(share) * words,))
        received = self._exchange(outgoing, incoming, dtype)
        shards = [shard for parts in received for shard in parts[0].unbind()]
        if extras is None:
            return shards, None
        # Cloned, because float32 numbers have to start at a multiple of four bytes.
        stacks = [
            parts[1].clone().view(torch.float32).view(len(share), *here[1])
            for parts, share in zip(received, self._shares, strict=True)
        ]
        return shards, [extra for stack in stacks for extra in stack.unbind()]

    def _exchange(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        incoming: Sequence[Sequence[tuple[int, ...]]],
        dtype: torch.dtype,
    ) -> list[list[Tensor]]:
        """Sends every rank its list of tensors and receives from every rank tensors of the ``incoming`` shapes, all in one flat buffer."""
        pieces = [piece for tensors in outgoing for piece in tensors]
        sent = torch.empty(sum(piece.numel() for piece in pieces), dtype=dtype, device=pieces[0].device)
        places = sent.split([piece.numel() for piece in pieces])
        torch._foreach_copy_([place.view(piece.shape) for place, piece in zip(places, pieces, strict=True)], pieces)
        sizes = [sum(math.prod(shape) for shape in shapes) for shapes in incoming]
        received = sent.new_empty(sum(sizes))
        dist.all_to_all_single(
            received, sent, sizes, [sum(piece.numel() for piece in tensors) for tensors in outgoing], group=self._group
        )
        return [
            [
                part.view(shape)
                for part, shape in zip(segment.split([math.prod(s) for s in shapes]), shapes, strict=True)
            ]
            for segment, shapes in zip(received.split(sizes), incoming, strict=True)
        ]

    def _check(self, payloads: Sequence[Sequence[Tensor]], shapes: Sequence[tuple[int, ...]], count: int) -> None:
        """A wrong size would not fail here but hang or corrupt the other ranks."""
        got = [[tuple(tensor.shape) for tensor in tensors] for tensors in payloads]
        if got != [[shape] * count for shape in shapes]:
            raise ValueError(
                f"got shapes {got}; expected {count} of each of {list(shapes)} (matrices, then extras if there are any)"
            )


class OwnedShares:
    """Shares ``count`` matrices of one shape out to the ranks of a group that all hold them (DDP), and gathers the ranks' results.

    ``owned`` is the range of the matrices that this rank computes; None is the default group; `owner_shares` explains ``first``.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        *,
        count: int,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        first: int = 0,
    ) -> None:
        self._group = group
        self._shape = tuple(shape)
        self._dtype = dtype
        self._shares = owner_shares(count, dist.get_world_size(group), first=first)
        self.owned = self._shares[dist.get_rank(group)]

    def all_gather(self, stack: Tensor) -> Tensor:
        """The results of all ranks, (count, ``*shape``), from this rank's own, (owned, ``*shape``); one collective, in ``dtype``.

        Shares travel padded to the largest one. Raises ValueError for a wrong shape.
        """
        if tuple(stack.shape) != (len(self.owned), *self._shape):
            raise ValueError(
                f"stack has shape {tuple(stack.shape)}; expected {(len(self.owned), *self._shape)}, the owned matrices"
            )
        lengths = [len(share) for share in self._shares]
        sent = torch.zeros((max(lengths), *self._shape), dtype=self._dtype, device=stack.device)
        sent[: len(stack)] = stack
        received = sent.new_empty((len(lengths) * max(lengths), *self._shape))
        dist.all_gather_into_tensor(received, sent, group=self._group)
        if min(lengths) == max(lengths):
            return received
        shares = zip(received.split(max(lengths)), lengths, strict=True)
        return torch.cat([share[:length] for share, length in shares])
