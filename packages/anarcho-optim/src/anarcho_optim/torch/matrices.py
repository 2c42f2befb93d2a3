"""The update of one batch of Muon's matrices: alone, with a share per rank (DDP), or each matrix at its owner (FSDP2).

Notable: the ways differ only in who orthogonalises which matrices and how the results travel; momentum and decay always happen where the
parameters lie. `distributed`, which loads torch's DTensor, is imported only where a DTensor or a process group is met.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anarcho_optim.groups import Blocks
from anarcho_optim.torch.update import (
    Options,
    advance_momentum,
    apply_updates,
    common_scale,
    join_blocks,
    orthogonal_blocks,
    scaled_updates,
    split_blocks,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Matrix:
    """One parameter of a Muon group with what its update needs."""

    parameter: Tensor
    gradient: Tensor
    """Local part of the gradient."""
    state: dict[str, Tensor]
    blocks: Blocks


def is_dtensor(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, without loading that class."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, or the tensor itself."""
    part: Any = tensor
    return part.to_local() if is_dtensor(tensor) else tensor


def layout(tensor: Tensor) -> Hashable:
    """What tells two parameters of one shape apart that cannot be updated in one batch."""
    part: Any = tensor
    return (part.device_mesh, part.placements) if is_dtensor(tensor) else None


def num_owners(tensor: Tensor) -> int:
    """Number of ranks among which whole matrices like ``tensor`` are shared out by `ShardExchange`; 1 where they are not."""
    if not is_dtensor(tensor):
        return 1
    from anarcho_optim.torch.distributed import is_sharded, num_shards

    return num_shards(tensor) if is_sharded(tensor) else 1


def local_gradient(parameter: Tensor) -> Tensor:
    """The gradient's local part, placed like the parameter."""
    gradient: Any = parameter.grad
    like: Any = parameter
    if is_dtensor(parameter) and gradient.placements != like.placements:
        gradient = gradient.redistribute(placements=like.placements)
    return local(gradient)


def zeros_beside(parameter: Tensor, shape: Sequence[int]) -> Tensor:
    """Float32 zeros of ``shape`` on the parameter's device, sharded with it where their lengths agree and replicated elsewhere."""
    if not is_dtensor(parameter):
        return torch.zeros(shape, dtype=torch.float32, device=parameter.device)
    from torch.distributed.tensor import zeros

    from anarcho_optim.torch.distributed import extra_placements

    like: Any = parameter
    return zeros(*shape, dtype=torch.float32, device_mesh=like.device_mesh, placements=extra_placements(like, shape))


def update_matrices(
    batch: Sequence[Matrix],
    options: Options,
    *,
    process_group: ProcessGroup | None,
    first: int = 0,
    stochastic_rounding: bool = False,
) -> None:
    """One Muon step of parameters that share shape, dtype, device and placement.

    Where ranks share the work, ``first`` says on which of them one matrix more falls, as in `distributed.owner_shares`.
    """
    updates = advance_momentum(
        [local(m.state["momentum"]) for m in batch],
        [m.gradient for m in batch],
        momentum=float(options["momentum"]),
        nesterov=options["nesterov"],
        stochastic_rounding=stochastic_rounding,
    )
    if is_dtensor(batch[0].parameter):
        results = _of_dtensors(batch, updates, options, first)
    else:
        results = _of_tensors(batch, updates, options, process_group, first)
    apply_updates(
        [local(m.parameter) for m in batch],
        results,
        lr=float(options["lr"]),
        scale=common_scale(batch[0].blocks, options) or 1.0,
        weight_decay=float(options["weight_decay"]),
        cautious=options["cautious_weight_decay"],
        stochastic_rounding=stochastic_rounding,
    )


def _scale(
    pieces: Sequence[Tensor], out: Tensor, cut: Blocks, options: Options, moments: Sequence[Tensor]
) -> list[Tensor]:
    """Writes the scaled updates into ``out``; returns the new NorMuon moments of its parameters, if there are ``moments``."""
    if not moments:
        scaled_updates(pieces, out, cut, options, None)
        return []
    stacked = torch.stack(list(moments))
    scaled_updates(pieces, out, cut, options, stacked.view(-1, *stacked.shape[-2:]))
    return list(stacked.unbind())


