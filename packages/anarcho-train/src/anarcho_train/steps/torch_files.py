"""The state of a step in PyTorch on disk: model, optimizer, random generators and loss scale, as files in one directory.

Notable: everything is safetensors under parameter names, so that it depends neither on the step's class nor on the order of parameters,
and another framework, or another number of processes, reads it. Where the model lies in shards, each process writes its part of the
optimizer's state into a file of its own, and the first one all else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from anarcho_train.steps.files import RUNTIME_FILE
from anarcho_train.steps.torch_memory import host_copy
from anarcho_train.steps.torch_state import load_optimizer


@dataclass(frozen=True, kw_only=True)
class StateFile:
    """What a process writes of the optimizer's state."""

    name: str
    """Of the file."""
    tensors: dict[str, Tensor]
    """In the host's memory."""
    notes: dict[str, str] | None = None
    """Metadata that say which rows they are, of a part."""


class Parts(Protocol):
    """What a process holds of model and optimizer: `Replicas` or `Shards`."""

    shared: bool

    @property
    def writes_all(self) -> bool:
        """Whether this process writes what is of no process alone: model and random state."""
        ...

    def whole_model(self) -> nn.Module: ...

    def state_file(self, tensors: Mapping[str, Tensor], *, copy: bool) -> StateFile: ...

    def change(self, change: Callable[[nn.Module], None]) -> None: ...


class StateFiles:
    """Writes and reads what a step has to remember. ``scaler`` gives the one that is used now."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        parts: Parts,
        *,
        scaler: Callable[[], torch.amp.GradScaler],
        save_model: Callable[[nn.Module, Path], None],
        load_model: Callable[[nn.Module, Path], None],
    ) -> None:
        self._model, self._optimizer, self._parts, self._scaler = model, optimizer, parts, scaler
        self._save_model, self._load_model = save_model, load_model
        self._device = next(model.parameters()).device
        self._names = {id(p): name for name, p in model.named_parameters()}

    def save(self, directory: Path) -> None:
        """Writes the model's files, the optimizer's state and the random state into ``directory``; of shards, what is this process's."""
        self._write(directory, self._parts.whole_model, lambda: self._state_file(copy=False), self._runtime_tensors())

    def snapshot(self) -> Callable[[Path], None]:
        """A copy in the host's memory of what `save` would write now; what is returned writes it, from any thread."""
        optimizer, runtime = self._state_file(copy=True), self._runtime_tensors()
        if not self._parts.writes_all:
            return lambda directory: _save(optimizer, directory)
        model = self._parts.whole_model() if self._parts.shared else host_copy(self._model)
        return lambda directory: self._write(directory, lambda: model, lambda: optimizer, runtime)

    def load(self, directory: Path) -> None:
        """Restores what `save` wrote; raises ValueError naming the first tensor that is missing, left over or of another shape."""
        self._parts.change(lambda model: self._load_model(model, directory))
        parameters = dict(self._model.named_parameters())
        load_optimizer(directory, self._optimizer, parameters)
        self._load_runtime(directory / RUNTIME_FILE)

    def state_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state by canonical name, where and as it is."""
        return {
            f"{self._names[id(parameter)]}.{key}": value
            for parameter, state in self._optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }

    def _write(
        self,
        directory: Path,
        model: Callable[[], nn.Module],
        optimizer: Callable[[], StateFile],
        runtime: dict[str, Tensor],
    ) -> None:
        """Each part is asked for when it is written: of what lies on a device, a copy is made of it."""
        if self._parts.writes_all:
            with _disk_errors(directory):
                self._save_model(model(), directory)
                save_file(runtime, directory / RUNTIME_FILE)
        _save(optimizer(), directory)

    def _state_file(self, *, copy: bool) -> StateFile:
        """What this process writes of the optimizer's state."""
        return self._parts.state_file(self.state_tensors(), copy=copy)

    def _runtime_tensors(self) -> dict[str, Tensor]:
        tensors = {"rng.cpu": torch.get_rng_state()}
        if self._device.type != "cpu":
            tensors[f"rng.{self._device.type}"] = _device_module(self._device).get_rng_state()
        if self._scaler().is_enabled():
            state = self._scaler().state_dict()
            tensors["loss_scale"] = torch.tensor(float(state["scale"]))
            tensors["growth_tracker"] = torch.tensor(int(state["_growth_tracker"]))
        return tensors

    def _load_runtime(self, path: Path) -> None:
        device, scaler = self._device, self._scaler()
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if "rng.cpu" in names:  # Another framework's state has another generator.
                torch.set_rng_state(file.get_tensor("rng.cpu"))
            if device.type != "cpu" and f"rng.{device.type}" in names:
                _device_module(device).set_rng_state(file.get_tensor(f"rng.{device.type}"))
            if scaler.is_enabled() and "loss_scale" in names:
                state = {
                    "scale": float(file.get_tensor("loss_scale")),
                    "_growth_tracker": int(file.get_tensor("growth_tracker")),
                }
                scaler.load_state_dict(scaler.state_dict() | state)


def _save(file: StateFile, directory: Path) -> None:
    with _disk_errors(directory):
        # Of no tensors and no notes, safetensors 0.8 would write a header that is no JSON.
        save_file(file.tensors, directory / file.name, metadata=file.notes)


@contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    """What safetensors cannot write is an OSError: its text is the operating system's, for example that the disk is full."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{directory} cannot be written ({error}); free space there and resume the run") from error


def _device_module(device: torch.device) -> Any:
    return torch.mps if device.type == "mps" else torch.cuda
