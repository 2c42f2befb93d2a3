"""The CUDA path: Muon's and AdamW's update in a number of launches that does not grow with the number of layers.

Notable:

* The parameters' addresses are one table in device memory, uploaded only when one of them changed; what schedules change is another. So
  nothing is stacked but the half-precision iterate, nothing recompiles, and a captured graph survives gradients that move.
* All matrices of a shape, transposed or not, are one batch; its temporary memory is capped at `memory.CUDA_SCRATCH_BYTES`.
* Everything runs on one stream: what memory bounds, run beside the products on a second one, slowed these by as much as it saved.
* What this path does not take (float32 iterations, DTensors, strided parameters, row equilibration) it leaves to the general one.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from anarcho_optim.coefficients import Variant, iteration
from anarcho_optim.groups import Blocks, blocks
from anarcho_optim.memory import CUDA_SCRATCH_BYTES
from anarcho_optim.scaling import shape_scale
from anarcho_optim.torch.newton_schulz import Products, iterate, resolve_ns_dtype
from anarcho_optim.torch.update import frobenius_factor, normuon_factors

Group = dict[str, Any]
State = Mapping[Tensor, dict[str, Tensor]]

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SETTINGS = 5
"""Floats per group in the table of settings: lr, weight decay, and momentum, or beta1, beta2, eps."""


@functools.cache
def _kernels() -> Any:
    """The module of Triton kernels, or None where Triton is not installed."""
    try:
        return importlib.import_module("anarcho_optim.torch.kernels")
    except ImportError:
        return None


@dataclass(kw_only=True)
class _Piece:
    """One matrix of a batch: a block of a parameter."""

    member: int
    """Index of the parameter among all that the plan updates."""
    offset: int
    """Elements from the parameter's start."""
    stride: int
    """Elements from one row to the next."""
    rows: int
    columns: int

    @property
    def tall(self) -> bool:
        return self.rows > self.columns


def _pieces(member: int, cut: Blocks) -> Iterator[_Piece]:
    starts = [sum(cut.sizes[:i]) for i in range(len(cut.sizes))]
    for matrix in range(cut.count):
        base = matrix * cut.rows * cut.columns
        for start, (rows, columns) in zip(starts, cut.shapes, strict=True):
            if rows and columns:
                offset = base + start * (cut.columns if cut.split_dim == 0 else 1)
                yield _Piece(member=member, offset=offset, stride=cut.columns, rows=rows, columns=columns)


@dataclass(kw_only=True)
class _MatrixBatch:
    """Matrices of one shape and group that are orthogonalised together; those stored transposed come first."""

    group: int
    options: Group
    pieces: list[_Piece]
    parameter_dtype: torch.dtype
    gradient_dtype: torch.dtype
    ns_dtype: torch.dtype
    variant: Variant
    scales: Tensor
    """What each matrix's orthogonal update is multiplied by besides the learning rate."""
    neurons: list[Tensor]
    """With NorMuon, the one-dimensional part of ``neuron_mean_sq`` that belongs to each matrix."""
    table: Tensor = field(default_factory=lambda: torch.empty(0))
    aligned: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        piece = self.pieces[0]
        return min(piece.rows, piece.columns), max(piece.rows, piece.columns)

    @property
    def parts(self) -> list[tuple[int, int, bool]]:
        """(first, number, tall) of the transposed and of the other matrices."""
        tall = sum(piece.tall for piece in self.pieces)
        ranges = [(0, tall, True), (tall, len(self.pieces) - tall, False)]
        return [part for part in ranges if part[1]]


@dataclass(kw_only=True)
class _VectorBatch:
    """Parameters of one AdamW group that share dtypes."""

    group: int
    members: list[int]
    parameter_dtype: torch.dtype
    gradient_dtype: torch.dtype
    whole_chunks: Tensor
    """(parameter, first element) of every chunk of `kernels.VECTOR_BLOCK` elements, int64."""
    last_chunks: Tensor
    """The same of the shorter last chunks."""
    table: Tensor = field(default_factory=lambda: torch.empty(0))
    aligned: bool = False


@dataclass(kw_only=True)
class _Plan:
    parameters: list[Tensor]
    state: State
    kept: list[Tensor]
    """The state tensors of ``entries``, kept alive so that their identities stay theirs."""
    entries: list[dict[str, Tensor]]
    matrices: list[_MatrixBatch]
    vectors: list[_VectorBatch]
    leftover: list[tuple[int, list[Tensor]]]
    """Group and parameters that the general path updates."""
    settings: Tensor
    addresses: list[int] = field(default_factory=list)
    values: tuple[float, ...] = ()
    graph: torch.cuda.CUDAGraph | None = None
    runs: int = 0

    def __post_init__(self) -> None:
        self._identities = [*map(id, self.kept)]

    def holds(self, state: State) -> bool:
        """Whether the state tensors are still those that the plan was built for; loading or offloading replaces them."""
        current = [id(value) for entry in self.entries for value in entry.values()]
        return state is self.state and current == self._identities


