"""What the CUDA path updates together: batches of matrices and of vectors, with tables of their addresses in device memory.

Notable: a plan depends on shapes, dtypes and options only; addresses and what schedules change are written into its tables where these lie,
so that kernels and captured graphs read them there.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from anarcho_optim.coefficients import Variant, iteration
from anarcho_optim.groups import Blocks, blocks
from anarcho_optim.scaling import shape_scale
from anarcho_optim.torch.newton_schulz import resolve_ns_dtype, stack_bytes

Group = dict[str, Any]
State = Mapping[Tensor, dict[str, Tensor]]

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SETTINGS = 7
"""Floats per group in the table of settings: lr, weight decay, and momentum, or beta1, beta2, eps; then the two of `CONTROLS`."""
CONTROLS = slice(5, 7)
"""Whether the step is left out (not 0), and what gradients are multiplied by: what a gradient scaler says of a step, on the device."""
NO_CONTROLS = (0.0, 1.0)


@functools.cache
def load_kernels() -> Any:
    """The module of Triton kernels, or None where Triton is not installed."""
    try:
        return importlib.import_module("anarcho_optim.torch.kernels")
    except ImportError:
        return None


@dataclass(kw_only=True)
class Piece:
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


def _pieces(member: int, cut: Blocks) -> Iterator[Piece]:
    starts = [sum(cut.sizes[:i]) for i in range(len(cut.sizes))]
    for matrix in range(cut.count):
        base = matrix * cut.rows * cut.columns
        for start, (rows, columns) in zip(starts, cut.shapes, strict=True):
            if rows and columns:
                offset = base + start * (cut.columns if cut.split_dim == 0 else 1)
                yield Piece(member=member, offset=offset, stride=cut.columns, rows=rows, columns=columns)


@dataclass(kw_only=True)
class MatrixBatch:
    """Matrices of one shape and group that are orthogonalised together; those stored transposed come first."""

    group: int
    options: Group
    pieces: list[Piece]
    parameter_dtype: torch.dtype
    gradient_dtype: torch.dtype
    state_dtype: torch.dtype
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
class VectorBatch:
    """Parameters of one AdamW group that share dtypes."""

    group: int
    members: list[int]
    parameter_dtype: torch.dtype
    gradient_dtype: torch.dtype
    state_dtype: torch.dtype
    whole_chunks: Tensor
    """(parameter, first element) of every chunk of `kernels.VECTOR_BLOCK` elements, int64."""
    last_chunks: Tensor
    """The same of the shorter last chunks."""
    table: Tensor = field(default_factory=lambda: torch.empty(0))
    aligned: bool = False


@dataclass(kw_only=True)
class Plan:
    parameters: list[Tensor]
    state: State
    kept: list[Tensor]
    """The state tensors of ``entries``, kept alive so that their identities stay theirs."""
    entries: list[dict[str, Tensor]]
    matrices: list[MatrixBatch]
    vectors: list[VectorBatch]
    leftover: list[tuple[int, list[Tensor]]]
    """Group and parameters that the general path updates."""
    settings: Tensor
    seed: Tensor
    """One number, from which the kernels draw how they round."""
    addresses: list[int] = field(default_factory=list)
    values: tuple[float, ...] = ()
    controlled: bool = False
    """Whether the table's `CONTROLS` may differ from `NO_CONTROLS`."""
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


def static_options(group: Group) -> list[tuple[str, Any]]:
    return [item for item in group.items() if item[0] not in DYNAMIC]


def settings_of(group: Group) -> tuple[Any, ...]:
    if group["algorithm"] == "muon":
        return group["lr"], group["weight_decay"], group["momentum"], 0.0, 0.0, *NO_CONTROLS
    return group["lr"], group["weight_decay"], *group["betas"], group["eps"], *NO_CONTROLS


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


