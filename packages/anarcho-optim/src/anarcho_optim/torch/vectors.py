"""AdamW's update of parameters of any shape, element by element: torch's own, in float32 whatever the types of weights and moments.

Source: Loshchilov and Hutter, arXiv:1711.05101.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from anarcho_optim.torch.rounding import copy_rounded_

PART_ELEMENTS = 2**22
"""So many elements of a narrow tensor are widened at a time."""
WIDENED = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Vector:
    """One parameter of an AdamW group, or its local part, with what its update needs."""

    weight: Tensor
    gradient: Tensor
    state: Mapping[str, Tensor]

    @property
    def narrow(self) -> bool:
        """Whether weight or moments are not float32."""
        return any(t.dtype != torch.float32 for t in (self.weight, *(self.state[key] for key in WIDENED)))

    @property
    def aligned(self) -> bool:
        """Whether elements at one place in memory belong together, as torch's fused kernels take for granted.

        Moments have the strides of their parameter unless that is a part of something larger.
        """
        tensors = (self.weight, self.gradient, *(self.state[key] for key in WIDENED))
        return all(t.is_contiguous() for t in tensors) or len({t.stride() for t in tensors}) == 1


def update_vectors(members: Sequence[Vector], options: Mapping[str, Any], *, stochastic_rounding: bool = False) -> None:
    """One AdamW step of all members, their step counts included."""
    wide = [replace(member, gradient=member.gradient.float()) for member in members if not member.narrow]
    for is_aligned in (True, False):
        if chosen := [member for member in wide if member.aligned is is_aligned]:
            _adamw(chosen, options, fused=is_aligned)
    for member in members:
        if member.narrow:
            _update_narrow(member, options, stochastic=stochastic_rounding)


def _update_narrow(member: Vector, options: Mapping[str, Any], *, stochastic: bool) -> None:
    """A part at a time, in copies that are rounded back; each part counts the same step."""
    step = member.state["step"]
    for part in _parts(member):
        counted = step.clone()
        state = {key: part.state[key].float() for key in WIDENED}
        copies = Vector(part.weight.float(), part.gradient.float(), {**state, "step": counted})
        _adamw([copies], options, fused=copies.aligned)
        for narrow, own in ((part.weight, copies.weight), *((part.state[key], state[key]) for key in WIDENED)):
            if narrow.dtype != torch.float32:
                copy_rounded_(narrow, own, stochastic=stochastic)
    step += 1


def _parts(member: Vector) -> Iterator[Vector]:
    """The member cut along its first dimension into parts that are small beside it."""
    rows = max(1, PART_ELEMENTS * len(member.weight) // member.weight.numel()) if member.weight.dim() else 0
    if not rows or rows >= len(member.weight):
        yield member
        return
    for start in range(0, len(member.weight), rows):
        part = slice(start, start + rows)
        state = {key: member.state[key][part] for key in WIDENED}
        yield Vector(member.weight[part], member.gradient[part], state)


def _adamw(members: Sequence[Vector], options: Mapping[str, Any], *, fused: bool) -> None:
    adamw(
        [m.weight for m in members],
        [m.gradient for m in members],
        [m.state["exp_avg"] for m in members],
        [m.state["exp_avg_sq"] for m in members],
        [],
        [m.state["step"] for m in members],
        foreach=False,
        fused=fused,
        amsgrad=False,
        beta1=options["betas"][0],
        beta2=options["betas"][1],
        lr=float(options["lr"]),
        weight_decay=float(options["weight_decay"]),
        eps=options["eps"],
        maximize=False,
    )