DYNAMIC = {"params", "param_names", "lr", "weight_decay", "momentum", "betas", "eps", "initial_lr"}
"""Keys of a group that a plan does not depend on: names, and what the table of settings holds."""


def _static_options(group: Group) -> list[tuple[str, Any]]:
    return [item for item in group.items() if item[0] not in DYNAMIC]


class FusedStep:
    """Runs the part of a step that the kernels take, and says what is left."""

    def __init__(self, *, cuda_graph: bool, process_group: ProcessGroup | None) -> None:
        if cuda_graph and process_group is not None:
            raise ValueError("cuda_graph is True with a process_group; expected at most one of them")
        self._cuda_graph = cuda_graph
        self._process_group = process_group
        self._key: Any = None
        self._plan: _Plan | None = None

    def __deepcopy__(self, memo: Any) -> FusedStep:
        return FusedStep(cuda_graph=self._cuda_graph, process_group=self._process_group)

    def __reduce__(self) -> Any:
        return functools.partial(FusedStep, cuda_graph=self._cuda_graph, process_group=None), ()

    def step(self, groups: Sequence[Group], state: State) -> list[Group]:
        """Updates what it can of the parameters with gradients; returns the groups with the rest."""
        parameters = [p for group in groups for p in group["params"]]
        if not any(p.is_cuda for p in parameters) or _kernels() is None:
            return [group | {"params": [p for p in group["params"] if p.grad is not None]} for group in groups]
        # The device is idle until all of this is checked, hence the care for few and cheap calls.
        gradients = [p.grad for p in parameters]
        present = [g for g in gradients if g is not None]
        key = (
            list(map(id, parameters)),
            [g is None for g in gradients],
            [*map(Tensor.is_contiguous, present)],
            [g.dtype for g in present],
            [*map(_static_options, groups)],
        )
        plan = self._plan
        if plan is None or key != self._key or not plan.holds(state):
            plan = self._plan = _build(groups, state)
            self._key = key
        if plan.parameters:
            with torch.cuda.device(plan.settings.device):
                self._upload(plan, groups, state)
                self._run(plan)
        return [groups[i] | {"params": rest} for i, rest in plan.leftover]

    def _upload(self, plan: _Plan, groups: Sequence[Group], state: State) -> None:
        addresses = [*map(Tensor.data_ptr, plan.parameters), *(p.grad.data_ptr() for p in plan.parameters)]  # type: ignore[union-attr]
        if addresses != plan.addresses:
            _fill_tables(plan, state)
            plan.addresses = addresses
        values = tuple(float(v) for group in groups for v in _settings(group))
        if values != plan.values:
            # A pageable copy is staged before the call returns, so the host tensor may die.
            plan.settings.copy_(torch.tensor(values).view(-1, SETTINGS), non_blocking=True)
            plan.values = values

    def _run(self, plan: _Plan) -> None:
        if not self._cuda_graph or plan.runs == 0:
            self._launch(plan)
        else:
            if plan.graph is None:
                plan.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(plan.graph):
                    self._launch(plan)
            plan.graph.replay()
        plan.runs += 1

    def _launch(self, plan: _Plan) -> None:
        for batch in plan.matrices:
            orthogonal = _orthogonalize(batch, _advance(batch, plan.settings), self._process_group)
            _apply(batch, orthogonal, plan.settings)
        for vectors in plan.vectors:
            _update_vectors(vectors, plan.settings)


def _settings(group: Group) -> tuple[Any, ...]:
    if group["algorithm"] == "muon":
        return group["lr"], group["weight_decay"], group["momentum"], 0.0, 0.0
    return group["lr"], group["weight_decay"], *group["betas"], group["eps"]


def _takes(parameter: Tensor, group: Group, state: dict[str, Tensor], cut: Blocks | None) -> bool:
    """Whether the kernels can update this parameter."""
    gradient = parameter.grad
    assert gradient is not None
    plain = type(parameter) in (torch.nn.Parameter, Tensor) and type(gradient) is Tensor
    if not plain or not parameter.is_cuda or not parameter.numel():
        return False
    tensors = [parameter, gradient, *state.values()]
    if not all(t.is_contiguous() and t.layout == torch.strided for t in tensors):
        return False
    if parameter.dtype not in KERNEL_DTYPES or gradient.dtype not in KERNEL_DTYPES:
        return False
    if cut is None:
        return True
    half = resolve_ns_dtype(group["ns_dtype"], parameter.device) != torch.float32
    has_bfloat16 = torch.cuda.get_device_capability(parameter.device) >= (8, 0)
    return half and has_bfloat16 and not group["row_equilibration"]


