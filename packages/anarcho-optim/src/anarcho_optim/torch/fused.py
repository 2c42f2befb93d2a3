"""The CUDA path: Muon's and AdamW's update in a number of launches that does not grow with the number of layers.

Notable:

* The parameters' addresses are one table in device memory, uploaded only when one of them changed; what schedules change is another. So
  nothing is stacked but the half-precision iterate, nothing recompiles, and a captured graph survives gradients that move.
* All matrices of a shape, transposed or not, are one batch; its temporary memory is capped.
* Everything runs on one stream: what memory bounds, run beside the products on a second one, slowed these by as much as it saved.
* Whether a step counts, and what its gradients are multiplied by, may be known on the device alone (`found_inf`, `grad_scale`).
* What this path does not take (float32 iterations, DTensors, strided parameters, row equilibration) it leaves to the general one.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from anarcho_optim.memory import CUDA_SCRATCH_BYTES
from anarcho_optim.torch.newton_schulz import Products, iterate
from anarcho_optim.torch.plan import (
    CONTROLS,
    NO_CONTROLS,
    SETTINGS,
    Group,
    MatrixBatch,
    Plan,
    State,
    VectorBatch,
    build,
    fill_tables,
    load_kernels,
    settings_of,
    static_options,
)
from anarcho_optim.torch.update import frobenius_factor, normuon_factors

Record = Callable[[Callable[[], None]], Any]
"""Makes a graph of what a function gives the device to do, which is not done yet; what it returns does that in `replay`."""


class FusedStep:
    """Runs the part of a step that the kernels take, and says what is left."""

    def __init__(
        self,
        *,
        cuda_graph: bool,
        process_group: ProcessGroup | None,
        scratch_bytes: int = CUDA_SCRATCH_BYTES,
        stochastic_rounding: bool = False,
    ) -> None:
        if cuda_graph and process_group is not None:
            raise ValueError("cuda_graph is True with a process_group; expected at most one of them")
        self._cuda_graph, self._scratch_bytes = cuda_graph, scratch_bytes
        self.process_group, self.stochastic_rounding = process_group, stochastic_rounding
        self._record: Record | None = None
        self._can_record = True
        self._key: Any = None
        self._plan: Plan | None = None

    def use_graph(self, record: Record | None) -> None:
        """See `MuonAdamW.use_graph`."""
        self._record = record if self._can_record else None
        if self._plan is not None:
            self._plan.graph = None

    def __deepcopy__(self, memo: Any) -> FusedStep:
        copied = FusedStep(**self._settings)
        copied.process_group = self.process_group
        return copied

    def __reduce__(self) -> Any:
        return functools.partial(FusedStep, **self._settings), ()

    @property
    def _settings(self) -> dict[str, Any]:
        """The arguments of another one, in another process: a group of processes belongs to this one."""
        return {
            "cuda_graph": self._cuda_graph,
            "process_group": None,
            "scratch_bytes": self._scratch_bytes,
            "stochastic_rounding": self.stochastic_rounding,
        }

    def step(
        self,
        groups: Sequence[Group],
        state: State,
        *,
        found_inf: Tensor | None = None,
        grad_scale: Tensor | None = None,
    ) -> list[Group]:
        """Updates what it can of the parameters with gradients; returns the groups with the rest.

        The two scalars are a gradient scaler's: where ``found_inf`` is not 0 nothing changes, and gradients are divided by ``grad_scale``.
        They are read on the device, so the host need not know them.
        """
        parameters = [p for group in groups for p in group["params"]]
        if not any(p.is_cuda for p in parameters) or load_kernels() is None:
            return [group | {"params": [p for p in group["params"] if p.grad is not None]} for group in groups]
        # The device is idle until all of this is checked, hence the care for few and cheap calls.
        gradients = [p.grad for p in parameters]
        present = [g for g in gradients if g is not None]
        key = (
            list(map(id, parameters)),
            [g is None for g in gradients],
            [*map(Tensor.is_contiguous, present)],
            [g.dtype for g in present],
            [*map(static_options, groups)],
        )
        plan = self._plan
        if plan is None or key != self._key or not plan.holds(state):
            plan = self._plan = build(groups, state, scratch_bytes=self._scratch_bytes)
            self._key = key
        if plan.parameters:
            with torch.cuda.device(plan.settings.device):
                self._upload(plan, groups, state)
                _control(plan, found_inf, grad_scale)
                self._run(plan)
        return [groups[i] | {"params": rest} for i, rest in plan.leftover]

    def _upload(self, plan: Plan, groups: Sequence[Group], state: State) -> None:
        addresses = [*map(Tensor.data_ptr, plan.parameters), *(p.grad.data_ptr() for p in plan.parameters)]  # type: ignore[union-attr]
        if addresses != plan.addresses:
            fill_tables(plan, state)
            plan.addresses = addresses
        values = tuple(float(v) for group in groups for v in settings_of(group))
        if values != plan.values:
            # A pageable copy is staged before the call returns, so the host tensor may die.
            plan.settings.copy_(torch.tensor(values).view(-1, SETTINGS), non_blocking=True)
            plan.values = values
            plan.controlled = False

    def _run(self, plan: Plan) -> None:
        if self.stochastic_rounding:
            plan.seed.random_(2**31)
        as_graph = self._cuda_graph or self._record is not None
        if as_graph and plan.runs and plan.graph is None:
            plan.graph = self._recorded(plan)
        if plan.graph is None:
            self._launch(plan)
        else:
            plan.graph.replay()
        plan.runs += 1

    def _recorded(self, plan: Plan) -> Any:
        """The step as a graph, with nothing done yet; None where one from `use_graph` cannot be had, now or later."""
        if self._record is None:
            return _capture(lambda: self._launch(plan), device=plan.settings.device)
        try:
            return self._record(lambda: self._launch(plan))
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        self._can_record, self._record = False, None
        warnings.warn(f"an update could not be recorded as a CUDA graph ({reason}); it goes on without", stacklevel=2)
        return None

    def _launch(self, plan: Plan) -> None:
        seed = plan.seed if self.stochastic_rounding else None
        for batch in plan.matrices:
            orthogonal = _orthogonalize(batch, _advance(batch, plan.settings, seed), self.process_group)
            _apply(batch, orthogonal, plan.settings, seed)
            del orthogonal  # Or it would lie beside the next batch.
        for vectors in plan.vectors:
            _update_vectors(vectors, plan.settings, seed)


def _capture(work: Callable[[], None], *, device: torch.device) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    # Other threads, which prepare data or write files, may use the device meanwhile.
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
        work()
    return graph


def _control(plan: Plan, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
    """Writes what the scaler says into the table, or takes out what it said of an earlier step."""
    if found_inf is None and grad_scale is None and not plan.controlled:
        return
    skipped, factor = NO_CONTROLS
    columns = plan.settings[:, CONTROLS]
    columns[:, 0] = skipped if found_inf is None else found_inf
    columns[:, 1] = factor if grad_scale is None else 1.0 / grad_scale
    plan.controlled = found_inf is not None or grad_scale is not None


def _advance(batch: MatrixBatch, settings: Tensor, seed: Tensor | None) -> Tensor:
    """Advances the momenta of a batch; the normalised updates (matrices, rows <= columns)."""
    x = torch.empty((len(batch.pieces), *batch.shape), dtype=batch.ns_dtype, device=settings.device)
    load_kernels().advance_momentum(
        batch.table,
        settings[batch.group],
        batch.parts,
        x,
        nesterov=batch.options["nesterov"],
        gradient_dtype=batch.gradient_dtype,
        state_dtype=batch.state_dtype,
        aligned=batch.aligned,
        safety=batch.variant.safety,
        seed=seed,
    )
    return x


def _orthogonalize(batch: MatrixBatch, x: Tensor, process_group: ProcessGroup | None) -> Tensor:
    """The orthogonalised updates of a batch; ``x`` is overwritten. Under DDP, each rank computes its share."""
    products = Products(symmetric=load_kernels().symmetric_product, polynomial=load_kernels().polynomial)
    if process_group is None:
        return iterate(x, batch.variant, products=products)
    from anarcho_optim.torch.distributed import OwnedShares

    shares = OwnedShares(process_group, count=len(x), shape=x.shape[1:], dtype=x.dtype)
    owned = x[shares.owned.start : shares.owned.stop]
    return shares.all_gather(iterate(owned, batch.variant, products=products) if len(owned) else owned)


def _apply(batch: MatrixBatch, o: Tensor, settings: Tensor, seed: Tensor | None) -> None:
    """Applies the orthogonalised updates of a batch to its parameters."""
    options = batch.options
    factor = frobenius_factor(o).view(-1) if options["frobenius_normalization"] else None
    scales = batch.scales if factor is None else batch.scales * factor
    for first, number, tall in batch.parts:
        part = slice(first, first + number)
        # The neurons are a matrix's rows for axis -1: the stack's rows, or its columns where it is stored transposed.
        dim = int((options["normuon_axis"] == -1) == tall)
        factors = None
        if options["normuon"]:
            skipped = settings[batch.group, CONTROLS][0] != 0
            norms = None if factor is None else factor[part]
            factors = _normuon(batch.neurons[part], o[part], norms, options, dim, skipped=skipped)
        load_kernels().apply_updates(
            batch.table,
            settings[batch.group],
            scales,
            factors,
            o,
            first=first,
            number=number,
            tall=tall,
            factor_dim=-1 if factors is None else dim,
            parameter_dtype=batch.parameter_dtype,
            cautious=options["cautious_weight_decay"],
            aligned=batch.aligned,
            seed=seed,
        )


def _normuon(
    neurons: list[Tensor], o: Tensor, factor: Tensor | None, options: Group, dim: int, *, skipped: Tensor
) -> Tensor:
    """NorMuon's factors (matrices, neurons) of stacked updates, ``factor`` O, along ``dim``; unless ``skipped``, advances the means."""
    reduced = 2 - dim
    mean_sq = torch.linalg.vector_norm(o, dim=reduced, dtype=torch.float32).square() / o.shape[reduced]
    if factor is not None:
        mean_sq = mean_sq * factor.square().unsqueeze(-1)
    before = torch.stack(neurons)
    factors, running = normuon_factors(mean_sq, before, beta2=options["normuon_beta2"])
    torch._foreach_copy_(neurons, list(torch.where(skipped, before, running).unbind()))
    return factors


def _update_vectors(batch: VectorBatch, settings: Tensor, seed: Tensor | None) -> None:
    load_kernels().adamw(
        batch.table,
        batch.whole_chunks,
        batch.last_chunks,
        settings[batch.group],
        gradient_dtype=batch.gradient_dtype,
        parameter_dtype=batch.parameter_dtype,
        state_dtype=batch.state_dtype,
        aligned=batch.aligned,
        seed=seed,
    )
