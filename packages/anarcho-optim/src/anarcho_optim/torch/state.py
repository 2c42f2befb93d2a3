"""The state of one parameter, what errors call it, and whether a saved state is its own.

Notable: a saved state is checked whole before any of it is taken over, so that one of another model changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from anarcho_optim.groups import Blocks
from anarcho_optim.torch.matrices import layout, zeros_beside
from anarcho_optim.torch.routing import check_parameter, plain_name

Group = dict[str, Any]

MOMENTS = ("momentum", "exp_avg", "exp_avg_sq")
"""The parts of a state that have the parameter's shape."""


def fresh_state(
    parameter: Tensor, cut: Blocks | None, options: Mapping[str, Any], *, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A parameter's state before its first step, placed like it: AdamW's where ``cut`` is None, else Muon's.

    Moments of the parameter's shape are of the ``dtype``; what else there is, is small and float32.
    """
    zeros = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format).detach()
    if cut is None:
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {"exp_avg": zeros, "exp_avg_sq": torch.zeros_like(zeros), "step": step}
    if not options["normuon"]:
        return {"momentum": zeros}
    neurons = cut.neuron_shape(options["normuon_axis"])
    return {"momentum": zeros, "neuron_mean_sq": zeros_beside(parameter, neurons)}


def member_names(members: Sequence[Any], where: str) -> list[str]:
    """What errors call the members of the group ``where``: their own names, else their place and shape."""
    return [
        f"parameter {m[0]}" if isinstance(m, tuple) else f"parameter {i} of {where}, of shape {tuple(m.shape)},"
        for i, m in enumerate(members)
    ]


def named_parameters(groups: Sequence[Group]) -> Iterator[tuple[str, Tensor]]:
    """What errors call each parameter of an optimizer's groups, and the parameter."""
    for index, group in enumerate(groups):
        names = [f"parameter {name}" for name in group.get("param_names", [])]
        where = str(group.get("name", f"group {index}"))
        yield from zip(names or member_names(group["params"], where), group["params"], strict=True)


def check_member(name: str, parameter: Tensor, known: set[int]) -> None:
    """Raises ValueError that starts with ``name`` for a parameter that cannot be optimised or is ``known``, by its id; then it is."""
    check_parameter(name.removeprefix("parameter "), parameter)
    if not parameter.requires_grad:
        raise ValueError(f"{name} is frozen (requires_grad is False); expected a trainable parameter: leave it out")
    if id(parameter) in known:
        raise ValueError(f"{name} is given twice; expected every parameter in one place")
    known.add(id(parameter))


def check_gradients(groups: Sequence[Group]) -> None:
    """Raises ValueError that names a parameter whose gradient is not dense."""
    for index, group in enumerate(groups):
        if all(p.grad is None or p.grad.layout == torch.strided for p in group["params"]):
            continue
        for name, parameter in named_parameters([{"name": f"group {index}"} | group]):
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise ValueError(
                    f"the gradient of {name} has layout {parameter.grad.layout}; expected a dense one: "
                    "build its embedding with sparse=False"
                )


def matched_states(
    groups: Sequence[Group], state: Mapping[Tensor, dict[str, Tensor]], state_dict: Mapping[str, Any]
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Each parameter with its part of ``state_dict``; raises ValueError that names the first whose part is missing or another's."""
    own = list(named_parameters(groups))
    indices = [i for group in state_dict["param_groups"] for i in group["params"]]
    has_names = bool(groups) and "param_names" in groups[0]
    saved_names = [n for group in state_dict["param_groups"] for n in group.get("param_names", ())]
    if has_names and saved_names:
        _check_names([name.removeprefix("parameter ") for name, _ in own], saved_names)
    if len(own) != len(indices):
        raise ValueError(
            f"the state is of another model: it holds {len(indices)} parameters; expected this optimizer's {len(own)}"
        )
    return [
        (p, _matched(name, state[p], state_dict["state"].get(index, {})))
        for (name, p), index in zip(own, indices, strict=True)
    ]


def _check_names(own: Sequence[str], saved: Sequence[str]) -> None:
    for name, saved_name in zip_longest(own, saved):
        if name is None or saved_name is None or plain_name(name) != plain_name(saved_name):
            raise ValueError(
                f"the state is of another model: it holds {saved_name or 'nothing'} where {name or 'nothing'} is "
                f"expected ({len(saved)} parameters, {len(own)} expected)"
            )


def _matched(name: str, own: dict[str, Tensor], saved: dict[str, Tensor]) -> dict[str, Tensor]:
    expected = {key: tuple(value.shape) for key, value in own.items()}
    found = {key: tuple(value.shape) for key, value in saved.items()}
    if expected != found:
        raise ValueError(f"the state of {name} is {found}; expected {expected}: it is of another model or options")
    for key, value in own.items():
        if layout(value) != layout(saved[key]):
            raise ValueError(
                f"{key} in the state of {name} lies as {layout(saved[key])}; expected {layout(value)} (mesh and "
                "placements, None for a plain tensor): load it with torch.distributed.checkpoint"
            )
    return saved
