"""Muon for matrices and AdamW for the rest, as `mlx.optimizers.Optimizer` classes.

Notable: the state is a flat dictionary from a parameter's dotted name to its arrays, so `tree_flatten` gives the canonical names, such as
``layers.0.attention.q_proj.weight.momentum``, and the same names come back from a safetensors file. All matrices of a step are updated
together in `apply_gradients`. What schedules change is an array of the state: a compiled step sees it change without another trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_map_with_path

from anarcho_optim.config import OptimConfig
from anarcho_optim.groups import adamw_options, blocks, check_options, muon_options
from anarcho_optim.mlx.hyperparameters import SCHEDULED, ParamGroup
from anarcho_optim.mlx.routing import check_parameter
from anarcho_optim.mlx.update import MuonInput, Result, adamw_step, muon_step

Schedule = Callable[[mx.array], mx.array]

HYPERPARAMETERS = "hyperparameters"
"""The part of `MuonAdamW`'s state that holds the rates of each group."""


def _flatten(tree: Any) -> dict[str, Any]:
    return dict(tree_flatten(tree))


def _new_state(name: str, parameter: mx.array, options: Mapping[str, Any]) -> dict[str, mx.array]:
    """The state of a parameter before its first step; raises ValueError that names one which cannot be optimized so."""
    where = f"parameter {name}"
    check_parameter(name, parameter)
    if options["algorithm"] == "adamw":
        moments = {key: mx.zeros(parameter.shape, mx.float32) for key in ("exp_avg", "exp_avg_sq")}
        return moments | {"step": mx.array(0.0, mx.float32)}
    cut = blocks(parameter.shape, options, where=where)
    state = {"momentum": mx.zeros(parameter.shape, mx.float32)}
    if options["normuon"]:
        state["neuron_mean_sq"] = mx.zeros(cut.neuron_shape(options["normuon_axis"]), mx.float32)
    return state


def _check_name(name: str, reserved: Iterable[str]) -> None:
    if name.split(".")[0] in reserved:
        raise ValueError(
            f"a parameter is called {name}; expected another name: the optimizer's own state takes this one"
        )


def _check_shape(name: str, found: mx.array, expected: Sequence[int]) -> None:
    if found.shape != tuple(expected):
        raise ValueError(
            f"{name} has shape {found.shape} in the state; expected {tuple(expected)}: load the state of the same model"
        )


def _pairs(gradients: Any, parameters: Any, known: Iterable[str]) -> dict[str, tuple[mx.array, mx.array]]:
    """(weight, gradient) by name for each gradient; raises ValueError that names one which is unknown or of another shape."""
    weights = _flatten(parameters)
    pairs = {}
    for name, gradient in _flatten(gradients).items():
        if name not in known or name not in weights:
            where = "parameters" if name in known else "optimizer"
            raise ValueError(f"there is a gradient for {name}, which the {where} lack(s); expected the same model")
        if weights[name].shape != gradient.shape:
            raise ValueError(
                f"the gradient of {name} has shape {gradient.shape}; expected the parameter's {weights[name].shape}"
            )
        pairs[name] = (weights[name], gradient)
    return pairs


def _gated(rates: Mapping[str, mx.array], where: mx.array | None) -> Mapping[str, mx.array]:
    """The rates of a group, of which the learning rate is 0 where ``where`` is false."""
    return rates if where is None else {**rates, "lr": mx.where(where, rates["lr"], 0.0)}


def _muon(
    pairs: Mapping[str, tuple[mx.array, mx.array]],
    state: Mapping[str, dict[str, mx.array]],
    options: Mapping[str, Mapping[str, Any]],
    rates: Mapping[str, Mapping[str, mx.array]],
    *,
    where: mx.array | None = None,
    scale: mx.array | None = None,
) -> dict[str, Result]:
    """Muon's step by parameter name, from the four mappings by name; where ``where`` is false, rates must be 0."""
    inputs = [
        MuonInput(
            weight=weight,
            gradient=gradient,
            state=state[name],
            blocks=blocks(weight.shape, options[name], where=f"parameter {name}"),
            options=options[name],
            where=where,
            scale=scale,
            **{key: rates[name][key].astype(mx.float32) for key in SCHEDULED},
        )
        for name, (weight, gradient) in pairs.items()
    ]
    return dict(zip(pairs, muon_step(inputs), strict=True))


