"""Muon and AdamW as one `torch.optim.Optimizer`: the classes hold parameters, options and state; the mathematics is in `update`.

Notable:

* State is created eagerly, per parameter, in float32 unless ``state_dtype`` says otherwise, and placed like the parameter, under the names
  ``momentum`` (and ``neuron_mean_sq`` with NorMuon), ``exp_avg``, ``exp_avg_sq`` and ``step``: tensors only. It keeps its type when it
  is restored.
* Same-shape matrices run as one batched iteration; the memory of a batch is capped (`memory.batch_bytes`).
* Gradients are never modified; a parameter without a gradient is left alone, not decayed.
* Under FSDP2 (DTensor) whole matrices travel to an owner and back; under DDP each rank orthogonalises a share (`process_group`).
* What a gradient scaler says of a step (``found_inf``, ``grad_scale``) is taken as by torch's fused optimizers, on CUDA without waiting.
* On CUDA, dense half-precision iterations take the path of `fused`: a fixed number of launches, whatever the number of layers.
* torch.compile leaves a step as it is: traced, it would be compiled again whenever a schedule changes a rate.

Sources: Muon, Keller Jordan (https://kellerjordan.github.io/posts/muon/); AdamW, Loshchilov and Hutter, arXiv:1711.05101.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anarcho_optim.config import OptimConfig
from anarcho_optim.groups import adamw_options, blocks, check_keys, check_options, muon_options
from anarcho_optim.memory import CUDA_SCRATCH_BYTES, batch_bytes
from anarcho_optim.torch.matrices import Matrix, layout, local, local_gradient, num_owners, update_matrices
from anarcho_optim.torch.state import MOMENTS, check_gradients, check_member, fresh_state, matched_states, member_names
from anarcho_optim.torch.uncompiled import uncompiled, unguarded
from anarcho_optim.torch.vectors import Vector, update_vectors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from anarcho_optim.torch.fused import FusedStep, Record

Group = dict[str, Any]


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer with two update rules: each group's ``algorithm`` is ``"muon"`` or ``"adamw"``.

    ``params`` are groups as `param_groups` builds them: (name, parameter) pairs, or parameters alone, whose errors then name their place.
    Keys that a group leaves out take `OptimConfig`'s defaults (no weight decay). Learning-rate schedulers, gradient scalers, `state_dict`
    and `torch.distributed.checkpoint` work as with any torch optimizer; one that cycles the momentum finds AdamW's ``betas`` and cycles
    these, not Muon's ``momentum``.

    ``process_group`` (DDP): parameters are the same on its ranks, gradients already averaged; each rank orthogonalises a share of the
    matrices, and one collective per batch gathers the updates. ``cuda_graph`` replays the CUDA work of a step as one graph, which keeps
    the step's temporary memory allocated. ``cuda_scratch_bytes`` caps this memory on CUDA: a model of 138 million parameters has its best
    speed with half a gigabyte.

    ``state_dtype`` (float32 or bfloat16) is the type of moments. With ``stochastic_rounding`` moments and parameters of bfloat16 are
    rounded up or down at random, so that small changes are not lost; the random numbers are those of torch's generator of the device.

    Raises ValueError that names the parameter for one that is duplicated, frozen, sparse, complex or not floating point, that is no matrix
    in a Muon group without ``flatten``, or whose ``split_sizes`` do not add up; and for options that are unknown or out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        process_group: ProcessGroup | None = None,
        cuda_graph: bool = False,
        cuda_scratch_bytes: int = CUDA_SCRATCH_BYTES,
        state_dtype: torch.dtype = torch.float32,
        stochastic_rounding: bool = False,
    ) -> None:
        if state_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"state_dtype is {state_dtype}; expected torch.float32 or torch.bfloat16")
        config = OptimConfig()
        defaults = adamw_options(config) | muon_options(config) | {"algorithm": None, "weight_decay": 0.0}
        step = _fused_step(
            cuda_graph=cuda_graph,
            process_group=process_group,
            scratch_bytes=cuda_scratch_bytes,
            stochastic_rounding=stochastic_rounding,
        )
        self._begin(params, defaults, step, state_dtype=state_dtype)

    def _begin(
        self, params: Iterable[Any], defaults: Group, step: FusedStep, *, state_dtype: torch.dtype = torch.float32
    ) -> None:
        self._fused, self._state_dtype = step, state_dtype
        self._fused_parts: dict[tuple[int, ...], FusedStep] = {}
        self._step_supports_amp_scaling = (
            True  # so `torch.amp.GradScaler` leaves both to the step, and waits for nothing
        )
        # Schedulers look among the defaults for what they can schedule.
        super().__init__(params, defaults)

    def use_graph(self, record: Record | None) -> None:
        """From now on a step's CUDA work is one graph, as with ``cuda_graph``, but one that ``record`` makes; None takes that back.

        ``record`` captures what the function that it is given lets the device do, in memory that it may share with other graphs if none
        runs at the same time, and returns something with a method ``replay``. Gradients may lie in that memory, if ``record`` is given
        again whenever there are new ones: the step's graph, which spares what lay there when it was recorded, is then recorded anew.
        Where ``record`` fails, a warning says why, and steps go on without a graph.
        """
        self._fused.use_graph(record)

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group, checks it and creates its state; raises ValueError as the class does."""
        where = str(param_group.get("name", f"group {len(self.param_groups)}"))
        check_keys(param_group, where=where)
        members = param_group["params"]
        if isinstance(members, set):
            raise TypeError(f"{where} is given a set of parameters; expected a list, whose order stays the same")
        members = [members] if isinstance(members, Tensor) else list(members)
        names = member_names(members, where)
        parameters = [p[1] if isinstance(p, tuple) else p for p in members]
        known = {id(p) for group in self.param_groups for p in group["params"]}
        for name, parameter in zip(names, parameters, strict=True):
            check_member(name, parameter, known)
        options = self.defaults | param_group
        check_options(options, where=where)
        cuts = [
            blocks(p.shape, options, where=name) if options["algorithm"] == "muon" else None
            for name, p in zip(names, parameters, strict=True)
        ]
        unguarded(super().add_param_group)(param_group | {"params": members})
        for parameter, cut in zip(parameters, cuts, strict=True):
            self.state[parameter].update(fresh_state(parameter, cut, options, dtype=self._state_dtype))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state; unlike torch's default it keeps its own type, float32 or ``state_dtype``, when the parameters have another.

        Raises ValueError that names the first parameter which the state lacks or holds in another shape; nothing is changed then.
        """
        pairs: list[tuple[Tensor, dict[str, Tensor]]] = []

        def check(_: torch.optim.Optimizer, adapted: dict[str, Any]) -> None:
            pairs.extend(matched_states(self.param_groups, self.state, adapted))

        # The last of the hooks, because those that were registered may have adapted the state to this model.
        hook = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for parameter, saved in pairs:
            self.state[parameter] = {
                key: value.to(
                    device=parameter.device,
                    dtype=self._state_dtype if key in MOMENTS else torch.float32,
                    copy=True,
                )
                for key, value in saved.items()
            }

    def __getstate__(self) -> dict[str, Any]:
        own = {
            "_fused": self._fused,
            "_fused_parts": {},
            "_state_dtype": self._state_dtype,
            "_step_supports_amp_scaling": True,
        }
        return super().__getstate__() | own

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update from the gradients; parameters whose gradient is None are left alone. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update(self.param_groups, self._fused)
        return loss

    @torch.no_grad()
    def step_of(self, parameters: Iterable[Tensor]) -> None:
        """One update of these parameters alone, for example within a backward pass, where their gradients are there before others'.

        Calls with the same parameters are as fast as whole steps of so many.
        """
        chosen = {id(p): p for p in parameters}
        groups = [group | {"params": [p for p in group["params"] if id(p) in chosen]} for group in self.param_groups]
        key = tuple(sorted(chosen))
        if key not in self._fused_parts:
            self._fused_parts[key] = copy.deepcopy(self._fused)
        self._update(groups, self._fused_parts[key])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        unguarded(super().zero_grad)(set_to_none)

    @uncompiled
    def _update(self, groups: list[Group], fused: FusedStep) -> None:
        check_gradients(groups)
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        rest = fused.step(groups, self.state, found_inf=found_inf, grad_scale=grad_scale)
        if found_inf is not None and any(group["params"] for group in rest) and bool(found_inf):
            return
        for group in rest:
            if group["algorithm"] == "muon":
                self._muon_step(group, grad_scale)
            else:
                self._adamw_step(group, grad_scale)

    def _muon_step(self, group: Group, grad_scale: Tensor | None) -> None:
        members = [
            Matrix(p, _unscaled(local_gradient(p), grad_scale), self.state[p], blocks(p.shape, group, where=""))
            for p in group["params"]
            if p.numel()
        ]
        first = 0
        for batch in _batches(members):
            update_matrices(
                batch,
                group,
                process_group=self._fused.process_group,
                first=first,
                stochastic_rounding=self._fused.stochastic_rounding,
            )
            first += len(batch)

    def _adamw_step(self, group: Group, grad_scale: Tensor | None) -> None:
        # Elementwise, so that shards are updated where they lie. A rank without elements counts the steps nevertheless, and takes part in
        # what brings a gradient to its parameter.
        all_gradients = [local_gradient(p) for p in group["params"]]
        members: list[Vector] = []
        for parameter, gradient in zip(group["params"], all_gradients, strict=True):
            if gradient.numel():
                state = {key: local(value) for key, value in self.state[parameter].items()}
                members.append(Vector(local(parameter), _unscaled(gradient, grad_scale), state))
            else:
                self.state[parameter]["step"] += 1
        update_vectors(members, group, stochastic_rounding=self._fused.stochastic_rounding)


class Muon(MuonAdamW):
    """Muon alone, with the arguments of `torch.optim.Muon` and this package's options; every parameter must be a matrix.

    A subclass only for its constructor: one group of `MuonAdamW` with these options, or one per group of ``params``, which are parameters,
    (name, parameter) pairs or groups of either, which may set keys of their own. Unlike in torch the scale is ``match_rms_adamw`` unless
    ``adjust_lr_fn`` says otherwise; None means ``original``, as in torch. ``ns_coefficients`` (with ``ns_steps``) replaces ``variant``.
    ``eps`` is accepted for compatibility and not used: only a matrix of zeros needs a guard, and any other threshold would break scale
    invariance. ``options`` are the other keys of a Muon group. Raises TypeError for an unknown one and ValueError as `MuonAdamW` does.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] | None = None,
        eps: float = 1e-7,
        ns_steps: int | None = None,
        adjust_lr_fn: str | None = "match_rms_adamw",
        *,
        process_group: ProcessGroup | None = None,
        cuda_graph: bool = False,
        cuda_scratch_bytes: int = CUDA_SCRATCH_BYTES,
        **options: Any,
    ) -> None:
        settings = muon_options(OptimConfig())
        known = set(settings) - {"algorithm"}
        for name in options:
            if name not in known:
                nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise TypeError(f"Muon has no option {name!r}; expected a key of a Muon group: is it {nearest!r}?")
        settings |= {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            **options,
        }
        step = _fused_step(cuda_graph=cuda_graph, process_group=process_group, scratch_bytes=cuda_scratch_bytes)
        self._begin(params, settings, step)

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group, checks it and creates its state; raises ValueError as the class does."""
        if param_group.get("algorithm", "muon") != "muon":
            raise ValueError(f"a group has algorithm {param_group['algorithm']!r}; expected 'muon': use MuonAdamW")
        super().add_param_group(param_group)


def _fused_step(**settings: Any) -> FusedStep:
    """What an optimizer needs of the CUDA path, which is loaded with the first one."""
    from anarcho_optim.torch.fused import FusedStep

    return FusedStep(**settings)


def _batches(members: list[Matrix]) -> Iterator[list[Matrix]]:
    """Splits matrices into lists of one shape, dtype, device and placement.

    None is larger than `memory.batch_bytes` for each rank that owns a share of it, unless one matrix is.
    """
    buckets: dict[tuple[Any, ...], list[Matrix]] = {}
    for member in members:
        p = member.parameter
        buckets.setdefault((p.shape, p.dtype, p.device, layout(p)), []).append(member)
    for bucket in buckets.values():
        parameter = bucket[0].parameter
        size = max(1, batch_bytes(parameter.device.type) // (4 * parameter.numel())) * num_owners(parameter)
        # As few batches as fit, but of one size: an odd remainder would leave cores idle.
        size = math.ceil(len(bucket) / math.ceil(len(bucket) / size))
        for start in range(0, len(bucket), size):
            yield bucket[start : start + size]


def _unscaled(gradient: Tensor, scale: Tensor | None) -> Tensor:
    """The gradient itself, or divided by the scale in a tensor of its own."""
    return gradient if scale is None else gradient.float() / scale.to(gradient.device)