def _moments(batch: Sequence[Matrix], options: Options) -> list[Tensor]:
    return [m.state["neuron_mean_sq"] for m in batch] if options["normuon"] else []


def _of_tensors(
    batch: Sequence[Matrix], updates: Tensor, options: Options, process_group: ProcessGroup | None, first: int
) -> Sequence[Tensor]:
    cut = batch[0].blocks
    pieces = (
        orthogonal_blocks(updates, cut, options)
        if process_group is None
        else _shared_out(updates, cut, options, process_group, first)
    )
    moments = [local(moment) for moment in _moments(batch, options)]
    new = _scale(pieces, updates, cut, options, moments)
    if new:
        torch._foreach_copy_(moments, new)
    return updates.unbind()


def _shared_out(
    updates: Tensor, cut: Blocks, options: Options, process_group: ProcessGroup, first: int
) -> list[Tensor]:
    """The orthogonalised blocks of replicated updates, each rank having computed its share."""
    from anarcho_optim.torch.distributed import OwnedShares

    count, shape = len(updates), (cut.count, cut.rows, cut.columns)
    shares = OwnedShares(process_group, count=count, shape=shape, first=first)
    owned = updates[shares.owned.start : shares.owned.stop]
    mine = join_blocks(orthogonal_blocks(owned, cut, options), cut).float().view(-1, *shape)
    return split_blocks(shares.all_gather(mine), cut)


def _of_dtensors(batch: Sequence[Matrix], updates: Tensor, options: Options, first: int) -> Sequence[Tensor]:
    from anarcho_optim.torch import distributed

    match distributed.kind(batch[0].parameter):
        case "plain":
            return _of_tensors(batch, updates, options, None, first)
        case "sharded":
            return _at_owners(batch, updates, options, first)
        case _:
            return _everywhere(batch, updates, options)


def _at_owners(batch: Sequence[Matrix], updates: Tensor, options: Options, first: int) -> Sequence[Tensor]:
    """Whole matrices at their owners: one collective to bring them there, one to bring the updates back."""
    from anarcho_optim.torch.distributed import ShardExchange

    like: Any = batch[0].parameter
    cut, moments = batch[0].blocks, _moments(batch, options)
    exchange = ShardExchange(like, len(batch), extra_shape=moments[0].shape if moments else None, first=first)
    extras = [local(moment) for moment in moments] or None
    wholes, whole_extras = exchange.gather(list(updates.unbind()), extras)
    pieces = orthogonal_blocks(wholes, cut, options)
    new = _scale(pieces, wholes, cut, options, [] if whole_extras is None else list(whole_extras.unbind()))
    if whole_extras is None:
        return exchange.scatter(wholes)[0]
    shards, new_extras = exchange.scatter(wholes, torch.stack(new) if new else whole_extras)
    torch._foreach_copy_(extras or [], new_extras or [])
    return shards


def _everywhere(batch: Sequence[Matrix], updates: Tensor, options: Options) -> Sequence[Tensor]:
    """Any other placement: every rank gathers and orthogonalises whole matrices, and keeps its part."""
    from torch.distributed.tensor import DTensor

    from anarcho_optim.torch.distributed import local_shard, whole

    cut, moments = batch[0].blocks, _moments(batch, options)
    wholes = []
    for member, update in zip(batch, updates.unbind(), strict=True):
        like: Any = member.parameter
        update_dtensor = DTensor.from_local(
            update, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        wholes.append(whole(update_dtensor))
    stack = torch.stack(wholes)
    new = _scale(orthogonal_blocks(stack, cut, options), stack, cut, options, [whole(m) for m in moments])
    for moment, value in zip(moments, new, strict=False):
        like = moment
        local(moment).copy_(local_shard(value, like))
    return [local_shard(update, m.parameter) for update, m in zip(stack.unbind(), batch, strict=True)]  # type: ignore[arg-type]
