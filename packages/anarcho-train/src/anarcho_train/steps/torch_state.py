"""The state of an optimizer of PyTorch as it is read from disk, under parameter names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


def load_optimizer(
    path: Path,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    *,
    part: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Sets the optimizer's state from ``<parameter>.<state>`` tensors; state that the optimizer creates late is created here.

    ``part`` is what this process keeps of a tensor that lies as another one does.
    """
    advice = "resume with the run's own config"
    with safe_open(path, framework="pt") as file:
        found = set(file.keys())
        names = {id(p): name for name, p in parameters.items()}
        expected = {
            f"{names[id(p)]}.{key}"
            for p, state in optimizer.state.items()
            for key, v in state.items()
            if isinstance(v, Tensor)
        }
        if missing := sorted(expected - found):
            raise ValueError(f"{path} lacks {missing[0]}; expected the state of this optimizer and model: {advice}")
        for full_name in sorted(found):
            name, _, key = full_name.rpartition(".")
            if name not in parameters or (expected and full_name not in expected):
                raise ValueError(f"{path} holds {full_name}, which this optimizer and model do not have: {advice}")
            parameter, value = parameters[name], file.get_tensor(full_name)
            if value.ndim and value.shape != parameter.shape:
                raise ValueError(
                    f"{path} holds {full_name} of shape {tuple(value.shape)}; expected {tuple(parameter.shape)}: {advice}"
                )
            state = optimizer.state[parameter]
            if key in state:
                state[key].copy_(part(value, state[key]))
            else:
                state[key] = value if key == "step" else part(value.to(parameter.device), parameter)
