"""What a step in MLX keeps besides the model, and how it is written: the optimizer's arrays by canonical name, and the random generator.

Notable: arrays are set where they are, inside the optimizer's own dictionaries, because compiled functions have captured those.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten

from anarcho_train.steps.stored_state import StoredState

_thread = threading.local()


def param_groups(optimizer: Optimizer) -> Sequence[MutableMapping[str, Any]]:
    """The optimizer's groups, or one group of an optimizer that knows none; setting ``lr`` in a group sets its learning rate."""
    return getattr(optimizer, "param_groups", None) or [_WholeOptimizer(optimizer)]


def optimizer_arrays(optimizer: Optimizer, model: nn.Module) -> dict[str, mx.array]:
    """The arrays that are saved, by canonical name: ``<parameter>.<state>``.

    Rates are left out, because they follow from the configuration. A count of steps is kept where there is none for each parameter.
    """
    return {name: container[key] for name, (container, key) in _places(optimizer, model).items()}


def generator_state() -> mx.array:
    """The state of MLX's global random generator, uint32 (2,)."""
    return mx.random.state[0]  # pyright: ignore[reportIndexIssue]


def set_generator_state(state: np.ndarray) -> None:
    """Restores `generator_state`, which is a seed's two halves."""
    high, low = state.tolist()
    mx.random.seed((high << 32) | low)


class _WholeOptimizer(dict[str, Any]):
    """The one parameter group of an optimizer that knows none: its learning rate is set where it is set here."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(lr=optimizer.learning_rate.item())
        self._optimizer = optimizer

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if key == "lr":
            self._optimizer.learning_rate = value


def reset_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Sets the optimizer's arrays to what they are before its first step: zeros."""
    for container, key in _places(optimizer, model).values():
        container[key] = mx.zeros_like(container[key])


def _places(optimizer: Optimizer, model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Where the arrays that are saved lie: the container in the optimizer's state, and the key there, by canonical name."""
    parameters: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    counts = not hasattr(optimizer, "param_groups")
    return {
        name: (container, key)
        for name, container, key in leaves(optimizer.state)
        if name.rpartition(".")[0] in parameters or (counts and name == "step")
    }


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each array of a tree by dotted name, with the dictionary or list that holds it and its key there."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        name = f"{prefix}{key}"
        if isinstance(value, mx.array):
            yield name, tree, key
        elif isinstance(value, dict | list):
            yield from leaves(value, f"{name}.")


def structure_copy(tree: Any) -> Any:
    """A module, or what it is made of, with the same arrays, which it keeps when the model goes on to others."""
    if isinstance(tree, nn.Module):
        same = type(tree).__new__(type(tree))
        same.__dict__.update(tree.__dict__)
        dict.update(same, {name: structure_copy(value) for name, value in tree.items()})
        return same
    if isinstance(tree, dict):
        return {name: structure_copy(value) for name, value in tree.items()}
    return type(tree)(map(structure_copy, tree)) if type(tree) in (list, tuple) else tree


def own_stream() -> AbstractContextManager[Any]:
    """Lets this thread compute on the CPU, on a stream of its own; MLX's streams belong to threads."""
    if not hasattr(_thread, "stream"):
        _thread.stream = mx.new_stream(mx.cpu)
    return mx.stream(_thread.stream)


def write_arrays(path: Path, arrays: dict[str, mx.array]) -> None:
    """A safetensors file, one array after the other without a copy of them all.

    It goes through a file of Python's, because MLX's own writer says nothing when the disk is full.
    """
    try:
        with path.open("wb") as file:
            mx.save_safetensors(file, arrays)
    except OSError as error:
        raise OSError(f"{path.parent} cannot be written ({error}); free space there and resume the run") from error


class _ArrayFile:
    """A safetensors file as MLX itself reads it: `safe_open` takes slices of NumPy, which has no bfloat16.

    The bytes of an array are read when it is evaluated, and the file keeps none that it has handed out.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._arrays: dict[str, mx.array] = {}

    def get_tensor(self, name: str) -> mx.array:
        """All that the file has of a tensor."""
        if name not in self._arrays:
            arrays: Any = mx.load(str(self._path), format="safetensors")
            self._arrays = arrays
        return self._arrays.pop(name)

    get_slice = get_tensor


def load_optimizer(directory: Path, optimizer: Optimizer, model: nn.Module) -> None:
    """Sets the optimizer's arrays from a checkpoint, after all names and shapes were compared; ValueError names one that does not fit.

    Numbers keep the types that the optimizer has them in, whatever the file has: what PyTorch saved in bfloat16 becomes float32.
    """
    places = _places(optimizer, model)
    advice = "resume with the run's own config"
    stored = StoredState(directory, _ArrayFile, lambda parts: mx.concatenate(list(parts)))
    found = stored.layouts.keys()
    if not found:  # Of an optimizer that has made no step yet, PyTorch saves nothing.
        return
    if missing := sorted(places.keys() - found):
        raise ValueError(
            f"{stored.place_of_all} lacks {missing[0]}; expected the state of this optimizer and model: {advice}"
        )
    if unknown := sorted(found - places.keys()):
        path = stored.place(unknown[0])
        raise ValueError(f"{path} holds {unknown[0]}, which this optimizer and model do not have: {advice}")
    for name, (container, key) in sorted(places.items()):
        shape, expected = stored.layouts[name].shape, container[key].shape
        if shape != expected:
            path = stored.place(name)
            raise ValueError(f"{path} holds {name} of shape {shape}; expected {expected}: {advice}")
    for name, (container, key) in places.items():
        container[key] = stored.tensor(name).astype(container[key].dtype)
        mx.eval(container[key])  # Before the next one is read, so that there are no two copies of the state.
