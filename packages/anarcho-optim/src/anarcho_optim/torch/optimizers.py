"""Muon and AdamW as one `torch.optim.Optimizer`: the classes hold parameters, options and state; the mathematics is in `update`.

Notable:

* State is created eagerly, per parameter, in float32 and placed like the parameter, under the names ``momentum`` (and ``neuron_mean_sq``
  with NorMuon), ``exp_avg``, ``exp_avg_sq`` and ``step``: tensors only. It stays float32 when it is restored.
* Same-shape matrices run as one batched iteration; the memory of a batch is capped (`memory.batch_bytes`).
* Gradients are never modified; a parameter without a gradient is left alone, not decayed.
* Under FSDP2 (DTensor) whole matrices travel to an owner and back; under DDP each rank orthogonalises a share (`process_group`).
* On CUDA, dense half-precision iterations take the path of `fused`: a fixed number of launches, whatever the number of layers.

Sources: Muon, Keller Jordan (https://kellerjordan.github.io/posts/muon/); AdamW, Loshchilov and Hutter, arXiv:1711.05101.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.adamw import adamw

from anarcho_optim.config import OptimConfig
from anarcho_optim.groups import Blocks, adamw_options, blocks, check_options, muon_options
from anarcho_optim.memory import batch_bytes
from anarcho_optim.torch import fused
from anarcho_optim.torch.matrices import Matrix, layout, local, local_gradient, update_matrices, zeros_beside
from anarcho_optim.torch.routing import check_parameter

Group = dict[str, Any]


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer with two update rules: each group's ``algorithm`` is ``"muon"`` or ``"adamw"``.

    ``params`` are groups as `param_groups` builds them: (name, parameter) pairs, or parameters alone, whose errors then name their place.
    Keys that a group leaves out take `OptimConfig`'s defaults (no weight decay). Learning-rate schedulers, gradient scalers, `state_dict`
    and `torch.distributed.checkpoint` work as with any torch optimizer.

    ``process_group`` (DDP): parameters are the same on its ranks, gradients already averaged; each rank orthogonalises a share of the
    matrices, and one collective per batch gathers the updates. ``cuda_graph`` replays the CUDA work of a step as one graph, which keeps
    the step's temporary memory allocated.

    Raises ValueError that names the parameter for one that is duplicated, frozen, sparse, complex or not floating point, that is no matrix
    in a Muon group without ``flatten``, or whose ``split_sizes`` do not add up; and for options out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        process_group: ProcessGroup | None = None,
        cuda_graph: bool = False,
    ) -> None:
        config = OptimConfig()
        defaults = adamw_options(config) | muon_options(config) | {"algorithm": None, "weight_decay": 0.0}
        self._process_group = process_group
        self._fused = fused.FusedStep(cuda_graph=cuda_graph, process_group=process_group)
        super().__init__(list(params), defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group, checks it and creates its state; raises ValueError as the class does."""
        where = str(param_group.get("name", f"group {len(self.param_groups)}"))
        members = param_group["params"]
        members = [members] if isinstance(members, Tensor) else list(members)
        names = _names(members, where)
        parameters = [p[1] if isinstance(p, tuple) else p for p in members]
        known = {id(p) for group in self.param_groups for p in group["params"]}
        for name, parameter in zip(names, parameters, strict=True):
            _check_member(name, parameter, known)
        options = self.defaults | {key: value for key, value in param_group.items() if key != "params"}
        check_options(options, where=where)
        cuts = [
            blocks(p.shape, options, where=name) if options["algorithm"] == "muon" else None
            for name, p in zip(names, parameters, strict=True)
        ]
        super().add_param_group(param_group | {"params": members})
        for parameter, cut in zip(parameters, cuts, strict=True):
            self.state[parameter].update(_fresh_state(parameter, cut, options))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state; unlike torch's default it stays float32 when the parameters are not.

        Raises ValueError that names the first parameter which the state lacks or holds in another shape; nothing is changed then.
        """
        pairs = list(self._pair(state_dict))
        super().load_state_dict(state_dict)
        for parameter, saved in pairs:
            self.state[parameter] = {
                key: value.to(device=parameter.device, dtype=torch.float32, copy=True) for key, value in saved.items()
            }

    def _pair(self, state_dict: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Each parameter with its saved state, checked against the state that it has."""
        own = [
            (name, p)
            for group in self.param_groups
            for name, p in zip(_group_names(group), group["params"], strict=True)
        ]
        saved_names = [n for group in state_dict["param_groups"] for n in group.get("param_names", group["params"])]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        if len(own) != len(indices):
            raise ValueError(
                f"the state is of another model: it holds {len(indices)} parameters, this optimizer {len(own)}; "
                f"the first that differs is {_first_difference([n for n, _ in own], saved_names)}"
            )
        for (name, parameter), index, saved_name in zip(own, indices, saved_names, strict=True):
            if isinstance(saved_name, str) and _base(name) != saved_name and "param_names" in self.param_groups[0]:
                raise ValueError(
                    f"the state is of another model: it holds {saved_name} where {_base(name)} is expected"
                )
            saved = state_dict["state"].get(index, {})
            expected = {key: tuple(value.shape) for key, value in self.state[parameter].items()}
            found = {key: tuple(value.shape) for key, value in saved.items()}
            if expected != found:
                raise ValueError(
                    f"the state of {name} is {found}; expected {expected}: it is of another model or options"
                )
            yield parameter, saved

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update from the gradients; parameters whose gradient is None are left alone. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self._fused.step(self.param_groups, self.state):
            if group["algorithm"] == "muon":
                self._muon_step(group)
            else:
                self._adamw_step(group)
        return loss

    def _muon_step(self, group: Group) -> None:
        members = [
            Matrix(p, local_gradient(p), self.state[p], blocks(p.shape, group, where="")) for p in group["params"]
        ]
        for batch in _batches(members):
            update_matrices(batch, group, process_group=self._process_group)

    def _adamw_step(self, group: Group) -> None:
        # Elementwise, so that shards are updated where they lie.
        parameters = [p for p in map(local, group["params"]) if p.numel()]
        members = [p for p in group["params"] if local(p).numel()]
        if not members:
            return
        states = [{key: local(value) for key, value in self.state[p].items()} for p in members]
        # Arithmetic is float32 whatever the parameters are; `float()` is no copy where they already are float32.
        weights = [p.float() for p in parameters]
        adamw(
            weights,
            [local_gradient(p).float() for p in members],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            eps=group["eps"],
            maximize=False,
        )
        for parameter, weight in zip(parameters, weights, strict=True):
            if parameter.dtype != torch.float32:
                parameter.copy_(weight)


