"""The state of an optimizer of PyTorch on disk, under parameter names: what a process writes of tensors in shards, and reads.

Notable: a tensor in shards is never gathered. Each process writes the rows that it has, and reads the rows that it needs, whoever wrote
them and in however many parts. What all processes have, the first one writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from anarcho_train.steps.stored_state import StoredState, stored_state

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_ADVICE = "resume with the run's own config"


def rows_of(tensor: Tensor) -> range | None:
    """Which rows of a tensor this process has; None where it has all of it."""
    if not _is_shared(tensor) or all(placement.is_replicate() for placement in tensor.placements):
        return None
    (dim,) = (number for number, placement in enumerate(tensor.placements) if not placement.is_replicate())
    assert tensor.placements[dim].is_shard(0), "shards are of rows"
    # By the rule of torch.chunk: the last ones may have fewer rows, or none.
    rows, mesh = tensor.shape[0], tensor.device_mesh
    chunk = -(-rows // mesh.size(dim))
    first = min(rows, mesh.get_local_rank(dim) * chunk)
    return range(first, min(rows, first + chunk))


def own_part(
    tensors: Mapping[str, Tensor], *, first_process: bool, copy: bool
) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
    """What this process writes of the state, contiguous in the host's memory; of rows, which is the first and how many there are."""
    found: dict[str, Tensor] = {}
    notes: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        if not _writes(tensor, first_process=first_process):
            continue
        own = tensor.to_local() if _is_shared(tensor) else tensor
        found[name] = own.detach().to("cpu", copy=copy).contiguous()
        if rows := rows_of(tensor):
            notes[name] = (rows.start, tensor.shape[0])
    return found, notes


def _writes(tensor: Tensor, *, first_process: bool) -> bool:
    """Whether what this process has of a tensor is not written by another one that has it, too."""
    if not _is_shared(tensor):
        return first_process
    rows, mesh = rows_of(tensor), tensor.device_mesh
    replicated = [number for number, placement in enumerate(tensor.placements) if placement.is_replicate()]
    return (rows is None or bool(rows)) and not any(mesh.get_local_rank(dim) for dim in replicated)


def _is_shared(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it lies over several processes; a PyTorch that knows one process alone has no class for that."""
    return hasattr(tensor, "device_mesh")


@torch.no_grad()
def load_optimizer(directory: Path, optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> None:
    """Sets the optimizer's state from ``<parameter>.<state>`` tensors; state that the optimizer creates late is created here."""
    with stored_state(directory, framework="pt", join=lambda parts: torch.cat(list(parts))) as stored:
        _require_fitting(stored, optimizer, parameters)
        for full_name in sorted(stored.layouts):
            name, _, key = full_name.rpartition(".")
            parameter, state = parameters[name], optimizer.state[parameters[name]]
            if key not in state:
                plain = key == "step" or not stored.layouts[full_name].shape
                state[key] = stored.tensor(full_name) if plain else torch.empty_like(parameter)
            _fill(state[key], stored, full_name)


def _require_fitting(stored: StoredState, optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> None:
    """Raises ValueError naming the first tensor that is missing, left over or of another shape; nothing has been changed then."""
    names = {id(p): name for name, p in parameters.items()}
    expected = {
        f"{names[id(p)]}.{key}": value.shape
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    if missing := sorted(expected.keys() - stored.layouts.keys()):
        raise ValueError(
            f"{stored.place_of_all} lacks {missing[0]}; expected the state of this optimizer and model: {_ADVICE}"
        )
    for full_name, layout in sorted(stored.layouts.items()):
        parameter, path = parameters.get(full_name.rpartition(".")[0]), stored.place(full_name)
        if parameter is None or (expected and full_name not in expected):
            raise ValueError(f"{path} holds {full_name}, which this optimizer and model do not have: {_ADVICE}")
        shape = tuple(expected.get(full_name, parameter.shape))
        if layout.shape != shape and (layout.shape or full_name in expected):
            raise ValueError(f"{path} holds {full_name} of shape {layout.shape}; expected {shape}: {_ADVICE}")


def _fill(tensor: Tensor, stored: StoredState, name: str) -> None:
    """Sets what this process has of a tensor."""
    own = tensor.to_local() if _is_shared(tensor) else tensor
    rows = rows_of(tensor)
    if rows is None:
        own.copy_(stored.tensor(name))
    elif rows:
        own.copy_(stored.rows(name, rows.start, rows.stop))