class MuonAdamW(Optimizer):
    """One optimizer with two update rules: each group's ``algorithm`` is ``"muon"`` or ``"adamw"``.

    ``groups`` are groups as `param_groups` builds them, ``params`` being (name, array) pairs; keys that a group leaves out take
    `OptimConfig`'s defaults (no weight decay). The attribute ``param_groups`` holds one mapping per group:
    ``optimizer.param_groups[0]["lr"] = 0.01`` is how a schedule sets a rate, and ``params`` in it lists names only. A parameter without a
    gradient is left alone, not decayed.

    Raises ValueError for a group without a known ``algorithm`` or with an option out of range, a group or parameter named twice, a Muon
    parameter that cannot be cut into matrices and a parameter that is not floating point.
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]]) -> None:
        super().__init__()
        self._state: dict[str, Any] = {**self._state, HYPERPARAMETERS: {}}
        self._reserved = frozenset(self._state)
        self._group_of: dict[str, ParamGroup] = {}
        self.param_groups: list[ParamGroup] = []
        for group in groups:
            self._add(dict(group))
        self._initialized = True

    def _add(self, group: dict[str, Any]) -> None:
        name = group.setdefault("name", f"group {len(self.param_groups)}")
        defaults = adamw_options if group.get("algorithm") == "adamw" else muon_options
        options = (
            defaults(OptimConfig())
            | {"algorithm": None, "weight_decay": 0.0}
            | group
            | {"params": [n for n, _ in group["params"]]}
        )
        check_options(options, where=f"group {name!r}")
        rates = self._state[HYPERPARAMETERS]
        if name in rates:
            raise ValueError(f"two groups are called {name!r}; expected different names: their rates are saved by name")
        rates[name] = {}
        self.param_groups.append(ParamGroup(options, rates[name]))
        for parameter_name, parameter in group["params"]:
            _check_name(parameter_name, self._reserved)
            if parameter_name in self._group_of:
                other = self._group_of[parameter_name]["name"]
                raise ValueError(
                    f"parameter {parameter_name} is in group {other!r} and in group {name!r}; expected it once"
                )
            self._state[parameter_name] = _new_state(parameter_name, parameter, options)
            self._group_of[parameter_name] = self.param_groups[-1]

    @property
    def state(self) -> dict[str, Any]:
        """Arrays by parameter name, the groups' rates under ``hyperparameters``, and ``step``; setting it is `load_state_dict`."""
        return self._state

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self.load_state_dict(state)

    @property
    def learning_rate(self) -> mx.array:
        """The first group's learning rate; setting it sets every group's, as `mlx.optimizers.MultiOptimizer` does."""
        return self.param_groups[0].array("lr")

    @learning_rate.setter
    def learning_rate(self, learning_rate: float | mx.array) -> None:
        for group in self.param_groups:
            group["lr"] = learning_rate

    def init(self, parameters: Any) -> None:
        """Checks that ``parameters``, a tree, are among the optimizer's; their state exists since the construction. Raises ValueError."""
        for name in _flatten(parameters):
            if name not in self._group_of:
                raise ValueError(f"parameter {name} is in no group; expected the model that the groups were built for")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state, flat by dotted name or as a tree, into the arrays that compiled functions may have captured.

        The rates under ``hyperparameters`` and ``step`` may be missing, as they are in a state that another framework saved; they then
        stay. Raises ValueError that names an array which is missing, unknown or of another shape, before anything is changed.
        """
        loaded = {name: mx.array(value) for name, value in _flatten(state).items()}
        own = _flatten(self._state)
        for name in loaded:
            if name not in own:
                raise ValueError(f"the state has {name}, which is unknown here; expected the state of the same model")
        for name, array in own.items():
            if name in loaded:
                _check_shape(name, loaded[name], array.shape)
            elif name.split(".")[0] not in self._reserved:
                raise ValueError(f"the state lacks {name}; expected the state of the same model with the same options")
        for name, value in loaded.items():
            owner, _, key = name.rpartition(".")
            self._owner(owner)[key] = value.astype(own[name].dtype)

    def _owner(self, path: str) -> dict[str, Any]:
        """The dictionary at a path of the state."""
        root, _, group = path.partition(".")
        if root == HYPERPARAMETERS:
            return self._state[HYPERPARAMETERS][group]
        return self._state[path] if path else self._state

    def apply_gradients(
        self, gradients: Any, parameters: Any, *, where: mx.array | None = None, scale: mx.array | None = None
    ) -> Any:
        """The updated parameters as a tree like ``gradients``, of which ``parameters``, also a tree, may be a superset; updates the state.

        The gradients are multiplied by the float32 scalar ``scale``, in float32, as they are read. Where the boolean scalar ``where`` is
        false, parameters and state stay as they are, whatever the gradients hold: a step that turns out not to be finite is left out
        without waiting for its numbers. Raises ValueError for a gradient whose parameter is unknown or of another shape.
        """
        pairs = _pairs(gradients, parameters, self._group_of)
        groups = self._group_of
        matrices = {name: pair for name, pair in pairs.items() if groups[name]["algorithm"] == "muon"}
        by_group = {name: _gated(rates, where) for name, rates in self._state[HYPERPARAMETERS].items()}
        rates = {name: by_group[groups[name]["name"]] for name in pairs}
        results = _muon(matrices, self._state, groups, rates, where=where, scale=scale)
        for name, (weight, gradient) in pairs.items():
            if name not in matrices:
                results[name] = adamw_step(
                    weight,
                    gradient,
                    self._state[name],
                    lr=rates[name]["lr"],
                    weight_decay=rates[name]["weight_decay"],
                    betas=groups[name]["betas"],
                    eps=groups[name]["eps"],
                    where=where,
                    scale=scale,
                )
        for name, (_, state) in results.items():
            self._state[name].update(state)
        self._state["step"] = self.step + (1 if where is None else where.astype(self.step.dtype))
        return tree_map_with_path(lambda name, _: results[name][0], gradients)


class Muon(Optimizer):
    """Muon alone, for matrices: a superset of `mlx.optimizers.Muon`'s signature, also as one of the optimizers of a `MultiOptimizer`.

    ``learning_rate``, ``momentum`` and ``weight_decay`` are numbers or MLX schedules. Unlike MLX's own Muon the decay is decoupled, the
    default coefficients and scale are `OptimConfig`'s, and a parameter of more than two dimensions needs ``flatten``. The options are
    those of a Muon group of `MuonAdamW`; ``split_sizes`` and ``num_heads`` hold for every parameter. The state is created by ``init`` or
    by the first step.

    Raises TypeError for an unknown option, ValueError for one out of range, and in ``init`` for a parameter with fewer than two
    dimensions, by name.
    """

    def __init__(
        self,
        learning_rate: float | Schedule,
        momentum: float | Schedule = 0.95,
        weight_decay: float | Schedule = 0.1,
        nesterov: bool = True,
        ns_steps: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        defaults = muon_options(OptimConfig()) | {"nesterov": nesterov, "ns_steps": ns_steps}
        known = [name for name in defaults if name not in ("algorithm", "lr")]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise TypeError(f"Muon has no option {unknown[0]!r}; expected one of {', '.join(known)}")
        rates = {"learning_rate": learning_rate, "weight_decay": weight_decay, "momentum": momentum}
        numbers = {name: 0.0 if callable(value) else value for name, value in rates.items()}
        self._options = defaults | options
        check_options(self._options | numbers | {"lr": numbers["learning_rate"]}, where="Muon")
        for name, value in rates.items():
            self._maybe_schedule(name, value)
        self._state: dict[str, Any]
        self._reserved = frozenset(self._state)

    @property
    def state(self) -> dict[str, Any]:
        """Arrays by parameter name, and the rates and ``step`` by theirs; may be set to a tree or a flat dictionary."""
        return self._state

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self._initialized = False
        self._state = {}
        for name, value in _flatten(state).items():
            owner, _, key = name.rpartition(".")
            (self._state.setdefault(owner, {}) if owner else self._state)[key] = value

    def init(self, parameters: Any) -> None:
        """Creates the state of each parameter of a tree that has none yet; raises ValueError that names one which is no matrix."""
        for name, parameter in _flatten(parameters).items():
            _check_name(name, self._reserved)
            new = _new_state(name, parameter, self._options)
            state = self._state.setdefault(name, {})
            for key, array in new.items():
                _check_shape(f"{name}.{key}", state.setdefault(key, array), array.shape)
        self._initialized = True

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """The updated parameters as a tree like ``gradients``, of which ``parameters``, also a tree, may be a superset; updates the state.

        Raises ValueError for a gradient whose parameter is unknown, of another shape or no matrix.
        """
        if not self._initialized or any(name not in self._state for name in _flatten(gradients)):
            self.init(gradients)
        for name, schedule in self._schedulers.items():
            self._state[name] = schedule(self.step)
        pairs = _pairs(gradients, parameters, self._state)
        own = {name: self._state[name] for name in ("learning_rate", "weight_decay", "momentum")}
        rates = own | {"lr": own["learning_rate"]}
        results = _muon(pairs, self._state, dict.fromkeys(pairs, self._options), dict.fromkeys(pairs, rates))
        for name, (_, state) in results.items():
            self._state[name].update(state)
        self._state["step"] = self.step + 1
        return tree_map_with_path(lambda name, _: results[name][0], gradients)
