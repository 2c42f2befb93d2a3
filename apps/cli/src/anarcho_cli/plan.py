"""What a run will cost before it begins: parameters, steps, memory and FLOPs, in closed form and without a framework."""

from __future__ import annotations

import dataclasses
import math
import platform
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from anarcho_model.footprint import MemoryForecast, training_memory
from anarcho_optim.memory import mlx_scratch_bytes, scratch_bytes

from anarcho_cli.config import RunConfig, to_dict
from anarcho_cli.diagnosis import cpu_features
from anarcho_cli.freed_memory import returns_freed_memory
from anarcho_cli.output import bytes_text, count_text

FLOAT32_BYTES = 4

LIBRARY_BYTES, CUDA_LIBRARY_BYTES = 295 * 2**20, 305 * 2**20
"""Resident memory of Python with PyTorch, its optimizer modules and the rest, without the tensors, and what PyTorch built for CUDA adds to
it on a CPU, too. Measured on Linux: the peak of steps less the tensors that were alive then was 630 to 650 MB in ten configurations."""
MPS_LIBRARY_BYTES = 850 * 2**20
"""The same on a Mac, where it is not measured yet."""
CUDA_WORKSPACE_BYTES = 64 * 2**20
"""What cuBLAS works in, taken from the device's allocator: on an H100, steps of most models took so much beside their tensors."""
MLX_LIBRARY_BYTES = 100 * 2**20
"""The same of Python with MLX, whose compiled functions are small; measured on Linux."""
LOADED_COMPILER_BYTES, COMPILER_BYTES = 150 * 2**20, 350 * 2**20
"""What PyTorch's compiler takes when it is loaded, as it is for gradient checkpointing and for several processes, and what compiling the
reference model adds; measured on Linux."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Several processes of PyTorch that train together."""

    count: int
    """How many there are."""
    machines: int = 1
    """On how many machines, as many on each."""
    strategy: Literal["ddp", "fsdp", "hybrid"] = "ddp"
    """How they share the model, as `train.strategy`."""

    def __post_init__(self) -> None:
        if self.machines < 1 or self.count < 1 or self.count % self.machines:
            raise ValueError(
                f"{self.count} processes cannot be on {self.machines} machines, as many on each; give a multiple of the machines"
            )

    @property
    def shards(self) -> int:
        """Into how many parts the model is cut."""
        return {"ddp": 1, "fsdp": self.count, "hybrid": self.count // self.machines}[self.strategy]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The size and cost of a run."""

    config: RunConfig
    """What the run does."""
    backend: str
    """The framework."""
    device: str
    """The device as asked for; `auto` is settled only when the run begins."""
    dtype_bytes: int
    """Bytes of an element in matrix products: 4 for float32, 2 for the half-precision types."""
    memory: MemoryForecast
    """Peak memory of a training step by part, in bytes."""
    library_bytes: int
    """Memory of interpreter, libraries and compiler, where it is the same memory as the model's."""
    flops: int
    """Floating-point operations of the whole run."""
    processes: Processes | None = None
    """Those that train together; the memory is that of the one that needs most, the first."""

    @property
    def total_bytes(self) -> int:
        """Forecast of the peak: on a CPU or an Apple GPU of the whole process, on a CUDA GPU of the device's memory."""
        return self.memory.total + self.library_bytes

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON: the configuration, and what follows from it."""
        return {
            "config": to_dict(self.config),
            "backend": self.backend,
            "device": self.device,
            "parameters": self.config.model.num_parameters,
            "trained_parameters": self.config.trained_parameters,
            "epochs": self.config.train.epochs,
            "steps": self.config.train.steps,
            "tokens": self.config.total_tokens,
            "batch_sequences": self.config.batch_sequences,
            "micro_batch": self.config.train.micro_batch,
            "gradient_checkpointing": self.config.train.gradient_checkpointing,
            "dtype_bytes": self.dtype_bytes,
            "processes": None if self.processes is None else dataclasses.asdict(self.processes),
            "memory_bytes": {**_parts(self.memory), "libraries": self.library_bytes, "total": self.total_bytes},
            "flops": self.flops,
        }

    def lines(self) -> list[str]:
        """The plan for people, one fact a line."""
        train = self.config.train
        dtype = "float32" if self.dtype_bytes == FLOAT32_BYTES else "half precision"
        adapter = f", frozen, and {self.config.trained_parameters:,} of an adapter" if self.config.lora.rank else ""
        epochs = (
            "" if train.epochs is None else f", {train.epochs:g} epoch{'' if train.epochs == 1 else 's'} of the data"
        )
        sequences = f"{self.config.batch_sequences} sequences of {self.config.sequence_length} tokens"
        return [
            f"back-end    {self.backend}, device {self.device}",
            f"parameters  {self.config.model.num_parameters:,}{adapter}",
            f"steps       {train.steps:,} of {sequences}{epochs}",
            f"tokens      {self.config.total_tokens:,}",
            f"at once     {train.micro_batch} sequences{', with gradient checkpointing' if train.gradient_checkpointing else ''}",
            *([] if self.processes is None else [f"processes   {_in_words(self.processes)}"]),
            f"memory      {bytes_text(self.total_bytes)} at the peak of a step in {dtype}"
            f"{'' if self.processes is None else ', in each process'}; of this, not all at once:",
            *(
                f"  {name.replace('_', ' '):20}{bytes_text(size):>12}"
                for name, size in {**_parts(self.memory), "libraries": self.library_bytes}.items()
                if size
            ),
            f"FLOPs       {self.flops:.3g} ({count_text(self.flops / self.config.total_tokens)} a token)",
        ]


def plan_run(
    config: RunConfig,
    *,
    device: str,
    backend: str = "torch",
    rows: int | None = None,
    processes: Processes | None = None,
) -> Plan:
    """The plan of a run with a framework on ``device`` (`auto`, `gpu`, `mps`, `cpu` or `cuda`).

    ``rows`` go through the model at once; left out, the micro-batch. Of a configuration that leaves this open, the least is planned.
    """
    if config.train.micro_batch == "auto" or config.train.gradient_checkpointing == "auto":
        size = 1 if config.train.micro_batch == "auto" else config.train.micro_batch
        checkpointing = config.train.gradient_checkpointing is True
        train = dataclasses.replace(config.train, micro_batch=size, gradient_checkpointing=checkpointing)
        config = dataclasses.replace(config, train=train)
    dtype_bytes = _dtype_bytes(config.train.precision, device, backend)
    return Plan(
        config=config,
        backend=backend,
        device=device,
        dtype_bytes=dtype_bytes,
        memory=_memory(config, device_kind(device), backend, dtype_bytes=dtype_bytes, rows=rows, processes=processes),
        library_bytes=library_bytes(
            config.train.compile,
            device,
            backend,
            loads_compiler=processes is not None or config.train.gradient_checkpointing is True,
        ),
        processes=processes,
        flops=config.flops_per_token * config.total_tokens,
    )


def _memory(
    config: RunConfig,
    kind: Literal["cpu", "mps", "cuda"],
    backend: str,
    *,
    dtype_bytes: int,
    rows: int | None,
    processes: Processes | None,
) -> MemoryForecast:
    mlx, micro_batch = backend == "mlx", config.train.fixed_micro_batch
    adamw_alone = config.lora.rank > 0 and config.lora.optimizer == "adamw"
    matrices = 0 if adamw_alone else _muon_parameters(config)
    scratch = mlx_scratch_bytes if mlx else scratch_bytes
    memory = training_memory(
        config.model,
        micro_batch=rows or micro_batch,
        length=config.sequence_length,
        compute_dtype_bytes=dtype_bytes,
        weight_dtype_bytes=dtype_bytes if config.train.lean else FLOAT32_BYTES,
        matrix_optimizer_bytes=2 if config.train.lean else 4,
        other_optimizer_bytes=4 if config.train.lean else 8,
        gradient_checkpointing=config.train.gradient_checkpointing is True,
        narrow_residual=config.train.narrow_residual,
        optimizer_scratch_bytes=scratch(kind, matrices) if matrices else 0,
        gradients_held=config.batch_sequences > micro_batch * (processes.count if processes else 1),
        narrow_gradients=not mlx and processes is None and dtype_bytes == 2 and _has_narrow_gradients(config, kind),
        gradients_freed=config.train.update_in_backward,
        segments=config.data.isolate_documents,
        adapter=config.lora,
        framework="mlx" if mlx else "torch",
        device=kind,
        compiled=config.train.compile != "off" and not config.train.float8,
        freed_is_returned=kind == "cpu" and returns_freed_memory(),
        # `auto` makes the copy only where there is room left; a GPU with memory of its own has it elsewhere.
        background_copy=config.train.save_in_background is True and kind != "cuda",
        shards=processes.shards if processes else None,
    )
    if mlx or kind != "cuda" or not matrices:
        return memory
    room = dataclasses.replace(memory, optimizer_scratch=0).transient - memory.before_update
    return dataclasses.replace(memory, optimizer_scratch=scratch_bytes(kind, matrices, room=room))


def _has_narrow_gradients(config: RunConfig, kind: str) -> bool:
    """Whether one process of PyTorch stores gradients in a half-precision type where nothing is added to them."""
    train = config.train
    saves_memory = train.update_in_backward or train.gradient_checkpointing is True
    return train.precision != "float16" and (train.lean or saves_memory or kind != "cpu")


def _in_words(processes: Processes) -> str:
    where = "" if processes.machines == 1 else f" on {processes.machines} machines"
    parts = "the whole model" if processes.shards == 1 else f"one of {processes.shards} shards of the model"
    return f"{processes.count}{where}, each with {parts} ({processes.strategy})"


def library_bytes(compilation: str, device: str, backend: str, *, loads_compiler: bool = False) -> int:
    """Memory of everything but the model. `auto` is counted as compiled, which is the larger of its possibilities."""
    if backend == "mlx":
        return MLX_LIBRARY_BYTES
    kind = device_kind(device)
    if kind != "cpu":
        return MPS_LIBRARY_BYTES if kind == "mps" else CUDA_WORKSPACE_BYTES
    cuda = CUDA_LIBRARY_BYTES if _is_built_for_cuda() else 0
    compiler = LOADED_COMPILER_BYTES if loads_compiler or compilation != "off" else 0
    return LIBRARY_BYTES + cuda + compiler + (0 if compilation == "off" else COMPILER_BYTES)


def device_kind(device: str) -> Literal["cpu", "mps", "cuda"]:
    """What a device as asked for is likely to be here: `auto` and `gpu` are an Apple GPU on a Mac, elsewhere a CPU and a CUDA GPU."""
    if device == "mps" or (device in ("auto", "gpu") and _is_apple()):
        return "mps"
    return "cuda" if device in ("cuda", "gpu") else "cpu"


def _is_built_for_cuda() -> bool:
    """Whether PyTorch, which is not loaded for this, brings the libraries for CUDA: their tables are in memory wherever it computes."""
    torch = find_spec("torch")
    places = torch.submodule_search_locations if torch else None
    return any(Path(place, "lib", "libtorch_cuda.so").is_file() for place in places or ())


def _is_apple() -> bool:
    return platform.system() == "Darwin" and platform.machine() == "arm64"


def _muon_parameters(config: RunConfig) -> int:
    """Numbers in the matrices that Muon updates: those of the blocks, or an adapter's."""
    if config.lora.rank:
        return config.trained_parameters
    shapes = config.model.tensor_shapes().items()
    return sum(math.prod(shape) for name, shape in shapes if len(shape) == 2 and ".layers." in name)


def _dtype_bytes(precision: str, device: str, backend: str) -> int:
    """Bytes of an element in matrix products, where `auto` means what the training step makes of it on this machine."""
    if precision != "auto":
        return FLOAT32_BYTES if precision == "float32" else 2
    if device_kind(device) != "cpu":
        return 2
    if backend == "mlx":
        return FLOAT32_BYTES
    return 2 if {"AVX512-BF16", "AMX-BF16"} & set(cpu_features()) else FLOAT32_BYTES


def _parts(memory: MemoryForecast) -> dict[str, int]:
    """Name -> bytes of the parts; they do not add up to the total, because not all exist at the same moment."""
    return {name: size for name, size in dataclasses.asdict(memory).items() if not isinstance(size, bool)}
