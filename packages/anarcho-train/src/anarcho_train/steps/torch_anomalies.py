"""The first number that is not finite in a step of PyTorch: in a weight, a module's output, a function's gradient or a parameter's.

Notable: PyTorch's anomaly mode names the function of the backward pass, and notes where its forward was called; hooks name what it does
not know, the modules and parameters. The order is that of the arithmetic: what is found first is the cause of what comes after it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class _Found(Exception):
    """Ends the arithmetic; holds the sentence."""


class CheckedLoss:
    """A stage's loss that tells when it gets or gives what is not finite."""

    def __init__(self, loss: Any) -> None:
        self._loss = loss

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss, name)

    def __call__(self, logprobs: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if count := _not_finite(logprobs):
            raise _Found(f"the first that is not finite are log-probabilities ({count} of {logprobs.numel()})")
        for name, tensor in tensors.items():
            if count := _not_finite(tensor):
                raise _Found(f"the batch itself is not finite: its {name} ({count} of {tensor.numel()} numbers)")
        loss, measures = self._loss(logprobs, tensors)
        if _not_finite(loss):
            raise _Found(f"the first that is not finite is the loss itself ({type(self._loss).__name__})")
        return loss, measures


def first_anomaly(model: nn.Module, work: Callable[[], None]) -> str | None:
    """What is first not finite while ``work`` does the forward and backward passes of ``model``; None if everything is."""
    for name, parameter in model.named_parameters():
        if count := _not_finite(parameter):
            return f"the weights {name} are not finite themselves ({count} of {parameter.numel()}): go back to an earlier checkpoint"
    with warnings.catch_warnings(record=True) as notes, _hooks(model), torch.autograd.detect_anomaly(check_nan=True):
        warnings.simplefilter("always")
        try:
            work()
        except _Found as found:
            return str(found)
        except RuntimeError as error:
            function = re.search(r"Function '(\w+)' returned nan values", str(error))
            if function is None:
                raise
            return f"the first that is not finite is the gradient of {function[1]} in the backward pass{_place(notes)}"
    return None


@contextmanager
def _hooks(model: nn.Module) -> Iterator[None]:
    handles: list[Any] = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_hook(partial(_check_output, name)))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                handles.append(parameter.register_post_accumulate_grad_hook(partial(_check_gradient, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_output(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    for tensor in output if isinstance(output, tuple | list) else (output,):
        if isinstance(tensor, Tensor) and (count := _not_finite(tensor)):
            kind = type(module).__name__
            raise _Found(
                f"the first that is not finite is the output of {name or 'the model'} ({kind}) in the forward pass "
                f"({count} of {tensor.numel()} numbers)"
            )


def _check_gradient(name: str, parameter: Tensor) -> None:
    gradient = parameter.grad
    if gradient is not None and (count := _not_finite(gradient)):
        raise _Found(
            f"the first that is not finite is the gradient of the parameter {name} ({count} of {gradient.numel()} numbers)"
        )


def _not_finite(tensor: Tensor) -> int:
    if not tensor.is_floating_point():
        return 0
    return int((~torch.isfinite(tensor.detach())).sum())


def _place(notes: list[warnings.WarningMessage]) -> str:
    """The line of the forward pass that anomaly mode noted for the function: the innermost that is not PyTorch's own."""
    own = str(Path(torch.__file__).parent)
    frames = [
        frame
        for note in notes
        for frame in re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s+(.+)', str(note.message))
        if not frame[0].startswith(own)
    ]
    if not frames:
        return ""
    file, line, code = frames[-1]
    return f", whose forward is `{code.strip()}` ({file}, line {line})"