def _build(groups: Sequence[Group], state: State) -> _Plan:
    plan_parameters: list[Tensor] = []
    matrices: dict[tuple[Any, ...], list[_Piece]] = {}
    vectors: dict[tuple[Any, ...], list[int]] = {}
    leftover: list[tuple[int, list[Tensor]]] = []
    for index, group in enumerate(groups):
        left: list[Tensor] = []
        for p in group["params"]:
            if p.grad is None:
                continue
            cut = blocks(p.shape, group, where="a parameter") if group["algorithm"] == "muon" else None
            if not _takes(p, group, state[p], cut):
                left.append(p)
                continue
            key = (index, p.device, p.dtype, p.grad.dtype)
            member = len(plan_parameters)
            plan_parameters.append(p)
            if cut is None:
                vectors.setdefault(key, []).append(member)
                continue
            for piece in _pieces(member, cut):
                shape = sorted((piece.rows, piece.columns))
                matrices.setdefault((*key, *shape), []).append(piece)
        if left:
            leftover.append((index, left))
    device = plan_parameters[0].device if plan_parameters else torch.device("cuda")
    return _Plan(
        parameters=plan_parameters,
        state=state,
        kept=[value for p in plan_parameters for value in state[p].values()],
        entries=[state[p] for p in plan_parameters],
        matrices=sorted(
            _matrix_batches(groups, matrices, plan_parameters, state),
            key=lambda b: -len(b.pieces) * b.shape[0] * b.shape[1],
        ),
        vectors=list(_vector_batches(plan_parameters, vectors)),
        leftover=leftover,
        settings=torch.zeros((len(groups), SETTINGS), dtype=torch.float32, device=device),
    )


