"""What is to be measured: each case is one measurement, small enough to be handed to a process of its own as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from anarcho_cli.config import RunConfig, dumps, loads
from anarcho_cli.devices import Accelerators, Backend, Device, DeviceError, find_accelerators, resolve_device


class Kind(StrEnum):
    """What ``--only`` accepts."""

    training = "training"
    optimizer = "optimizer"
    generation = "generation"
    tokenizer = "tokenizer"
    data = "data"
    start_up = "start-up"

    @property
    def needs_framework(self) -> bool:
        """Whether it is measured with each framework and device, rather than once."""
        return self not in (Kind.tokenizer, Kind.data)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A framework and a device that it computes on."""

    backend: str
    """`torch` or `mlx`."""
    device: str
    """`cpu`, `cuda`, or `mps` for an Apple GPU, whichever framework uses it."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement."""

    kind: Kind
    """What is measured."""
    preset: str
    """Name of the preset that the configuration began with."""
    config: RunConfig
    """The shape of the model and of a training step."""
    steps: int
    """How many timed steps, updates, texts, passes or starts; the result is their median."""
    backend: str = ""
    """Framework that computes; empty where none is needed."""
    device: str = "cpu"
    """Device that it computes on."""

    def to_json(self) -> str:
        """The case as JSON; `from_json` gives an equal one."""
        return json.dumps({**dataclasses.asdict(self), "config": dumps(self.config)})

    @classmethod
    def from_json(cls, text: str) -> Case:
        """The case of `to_json`'s text."""
        values = json.loads(text)
        return cls(
            **{
                **values,
                "kind": Kind(values["kind"]),
                "config": loads(values["config"], origin="the case's configuration"),
            }
        )


def find_targets(
    backend: Backend | None,
    device: Device | None,
    *,
    installed: Callable[[str], bool],
    find: Callable[[str], Accelerators] = find_accelerators,
) -> list[Target]:
    """The back-ends and devices to measure: all that are here, or those that are asked for by name.

    Of a framework's devices on a Mac the Apple GPU stands for itself and the CPU beside it; MLX, which is built for one
    accelerator, has its CPU measured only where there is no other device. Raises DeviceError for what is not here.
    """
    wanted = [backend] if backend is not None else [name for name in Backend if installed(name.value)]
    if not wanted:
        raise DeviceError("neither PyTorch nor MLX is installed; run `pip install 'anarcho-cli[torch]'` or [mlx]")
    targets = [target for name in wanted for target in _targets(name, device, find)]
    if not targets:
        raise DeviceError(f"--device {device} is not here for {' or '.join(wanted)}; use --device cpu, or leave it out")
    return targets


def _targets(backend: Backend, device: Device | None, find: Callable[[str], Accelerators]) -> Iterable[Target]:
    if device is not None and device is not Device.auto:
        try:
            name = resolve_device(device, backend=backend, find=lambda: find(backend.value)).device
        except DeviceError:
            return []
        return [Target(backend=backend.value, device=name)]
    found = find(backend.value)
    names = [name for name, there in (("mps", found.mps), ("cuda", bool(found.cuda))) if there]
    if backend is Backend.torch or not names:
        names.append("cpu")
    return [Target(backend=backend.value, device=name) for name in names]