def build(groups: Sequence[Group], state: State, *, scratch_bytes: int) -> Plan:
    """The plan of the parameters that have gradients; a batch of matrices takes at most `scratch_bytes`, unless one matrix does."""
    plan_parameters: list[Tensor] = []
    matrices: dict[tuple[Any, ...], list[Piece]] = {}
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
            moment = state[p]["exp_avg" if cut is None else "momentum"]
            key = (index, p.device, p.dtype, p.grad.dtype, moment.dtype)
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
    return Plan(
        parameters=plan_parameters,
        state=state,
        kept=[value for p in plan_parameters for value in state[p].values()],
        entries=[state[p] for p in plan_parameters],
        matrices=sorted(
            _matrix_batches(groups, matrices, plan_parameters, state, scratch_bytes=scratch_bytes),
            key=lambda b: -len(b.pieces) * b.shape[0] * b.shape[1],
        ),
        vectors=list(_vector_batches(plan_parameters, vectors)),
        leftover=leftover,
        settings=torch.zeros((len(groups), SETTINGS), dtype=torch.float32, device=device),
        seed=torch.zeros(1, dtype=torch.int64, device=device),
    )


def _matrix_batches(
    groups: Sequence[Group],
    found: dict[tuple[Any, ...], list[Piece]],
    parameters: Sequence[Tensor],
    state: State,
    *,
    scratch_bytes: int,
) -> Iterator[MatrixBatch]:
    for (index, device, dtype, gradient_dtype, state_dtype, rows, columns), pieces in found.items():
        group = groups[index]
        size = max(1, scratch_bytes // stack_bytes(rows, columns, element_bytes=2))
        pieces = sorted(pieces, key=lambda piece: not piece.tall)
        for start in range(0, len(pieces), size):
            batch = pieces[start : start + size]
            scales = [shape_scale(group["adjust_lr_fn"], piece.rows, piece.columns) for piece in batch]
            yield MatrixBatch(
                group=index,
                options=group,
                pieces=batch,
                parameter_dtype=dtype,
                gradient_dtype=gradient_dtype,
                state_dtype=state_dtype,
                ns_dtype=resolve_ns_dtype(group["ns_dtype"], device),
                variant=iteration(
                    group["variant"], ns_steps=group["ns_steps"], ns_coefficients=group["ns_coefficients"]
                ),
                scales=torch.tensor(scales, dtype=torch.float32, device=device),
                neurons=[_neurons(piece, parameters[piece.member], state, group) for piece in batch]
                if group["normuon"]
                else [],
            )


def _vector_batches(parameters: Sequence[Tensor], found: dict[tuple[Any, ...], list[int]]) -> Iterator[VectorBatch]:
    for (index, device, dtype, gradient_dtype, state_dtype), members in found.items():
        block = load_kernels().VECTOR_BLOCK
        whole = [
            (row, start)
            for row, member in enumerate(members)
            for start in range(0, parameters[member].numel() - block + 1, block)
        ]
        sizes = [parameters[member].numel() for member in members]
        last = [(row, size - size % block) for row, size in enumerate(sizes) if size % block]
        chunks = [torch.tensor(pairs, dtype=torch.int64, device=device) for pairs in (whole, last)]
        yield VectorBatch(
            group=index,
            members=members,
            parameter_dtype=dtype,
            gradient_dtype=gradient_dtype,
            state_dtype=state_dtype,
            whole_chunks=chunks[0],
            last_chunks=chunks[1],
        )


def fill_tables(plan: Plan, state: State) -> None:
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


def _set_table(plan: Plan, batch: MatrixBatch | VectorBatch, rows: list[list[int]], aligned: bool) -> None:
    """Overwrites a batch's table where it lies, because a captured graph reads it there."""
    new = torch.tensor(rows, dtype=torch.int64)
    if batch.table.shape != new.shape:
        batch.table = torch.empty_like(new, device=plan.settings.device)
    if batch.aligned != aligned:
        batch.aligned, plan.graph = aligned, None
    batch.table.copy_(new, non_blocking=True)


def _neurons(piece: Piece, parameter: Tensor, state: State, options: Group) -> Tensor:
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