def _matrix_batches(
    groups: Sequence[Group],
    found: dict[tuple[Any, ...], list[_Piece]],
    parameters: Sequence[Tensor],
    state: State,
) -> Iterator[_MatrixBatch]:
    for (index, device, dtype, gradient_dtype, rows, columns), pieces in found.items():
        group = groups[index]
        # The iterate before and after a segment, and four square stacks, in half precision.
        size = max(1, CUDA_SCRATCH_BYTES // (4 * rows * columns + 8 * rows * rows))
        pieces = sorted(pieces, key=lambda piece: not piece.tall)
        for start in range(0, len(pieces), size):
            batch = pieces[start : start + size]
            scales = [shape_scale(group["adjust_lr_fn"], piece.rows, piece.columns) for piece in batch]
            yield _MatrixBatch(
                group=index,
                options=group,
                pieces=batch,
                parameter_dtype=dtype,
                gradient_dtype=gradient_dtype,
                ns_dtype=resolve_ns_dtype(group["ns_dtype"], device),
                variant=iteration(
                    group["variant"], ns_steps=group["ns_steps"], ns_coefficients=group["ns_coefficients"]
                ),
                scales=torch.tensor(scales, dtype=torch.float32, device=device),
                neurons=[_neurons(piece, parameters[piece.member], state, group) for piece in batch]
                if group["normuon"]
                else [],
            )


def _vector_batches(parameters: Sequence[Tensor], found: dict[tuple[Any, ...], list[int]]) -> Iterator[_VectorBatch]:
    for (index, device, dtype, gradient_dtype), members in found.items():
        block = _kernels().VECTOR_BLOCK
        whole = [
            (row, start)
            for row, member in enumerate(members)
            for start in range(0, parameters[member].numel() - block + 1, block)
        ]
        sizes = [parameters[member].numel() for member in members]
        last = [(row, size - size % block) for row, size in enumerate(sizes) if size % block]
        chunks = [torch.tensor(pairs, dtype=torch.int64, device=device) for pairs in (whole, last)]
        yield _VectorBatch(
            group=index,
            members=members,
            parameter_dtype=dtype,
            gradient_dtype=gradient_dtype,
            whole_chunks=chunks[0],
            last_chunks=chunks[1],
        )


def _fill_tables(plan: _Plan, state: State) -> None:
    parameters = plan.parameters
    for batch in plan.matrices:
        rows = []
        for piece in batch.pieces:
            p = parameters[piece.member]
            assert p.grad is not None
            tensors = (p.grad, state[p]["momentum"], p)
            starts = [t.data_ptr() + piece.offset * t.element_size() for t in tensors]
            rows.append([*starts, piece.stride, int(piece.tall)])
        aligned = all(v % 16 == 0 for row in rows for v in row[:3]) and all(row[3] % 8 == 0 for row in rows)
        _set_table(plan, batch, rows, aligned)
    for vectors in plan.vectors:
        rows = []
        for member in vectors.members:
            p, s = parameters[member], state[parameters[member]]
            assert p.grad is not None
            tensors = (p.grad, p, s["exp_avg"], s["exp_avg_sq"], s["step"])
            rows.append([*(t.data_ptr() for t in tensors), p.numel()])
        _set_table(plan, vectors, rows, all(v % 16 == 0 for row in rows for v in row[:4]))


def _set_table(plan: _Plan, batch: _MatrixBatch | _VectorBatch, rows: list[list[int]], aligned: bool) -> None:
    """Overwrites a batch's table where it lies, because a captured graph reads it there."""
    new = torch.tensor(rows, dtype=torch.int64)
    if batch.table.shape != new.shape:
        batch.table = torch.empty_like(new, device=plan.settings.device)
    if batch.aligned != aligned:
        batch.aligned, plan.graph = aligned, None
    batch.table.copy_(new, non_blocking=True)


def _advance(batch: _MatrixBatch, settings: Tensor) -> Tensor:
    """Advances the momenta of a batch; the normalised updates (matrices, rows <= columns)."""
    x = torch.empty((len(batch.pieces), *batch.shape), dtype=batch.ns_dtype, device=settings.device)
    _kernels().advance_momentum(
        batch.table,
        settings[batch.group],
        batch.parts,
        x,
        nesterov=batch.options["nesterov"],
        gradient_dtype=batch.gradient_dtype,
        aligned=batch.aligned,
        safety=batch.variant.safety,
    )
    return x


def _orthogonalize(batch: _MatrixBatch, x: Tensor, process_group: ProcessGroup | None) -> Tensor:
    """The orthogonalised updates of a batch; ``x`` is overwritten. Under DDP, each rank computes its share."""
    products = Products(symmetric=_kernels().symmetric_product, polynomial=_kernels().polynomial)
    if process_group is None:
        return iterate(x, batch.variant, products=products)
    from anarcho_optim.torch.distributed import OwnedShares

    shares = OwnedShares(process_group, count=len(x), shape=x.shape[1:], dtype=x.dtype)
    owned = x[shares.owned.start : shares.owned.stop]
    return shares.all_gather(iterate(owned, batch.variant, products=products) if len(owned) else owned)


def _apply(batch: _MatrixBatch, o: Tensor, settings: Tensor) -> None:
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
            factors = _normuon(batch.neurons[part], o[part], None if factor is None else factor[part], options, dim)
        _kernels().apply_updates(
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
        )


def _normuon(neurons: list[Tensor], o: Tensor, factor: Tensor | None, options: Group, dim: int) -> Tensor:
    """NorMuon's factors (matrices, neurons) of stacked updates, ``factor`` O, along ``dim``; advances the running mean squares."""
    reduced = 2 - dim
    mean_sq = torch.linalg.vector_norm(o, dim=reduced, dtype=torch.float32).square() / o.shape[reduced]
    if factor is not None:
        mean_sq = mean_sq * factor.square().unsqueeze(-1)
    factors, running = normuon_factors(mean_sq, torch.stack(neurons), beta2=options["normuon_beta2"])
    torch._foreach_copy_(neurons, list(running.unbind()))
    return factors


def _neurons(piece: _Piece, parameter: Tensor, state: State, options: Group) -> Tensor:
    """The part of a parameter's ``neuron_mean_sq`` that belongs to one of its matrices, one-dimensional."""
    cut = blocks(parameter.shape, options, where="a parameter")
    matrix, rest = divmod(piece.offset, cut.rows * cut.columns)
    row, column = divmod(rest, cut.columns)
    whole = state[parameter]["neuron_mean_sq"].view(cut.count, *cut.neuron_shape(options["normuon_axis"])[-2:])[matrix]
    if options["normuon_axis"] == -1:
        block = _block_index(cut, column) if cut.split_dim == 1 else 0
        return whole[row : row + piece.rows, block]
    block = _block_index(cut, row) if cut.split_dim == 0 else 0
    return whole[block, column : column + piece.columns]


def _block_index(cut: Blocks, start: int) -> int:
    starts = [sum(cut.sizes[:i]) for i in range(len(cut.sizes))]
    return max(i for i, s in enumerate(starts) if s == start and cut.sizes[i])


def _update_vectors(batch: _VectorBatch, settings: Tensor) -> None:
    _kernels().adamw(
        batch.table,
        batch.whole_chunks,
        batch.last_chunks,
        settings[batch.group],
        gradient_dtype=batch.gradient_dtype,
        parameter_dtype=batch.parameter_dtype,
        aligned=batch.aligned,
    )
