"""Updates within the backward pass: the weights of a part of the model change as soon as their gradients are there, which then make room.

Notable: no more than one part's gradients exist at a time, where a step has one micro-batch. What the norm of all gradients would decide
cannot be: they are not clipped, and where one is not finite, its part alone stays as it is. Whether the loss allows an update is known
before, and decided on the device.

Source: LOMO (Lv et al. 2023, arXiv:2306.09782).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from anarcho_train.steps.torch_gradients import total_norm


class UpdatesInBackward:
    """Lets an optimizer with ``step_of(parameters)`` work while a model's backward pass goes on.

    The parts are what the model names in ``update_parts()``, else each parameter by itself. Raises ValueError for another optimizer.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if not hasattr(optimizer, "step_of"):
            raise ValueError(
                f"train.update_in_backward is true, but {type(optimizer).__name__} has no step_of; expected anarcho_optim's MuonAdamW"
            )
        self._optimizer: Any = optimizer
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named: Any = getattr(model, "update_parts", lambda: [[p] for p in model.parameters()])
        self._parts = [[p for p in part if id(p) in trained] for part in named()]
        self._part_of = {id(p): number for number, part in enumerate(self._parts) for p in part}
        self._missing: list[set[int]] = []
        self._norms: list[Tensor] = []
        self._wanted = torch.tensor(False)
        self._active = False
        for part in self._parts:
            for parameter in part:
                parameter.register_post_accumulate_grad_hook(self._arrived)

    @contextmanager
    def during(self, *, wanted: Tensor) -> Iterator[None]:
        """Gradients that become whole in the block are used at once, if ``wanted``, a scalar on the device, is true."""
        self._wanted, self._norms = wanted, []
        self._missing = [{id(p) for p in part} for part in self._parts]
        self._active = True
        try:
            yield
            for number, missing in enumerate(self._missing):
                if missing and any(p.grad is not None for p in self._parts[number]):
                    self._use(number)
        finally:
            self._active = False

    @property
    def norm(self) -> Tensor:
        """The norm of all gradients of the last step, a float32 scalar on the device."""
        return torch.linalg.vector_norm(torch.stack(self._norms)) if self._norms else torch.zeros(())

    @property
    def updated(self) -> Tensor:
        """Whether all parts have been updated, a scalar on the device."""
        return self._wanted & self.norm.isfinite()

    def _arrived(self, parameter: Tensor) -> None:
        if not self._active:
            return
        number = self._part_of[id(parameter)]
        self._missing[number].discard(id(parameter))
        if not self._missing[number]:
            self._use(number)

    @torch.no_grad()
    def _use(self, number: int) -> None:
        part: Sequence[Tensor] = self._parts[number]
        with record_function("optimizer"):
            norm = total_norm([p.grad for p in part if p.grad is not None])
            self._norms.append(norm)
            self._optimizer.found_inf = (~(self._wanted & norm.isfinite())).float()
            try:
                self._optimizer.step_of(part)
            finally:
                self._optimizer.found_inf = None
        for parameter in part:
            parameter.grad = None
