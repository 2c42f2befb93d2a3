"""The training step in PyTorch: accumulation by total weight, autocast, clipping, update, and an exact state on disk.

Notable: weights, gradients and optimizer state are float32; only matrix products run in the compute type. A step whose gradient is not
finite changes nothing; on CUDA the device decides that, with an optimizer that takes ``found_inf`` and ``grad_scale`` as torch's fused ones
do, so that it never waits for the host.

The state on disk is safetensors under parameter names, so it depends neither on this class nor on the order of parameters: the model's
files as the caller writes them, ``optimizer.safetensors`` with ``<parameter>.<state>`` and ``runtime.safetensors`` with the random
generators and the loss scale.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.profiler import record_function

from anarcho_train.config import TrainConfig
from anarcho_train.interfaces import Draws
from anarcho_train.losses.torch import NextTokenLoss, answer_logprobs
from anarcho_train.out_of_memory import guarded
from anarcho_train.step import Batch, LossSum, StepMetrics, StepSchedule
from anarcho_train.steps.files import OPTIMIZER_FILE, RUNTIME_FILE
from anarcho_train.steps.torch_anomalies import CheckedLoss, first_anomaly
from anarcho_train.steps.torch_memory import RandomState, empty_caches, forget_updates, host_copy
from anarcho_train.steps.torch_updates import UpdateSizes

COMPILE_MIN_FLOPS = 5e12
"""A CPU run of fewer floating-point operations ends sooner without compilation: at 150 GFLOP/s it takes about half a minute."""

MAX_COMPILED_SHAPES = 64
"""So many shapes of batches are compiled before torch.compile gives up and runs the model uncompiled; its own limit is 8."""


class LanguageModel(Protocol):
    """What the step asks of a model besides being an `nn.Module`."""

    def token_logprobs(
        self, tokens: Tensor, targets: Tensor, *, positions: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """Log-probabilities of ``targets``, float32 (batch, length), in nats; with `Draws`, it takes them as well."""
        ...


class StageLoss(Protocol):
    """The loss of a training stage; everything that it returns is a sum, which the step divides once by the weight of all its batches."""

    def weight(self, batch: Batch) -> float:
        """What the loss of the batch is a sum over: the targets' weights, or pairs."""
        ...

    def arrays(self, batch: Batch) -> dict[str, np.ndarray]:
        """The arrays of the batch that the loss reads besides log-probabilities; they reach it as tensors on the model's device."""
        ...

    def __call__(self, logprobs: Tensor, arrays: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """From ``logprobs`` float32 (batch, length) the loss, a scalar with a gradient, and further measures, scalars without one."""
        ...


def native_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 matrices in hardware, or through Metal from macOS 14 on."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":
        return int(platform.mac_ver()[0].split(".")[0] or 0) >= 14
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The compute type: ``auto`` is bfloat16 where native, float16 on other GPUs (with loss scaling), float32 on other CPUs."""
    if name == "auto":
        if native_bfloat16(device):
            return torch.bfloat16
        return torch.float32 if device.type == "cpu" else torch.float16
    if name == "float16" and device.type == "cpu":
        raise ValueError(
            "train.precision is float16 on the CPU, where it is slow and loses range; use bfloat16, float32 or auto"
        )
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def resolve_compile(name: str, device: torch.device, *, flops: float) -> bool:
    """Whether the model is compiled.

    ``auto`` compiles on CUDA, and on the CPU where C++ code can be compiled and the run, of ``flops`` floating-point operations, is long
    enough to earn the compilation back. The answer depends on the configuration and the machine only, so that a resumed run decides alike.
    """
    if name != "auto":
        return name == "on"
    if device.type == "cpu":
        return flops >= COMPILE_MIN_FLOPS and _can_compile_for_cpu()
    return device.type == "cuda"


def _can_compile_for_cpu() -> bool:
    """Whether the C++ compiler and the Python headers are there that torch.compile needs for CPU code."""
    compilers = (os.environ.get("CXX"), "g++", "clang++")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return headers.is_file() and any(name and shutil.which(name) for name in compilers)


@dataclass(frozen=True)
class _Sums:
    """What was measured on each micro-batch, summed over it, on the device."""

    names: tuple[str, ...]
    """Of the measures besides the loss."""
    values: Tensor
    """(micro-batches, 1 + measures), the loss first."""


@dataclass(frozen=True, kw_only=True)
class _Update:
    """What is known of an update when it has been handed to the device."""

    measured: Sequence[Sequence[float]]
    """Loss and measures of each micro-batch, summed."""
    grad_norm: float
    updated: bool
    sizes: UpdateSizes | None


class _Later:
    """Numbers of a CUDA device, read without waiting for what it is given to do afterwards."""

    def __init__(self, numbers: Tensor) -> None:
        self._copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        self._copy.copy_(numbers, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def read(self) -> list[float]:
        """The numbers, as soon as they are there."""
        self._copied.synchronize()
        return self._copy.tolist()


class TorchStep:
    """`anarcho_train.step.Step` for a torch model and any torch optimizer.

    ``save_model`` and ``load_model`` write and read the model's own files, so that the format stays with the model. ``loss`` is that of
    the stage; left out, of the next token. ``draws`` are what is random in training, and never in an evaluation.
    ``begin`` gives the model the weights with which the training began, for `restart`.
    ``flops`` is the work of the whole run, for `resolve_compile`. ``notify`` receives one sentence
    whenever something is worth telling a person.

    Where memory runs out, `train`, `evaluate`, `answer_logprobs` and `save` raise `anarcho_train.OutOfMemory`: gradients are dropped,
    caches empty, random generators as before.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        config: TrainConfig,
        save_model: Callable[[nn.Module, Path], None],
        load_model: Callable[[nn.Module, Path], None],
        loss: StageLoss | None = None,
        draws: Draws | None = None,
        begin: Callable[[nn.Module], None] | None = None,
        flops: float = 0.0,
        notify: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.device = next(model.parameters()).device
        self.precision = resolve_precision(config.precision, self.device)
        self.compiled = resolve_compile(config.compile, self.device, flops=flops)
        self._may_fall_back = config.compile == "auto"
        self._grad_clip = config.grad_clip
        self._save_model, self._load_model, self._notify = save_model, load_model, notify
        self._draws = draws
        self._loss: StageLoss = NextTokenLoss() if loss is None else loss
        self._scaler = self._new_scaler()
        self._logprobs: Callable[..., Tensor] = model.token_logprobs  # type: ignore[assignment]
        if self.compiled:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILED_SHAPES)
            self._logprobs = torch.compile(self._logprobs, dynamic=False)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._begin, self._first_random = begin, RandomState(self.device)
        self._keeps_state = bool(optimizer.state)
        self._updating = False
        gated = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._decides_on_device = gated and self.device.type == "cuda" and not self._scaler.is_enabled()

    def train(self, micro_batches: Sequence[Batch], *, schedule: StepSchedule) -> StepMetrics:
        """One update; the gradient is that of the mean loss over the weight of all micro-batches together."""
        return self._guarded(lambda: self._train(micro_batches, schedule=schedule))

    def _train(self, micro_batches: Sequence[Batch], *, schedule: StepSchedule) -> StepMetrics:
        weight = float(sum(self._loss.weight(batch) for batch in micro_batches))
        self._apply(schedule)
        try:
            measured = self._accumulate(micro_batches, weight, number=schedule.number)
        except Exception as error:
            if not (
                self.compiled
                and self._may_fall_back
                and type(error).__module__.startswith(("torch._inductor", "torch._dynamo"))
            ):
                raise
            self._leave_compilation(error)
            measured = self._accumulate(micro_batches, weight, number=schedule.number)
        self._may_fall_back = False
        update = self._update_on_device if self._decides_on_device else self._update
        found = update(measured.values, weight, schedule)
        total = self._total(micro_batches, measured.names, found.measured)
        rates = {_group_name(i, group): float(group["lr"]) for i, group in enumerate(self.optimizer.param_groups)}
        return StepMetrics(
            loss=total.loss / weight if weight else math.nan,
            weight=weight,
            grad_norm=found.grad_norm,
            learning_rates=rates,
            update_ratios=found.sizes.ratios() if found.sizes and found.updated else {},
            skipped=not found.updated,
            measures=total.means() if weight else dict.fromkeys(total.measures, math.nan),
        )

    def _update(self, measured: Tensor, weight: float, schedule: StepSchedule) -> _Update:
        """Reads loss and norm, and then updates or does not."""
        self._scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._grad_clip or float("inf"))
        grad_norm, losses = float(norm), measured.tolist()
        loss = math.fsum(row[0] for row in losses)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        updated = finite and weight > 0 and (schedule.max_loss is None or loss / weight <= schedule.max_loss)
        sizes = UpdateSizes(self._parameters_by_group()) if updated and schedule.measure_update else None
        if updated:
            self._updating = True
            with record_function("optimizer"):
                self._scaler.step(self.optimizer)
        self._scaler.update()
        return _Update(measured=losses, grad_norm=grad_norm, updated=updated, sizes=sizes)

    def _update_on_device(self, measured: Tensor, weight: float, schedule: StepSchedule) -> _Update:
        """Lets the device decide whether the update counts, which works on while the host reads the numbers and goes on."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        loss = measured[:, 0].sum()
        wanted = norm.isfinite() & loss.isfinite() & (weight > 0)
        if schedule.max_loss is not None:
            wanted &= loss <= schedule.max_loss * weight
        numbers = _Later(torch.cat((torch.stack((norm, wanted)), measured.flatten())))
        sizes = UpdateSizes(self._parameters_by_group()) if schedule.measure_update else None
        optimizer: Any = self.optimizer
        optimizer.found_inf = (~wanted).float()
        optimizer.grad_scale = ((norm + 1e-6) / self._grad_clip).clamp(min=1.0) if self._grad_clip else None
        self._updating = True
        try:
            with record_function("optimizer"):
                optimizer.step()
        finally:
            optimizer.found_inf = optimizer.grad_scale = None
        grad_norm, updated, *values = numbers.read()
        rows = torch.tensor(values).view(measured.shape).tolist()
        return _Update(measured=rows, grad_norm=grad_norm, updated=bool(updated), sizes=sizes)

    def explain(self, micro_batches: Sequence[Batch], *, schedule: StepSchedule) -> str | None:
        """Where the first number that is not finite comes from when a step is done again, uncompiled and without an update."""
        weight = float(sum(self._loss.weight(batch) for batch in micro_batches))
        compiled, loss = self._logprobs, self._loss
        self._logprobs, self._loss = self.model.token_logprobs, CheckedLoss(loss)  # type: ignore[assignment]

        def again() -> None:
            self._accumulate(micro_batches, weight, number=schedule.number)

        try:
            return first_anomaly(self.model, again)
        finally:
            self._logprobs, self._loss = compiled, loss
            self.optimizer.zero_grad(set_to_none=True)

    def evaluate(self, batch: Batch) -> LossSum:
        """The summed loss of a batch."""

        def sums() -> LossSum:
            with self._without_update():
                measured = _sums([self._batch_loss(batch, self._neutral(batch))])
            return self._total([batch], measured.names, measured.values.tolist())

        return self._guarded(sums)

    def answer_logprobs(self, batch: Batch) -> np.ndarray:
        """The log-probability of each row's counted targets, ``sum(weights * logprobs)``, float32 (rows,), in nats.

        Of a model that is not trained yet these are the reference's, in the very arithmetic of the training.
        """

        def rows() -> np.ndarray:
            with self._without_update():
                logprobs = self._forward(batch, self._neutral(batch))
            return answer_logprobs(logprobs.detach(), self._tensor(batch.weights)).cpu().numpy()

        return self._guarded(rows)

    def save(self, directory: Path) -> None:
        """Writes the model's files, the optimizer's state and the random state into ``directory``."""
        self._guarded(lambda: self._write(directory, self.model, self._optimizer_tensors(), self._runtime_tensors()))

    def snapshot(self) -> Callable[[Path], None]:
        """A copy in the host's memory of what `save` would write now; what is returned writes it, from any thread."""

        def copied() -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
            return host_copy(self.model), self._optimizer_tensors(copy=True), self._runtime_tensors()

        model, optimizer, runtime = self._guarded(copied)
        return lambda directory: self._write(directory, model, optimizer, runtime)

    def _write(
        self, directory: Path, model: nn.Module, optimizer: dict[str, Tensor], runtime: dict[str, Tensor]
    ) -> None:
        try:
            self._save_model(model, directory)
            save_file(optimizer, directory / OPTIMIZER_FILE)
            save_file(runtime, directory / RUNTIME_FILE)
        except SafetensorError as error:  # Its text is the operating system's, for example that the disk is full.
            raise OSError(f"{directory} cannot be written ({error}); free space there and resume the run") from error

    def load(self, directory: Path) -> None:
        """Restores what `save` wrote; raises ValueError naming the first tensor that is missing, left over or of another shape."""
        self._load_model(self.model, directory)
        _load_optimizer(directory / OPTIMIZER_FILE, self.optimizer, dict(self.model.named_parameters()))
        with safe_open(directory / RUNTIME_FILE, framework="pt") as file:
            names = set(file.keys())
            if "rng.cpu" in names:  # Another framework's state has another generator.
                torch.set_rng_state(file.get_tensor("rng.cpu"))
            if self.device.type != "cpu" and f"rng.{self.device.type}" in names:
                _device_module(self.device).set_rng_state(file.get_tensor(f"rng.{self.device.type}"))
            if self._scaler.is_enabled() and "loss_scale" in names:
                state = {
                    "scale": float(file.get_tensor("loss_scale")),
                    "_growth_tracker": int(file.get_tensor("growth_tracker")),
                }
                self._scaler.load_state_dict(self._scaler.state_dict() | state)

    def restart(self) -> None:
        """Back to before the first step; raises ValueError where ``begin`` was not given."""
        if self._begin is None:
            raise ValueError("the step was not told with which weights the training began; start the run again")
        self._begin(self.model)
        forget_updates(self.optimizer, keeps_state=self._keeps_state)
        self._scaler = self._new_scaler()
        self._first_random.restore()

    def _guarded(self, work: Callable[[], Any]) -> Any:
        random, self._updating = RandomState(self.device), False

        def recover() -> bool:
            self.optimizer.zero_grad(set_to_none=True)
            state = self._scaler.state_dict()
            self._scaler = self._new_scaler()  # The old one remembers that it has unscaled gradients in this step.
            self._scaler.load_state_dict(state)
            random.restore()
            empty_caches(self.device)
            return self._updating

        return guarded(work, recover=recover)

    def _new_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.float16)

    def _parameters_by_group(self) -> dict[str, Sequence[Tensor]]:
        return {_group_name(i, group): group["params"] for i, group in enumerate(self.optimizer.param_groups)}

    def _apply(self, schedule: StepSchedule) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule.lr_scale
            if schedule.momentum is not None and "momentum" in group:
                group["momentum"] = schedule.momentum

    def _accumulate(self, micro_batches: Sequence[Batch], weight: float, *, number: int) -> _Sums:
        """Gradients of all micro-batches, and what was measured on each."""
        self.optimizer.zero_grad(set_to_none=True)
        found = []
        first_row = 0
        for batch in micro_batches:
            draws = self._draws(batch, step=number, first_row=first_row) if self._draws else {}
            first_row += len(batch.tokens)
            with record_function("forward"):
                loss, measures = self._batch_loss(batch, draws)
            with record_function("backward"):
                self._scaler.scale(loss / weight).backward()
            found.append((loss.detach(), measures))  # with its graph, it would keep the activations
        return _sums(found)

    def _neutral(self, batch: Batch) -> dict[str, np.ndarray]:
        """A compiled model keeps its training graph in an evaluation, with the arguments that it has there."""
        return self._draws.neutral(batch) if self._draws and self.compiled else {}

    def _batch_loss(self, batch: Batch, draws: Mapping[str, np.ndarray]) -> tuple[Tensor, dict[str, Tensor]]:
        # What the batch lacks is to be found before the model has worked on it.
        arrays = self._loss.arrays(batch)
        logprobs = self._forward(batch, draws)
        return self._loss(logprobs, {name: self._tensor(array) for name, array in arrays.items()})

    def _forward(self, batch: Batch, draws: Mapping[str, np.ndarray]) -> Tensor:
        arrays = {
            "tokens": batch.tokens,
            "targets": batch.targets,
            "positions": batch.positions,
            "segments": batch.segments,
        }
        tensors = {name: self._tensor(array).long() for name, array in arrays.items() if array is not None}
        tensors |= {name: self._tensor(array) for name, array in draws.items()}
        with self._autocast():
            return self._logprobs(tensors.pop("tokens"), tensors.pop("targets"), **tensors)

    def _total(
        self, micro_batches: Sequence[Batch], names: Sequence[str], measured: Sequence[Sequence[float]]
    ) -> LossSum:
        """The sum over the micro-batches of their losses and of the measures of these names."""
        total = LossSum()
        for batch, (loss, *others) in zip(micro_batches, measured, strict=True):
            sums = dict(zip(names, others, strict=True))
            total += LossSum(loss=loss, weight=self._loss.weight(batch), measures=sums)
        return total

    def _without_update(self) -> AbstractContextManager[Any]:
        """A compiled model keeps its training graph: without gradients it would be compiled a second time."""
        return torch.set_grad_enabled(self.compiled)

    def _tensor(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)  # other memory would wait for the update before

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision)

    def _leave_compilation(self, error: Exception) -> None:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        self._notify(f"torch.compile failed here ({reason}); training goes on without it")
        self.compiled = False
        self._logprobs = self.model.token_logprobs  # type: ignore[assignment]

    def _optimizer_tensors(self, *, copy: bool = False) -> dict[str, Tensor]:
        """State tensors by canonical name, contiguous on the CPU."""
        return {
            f"{self._names[id(parameter)]}.{key}": value.detach().to("cpu", copy=copy).contiguous()
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }

    def _runtime_tensors(self) -> dict[str, Tensor]:
        tensors = {"rng.cpu": torch.get_rng_state()}
        if self.device.type != "cpu":
            tensors[f"rng.{self.device.type}"] = _device_module(self.device).get_rng_state()
        if self._scaler.is_enabled():
            state = self._scaler.state_dict()
            tensors["loss_scale"] = torch.tensor(float(state["scale"]))
            tensors["growth_tracker"] = torch.tensor(int(state["_growth_tracker"]))
        return tensors