class Muon(MuonAdamW):
    """Muon alone, with the arguments of `torch.optim.Muon` and this package's options; every parameter must be a matrix.

    A subclass only for its constructor: one group of `MuonAdamW` with these options. ``params`` are parameters, (name, parameter) pairs or
    groups. ``adjust_lr_fn=None`` means ``original``, as in torch; ``ns_coefficients`` (with ``ns_steps``) replaces ``variant``. ``eps`` is
    accepted for compatibility and not used: only a matrix of zeros needs a guard, and any other threshold would break scale invariance.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] | None = None,
        eps: float = 1e-7,
        ns_steps: int | None = None,
        adjust_lr_fn: str | None = "match_rms_adamw",
        process_group: ProcessGroup | None = None,
        cuda_graph: bool = False,
        **options: Any,
    ) -> None:
        settings = muon_options(OptimConfig()) | {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        unknown = sorted(set(options) - set(settings))
        if unknown:
            raise TypeError(f"Muon has no option {unknown[0]!r}; expected one of {', '.join(settings)}")
        settings |= options
        members = list(params)
        groups = members if members and isinstance(members[0], dict) else [{"params": members}]
        super().__init__([settings | group for group in groups], process_group=process_group, cuda_graph=cuda_graph)


def _names(members: list[Any], where: str) -> list[str]:
    """What errors call the members of a group: their own names, else their place and shape."""
    return [
        f"parameter {m[0]}" if isinstance(m, tuple) else f"parameter {i} of {where}, of shape {tuple(m.shape)},"
        for i, m in enumerate(members)
    ]


def _group_names(group: Group) -> list[str]:
    where = group.get("name", "a group")
    return [f"parameter {name}" for name in group.get("param_names", [])] or _names(group["params"], where)


def _base(name: str) -> str:
    return name.removeprefix("parameter ")


def _first_difference(own: list[str], saved: list[Any]) -> str:
    for name, other in zip(own, saved, strict=False):
        if isinstance(other, str) and _base(name) != other:
            return f"{_base(name)} (the state has {other})"
    longer = own if len(own) > len(saved) else saved
    return _base(str(longer[min(len(own), len(saved))]))


def _check_member(name: str, parameter: Tensor, known: set[int]) -> None:
    check_parameter(name.removeprefix("parameter "), parameter)
    if not parameter.requires_grad:
        raise ValueError(f"{name} is frozen (requires_grad is False); expected a trainable parameter: leave it out")
    if id(parameter) in known:
        raise ValueError(f"{name} is given twice; expected every parameter in one place")
    known.add(id(parameter))


def _fresh_state(parameter: Tensor, cut: Blocks | None, options: Group) -> dict[str, Tensor]:
    zeros = torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.preserve_format).detach()
    if cut is None:
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {"exp_avg": zeros, "exp_avg_sq": torch.zeros_like(zeros), "step": step}
    if not options["normuon"]:
        return {"momentum": zeros}
    neurons = cut.neuron_shape(options["normuon_axis"])
    return {"momentum": zeros, "neuron_mean_sq": zeros_beside(parameter, neurons)}


def _batches(members: list[Matrix]) -> Iterator[list[Matrix]]:
    """Splits matrices into lists of one shape, dtype, device and placement, none larger than `memory.batch_bytes` (unless one matrix is)."""
    buckets: dict[tuple[Any, ...], list[Matrix]] = {}
    for member in members:
        p = member.parameter
        buckets.setdefault((p.shape, p.dtype, p.device, layout(p)), []).append(member)
    for bucket in buckets.values():
        size = max(1, batch_bytes(bucket[0].parameter.device.type) // (4 * bucket[0].parameter.numel()))
        for start in range(0, len(bucket), size):
            yield bucket[start : start + size]