def _sums(found: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> _Sums:
    rows = [torch.stack([loss.detach(), *measures.values()]) for loss, measures in found]
    return _Sums(tuple(found[0][1]), torch.stack(rows))


def _group_name(index: int, group: dict[str, Any]) -> str:
    return str(group.get("name", f"group {index}")).replace(" ", "_")


def _device_module(device: torch.device) -> Any:
    return torch.mps if device.type == "mps" else torch.cuda


def _load_optimizer(path: Path, optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor]) -> None:
    """Sets the optimizer's state from ``<parameter>.<state>`` tensors; state that the optimizer creates late is created here."""
    advice = "resume with the run's own config"
    with safe_open(path, framework="pt") as file:
        found = set(file.keys())
        names = {id(p): name for name, p in parameters.items()}
        expected = {
            f"{names[id(p)]}.{key}"
            for p, state in optimizer.state.items()
            for key, v in state.items()
            if isinstance(v, Tensor)
        }
        if missing := sorted(expected - found):
            raise ValueError(f"{path} lacks {missing[0]}; expected the state of this optimizer and model: {advice}")
        for full_name in sorted(found):
            name, _, key = full_name.rpartition(".")
            if name not in parameters or (expected and full_name not in expected):
                raise ValueError(f"{path} holds {full_name}, which this optimizer and model do not have: {advice}")
            parameter, value = parameters[name], file.get_tensor(full_name)
            if value.ndim and value.shape != parameter.shape:
                raise ValueError(
                    f"{path} holds {full_name} of shape {tuple(value.shape)}; expected {tuple(parameter.shape)}: {advice}"
                )
            state = optimizer.state[parameter]
            if key in state:
                state[key].copy_(value)
            else:
                state[key] = value if key == "step" else value.to(parameter.device)
