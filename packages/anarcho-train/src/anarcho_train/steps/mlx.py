"""The training step in MLX: compiled once per shape, accumulation by total weight, clipping, update, and an exact state on disk.

Notable: weights, sums of gradients and optimizer state are float32; only what the model computes inside is of the compute type. Each
micro-batch is evaluated before the next, so that there are the activations of one. A step whose gradient is not finite changes nothing.
Whatever schedules change is an array, never a constant of a compiled function: `MlxStep.traces` stands still after every shape has been
seen once.

The state on disk is that of `anarcho_train.steps.torch`: the model's files as the caller writes them, ``optimizer.safetensors`` with
``<parameter>.<state>`` and ``runtime.safetensors`` with the random generator and the loss scale. A run may go on with either.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_map
from safetensors import safe_open

from anarcho_train.config import TrainConfig
from anarcho_train.interfaces import Draws
from anarcho_train.losses.mlx import NextTokenLoss, answer_logprobs
from anarcho_train.out_of_memory import guarded
from anarcho_train.ranks import RankLost
from anarcho_train.step import Batch, LossSum, StepMetrics, StepSchedule
from anarcho_train.steps.agreement import agreed_memory
from anarcho_train.steps.files import OPTIMIZER_FILE, RUNTIME_FILE
from anarcho_train.steps.mlx_anomalies import first_anomaly
from anarcho_train.steps.mlx_memory import RandomState, is_whole
from anarcho_train.steps.mlx_norm import global_norm
from anarcho_train.steps.mlx_ranks import MlxRanks
from anarcho_train.steps.mlx_settings import resolve_compile, resolve_precision
from anarcho_train.steps.mlx_state import (
    generator_state,
    leaves,
    load_optimizer,
    optimizer_arrays,
    own_stream,
    param_groups,
    reset_optimizer,
    set_generator_state,
    structure_copy,
    write_arrays,
)
from anarcho_train.steps.mlx_updates import UpdateSizes, members
from anarcho_train.steps.scaling import LossScale

MAX_COMPILED_SHAPES = 64
"""Of so many shapes of batches compiled functions are kept, which MLX never lets go; batches of further shapes run uncompiled."""

GENERATOR = "rng.mlx"


class LanguageModel(Protocol):
    """What the step asks of a model besides being an `mlx.nn.Module`.

    Where it also has an attribute ``compute_dtype``, the step sets it to the precision; a model without one runs in float32 alone. Where it
    has a method ``narrowed``, this is given the trainable parameters and returns them as the model computes with them, some perhaps cast:
    then their gradients stay in that type until they are used.
    """

    def token_logprobs(
        self,
        tokens: mx.array,
        targets: mx.array,
        *,
        positions: mx.array | None = None,
        segments: mx.array | None = None,
    ) -> mx.array:
        """Log-probabilities of ``targets``, float32 (batch, length), in nats; with `Draws`, it takes them as well."""
        ...


class StageLoss(Protocol):
    """The loss of a training stage; everything that it returns is a sum, which the step divides once by the weight of all its batches."""

    def weight(self, batch: Batch) -> float:
        """What the loss of the batch is a sum over: the targets' weights, or pairs."""
        ...

    def arrays(self, batch: Batch) -> dict[str, np.ndarray]:
        """The arrays of the batch that the loss reads besides log-probabilities; they reach it as MLX arrays."""
        ...

    def __call__(self, logprobs: mx.array, arrays: Mapping[str, mx.array]) -> tuple[mx.array, dict[str, mx.array]]:
        """From ``logprobs`` float32 (batch, length) the loss, a scalar with a gradient, and further measures, scalars without one."""
        ...


class MlxStep:
    """`anarcho_train.step.Step` for an MLX model and any MLX optimizer; trains what ``model.trainable_parameters()`` has.

    An optimizer with ``param_groups`` has its rates and momenta set by group; of another, the learning rate. ``save_model`` and
    ``load_model`` write and read the model's own files, so that the format stays with the model. ``loss`` is that of the stage; left
    out, of the next token. ``draws`` are what is random in training, and never in an evaluation. ``flops`` is the work of the whole
    run, for `resolve_compile`. ``notify`` receives one sentence whenever something is worth telling a person.

    ``begin`` gives the model the weights with which the training began, for `restart`. Where memory runs out, `train`, `evaluate`,
    `answer_logprobs` and `save` raise `anarcho_train.OutOfMemory`, `train` in all ranks: the cache is empty, the generator as before.

    With several ``ranks``, each is given its own share of a step's micro-batches, rank 0 the first: gradients, losses and
    weights are summed over the ranks and divided once by the weight of them all, so every rank makes the same update and reports the
    same metrics. Evaluations stay with the rank that asks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        config: TrainConfig,
        save_model: Callable[[nn.Module, Path], None],
        load_model: Callable[[nn.Module, Path], None],
        loss: StageLoss | None = None,
        draws: Draws | None = None,
        begin: Callable[[nn.Module], None] | None = None,
        flops: float = 0.0,
        ranks: MlxRanks | None = None,
        notify: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.device = mx.default_device()
        self.precision = _set_precision(model, config.precision, self.device)
        self.compiled = resolve_compile(config.compile, self.device, flops=flops)
        self.traces = 0
        """How often a compiled function was traced so far; a step that raises it met a new shape."""
        self._grad_clip = config.grad_clip
        self._save_model, self._load_model, self._notify = save_model, load_model, notify
        self._draws = draws
        self._loss: StageLoss = NextTokenLoss() if loss is None else loss
        self._ranks = ranks or MlxRanks()
        self._scale = LossScale() if self.precision == mx.float16 else None
        self._token_logprobs: Callable[..., mx.array] = model.token_logprobs  # type: ignore[assignment]
        self._narrowed: Callable[[Any], Any] = getattr(model, "narrowed", lambda parameters: parameters)
        self._accepted = inspect.signature(self._token_logprobs).parameters
        optimizer.init(model.trainable_parameters())
        accepted = inspect.signature(optimizer.apply_gradients).parameters
        self._leaves_out = "where" in accepted and "scale" in accepted
        self._param_groups = param_groups(optimizer)
        for param_group in self._param_groups:
            param_group.setdefault("initial_lr", param_group["lr"])
        names = [_group_name(index, param_group) for index, param_group in enumerate(self._param_groups)]
        self._members = members(model, self._param_groups, names)
        self._begin, self._first_random, self._updating = begin, RandomState(), False
        self._shapes: set[Any] = set()
        self._told_of_shapes = False
        self._compile()

    in_parts = False
    """Whether each rank saves a part of the state."""

    def train(self, micro_batches: Sequence[Batch], *, schedule: StepSchedule) -> StepMetrics:
        """One update; the gradient is that of the mean loss over the weight of all micro-batches, of all ranks, together."""
        return self._guarded(lambda: self._train(micro_batches, schedule=schedule))

    def _train(self, micro_batches: Sequence[Batch], *, schedule: StepSchedule) -> StepMetrics:
        weight, first_row = self._shares(micro_batches)
        rates = self._apply(schedule)
        scale = self._scale.scale if self._scale else 1.0
        factor = scale / weight if weight else math.nan  # A step without any weight has no mean.
        several = self._ranks.size > 1
        with agreed_memory(self._ranks):
            gradients, sums = self._accumulate(micro_batches, factor, number=schedule.number, first_row=first_row)
            if several:
                mx.eval(gradients, sums)
        self._ranks.sum(gradients)
        norm = self._norm(gradients, mx.array(1 / scale))
        # Several ranks must have told each other of their losses before any of them changes its weights.
        total = self._total(micro_batches, sums, weight) if several else LossSum()
        loss = mx.array(total.loss) if several else mx.stack([values["loss"] for values in sums]).sum()
        wanted = mx.isfinite(norm) & mx.isfinite(loss)
        if schedule.max_loss is not None:
            wanted = wanted & (loss <= schedule.max_loss * weight)
        _submit_half(gradients)
        sizes = UpdateSizes(self.model, self._members) if schedule.measure_update else None
        with self._put_back():
            self._update(gradients, self._clipping(norm, scale), wanted)
            mx.async_eval(norm, wanted, gradients)
        del gradients  # Its memory serves what comes next.
        self._updating = True
        # A rank that is lost here is missed at the next exchange, when this step has been counted.
        with suppress(RankLost), agreed_memory(self._ranks):
            mx.async_eval(self.model.parameters(), self.optimizer.state)
        # The numbers are there before the update is, which goes on while the next step is put together.
        grad_norm, updated = _number(norm), bool(_number(wanted))
        total = total if several else self._total(micro_batches, sums, weight)
        finite = math.isfinite(total.loss) and math.isfinite(grad_norm)
        if self._scale:
            self._scale.update(finite=finite)
        return StepMetrics(
            loss=total.loss / weight if weight else math.nan,
            weight=weight,
            grad_norm=grad_norm,
            learning_rates=rates,
            update_ratios=sizes.ratios() if sizes and updated else {},
            skipped=not updated,
            measures=total.means() if weight else dict.fromkeys(total.measures, math.nan),
        )

    def explain(self, micro_batches: Sequence[Batch], *, schedule: StepSchedule) -> str | None:
        """Which weights or gradients are not finite when a step is done again, without an update; of this rank's share."""
        weight, first_row = self._shares(micro_batches)
        gradients, _ = self._accumulate(
            micro_batches, 1 / weight if weight else math.nan, number=schedule.number, first_row=first_row
        )
        return first_anomaly(self.model, gradients)

    def _shares(self, micro_batches: Sequence[Batch]) -> tuple[float, int]:
        """The weight of the micro-batches of all ranks, and which of the step's rows is the first of this rank."""
        own = float(sum(self._loss.weight(batch) for batch in micro_batches))
        shares = self._ranks.gathered([own, sum(len(batch.tokens) for batch in micro_batches)])
        return float(shares[:, 0].sum()), int(shares[: self._ranks.rank, 1].sum())

    def evaluate(self, batch: Batch) -> LossSum:
        """The summed loss of a batch."""

        def sums() -> LossSum:
            # What the batch lacks is to be found before the model has worked on it.
            arrays = _arrays(self._loss.arrays(batch))
            loss, measures = self._loss(self._logprobs(batch), arrays)
            return self._sums(batch, {"loss": loss, **measures})

        return self._guarded(sums)

    def answer_logprobs(self, batch: Batch) -> np.ndarray:
        """The log-probability of each row's counted targets, ``sum(weights * logprobs)``, float32 (rows,), in nats.

        Of a model that is not trained yet these are the reference's, in the very arithmetic of the training.
        """
        return self._guarded(lambda: np.array(answer_logprobs(self._logprobs(batch), mx.array(batch.weights))))

    def save(self, directory: Path) -> None:
        """Writes the model's files, the optimizer's state and the random state into ``directory``; OSError where they find no room."""
        self._guarded(lambda: self._write(directory, self.model, *self._arrays_beside()))

    def snapshot(self) -> Callable[[Path], None]:
        """Holds on to what `save` would write now; what is returned writes it, from any thread. Arrays never change, so none is copied."""

        def held() -> tuple[nn.Module, tuple[dict[str, mx.array], dict[str, mx.array]]]:
            beside = self._arrays_beside()
            # The other thread can wait for nothing that this one's stream has yet to compute.
            mx.eval(self.model.parameters(), beside)
            return structure_copy(self.model), beside

        model, beside = self._guarded(held)

        def write(directory: Path) -> None:
            with own_stream():
                self._write(directory, model, *beside)

        return write

    def _write(
        self, directory: Path, model: nn.Module, optimizer: dict[str, mx.array], runtime: dict[str, mx.array]
    ) -> None:
        self._save_model(model, directory)
        write_arrays(directory / OPTIMIZER_FILE, optimizer)
        write_arrays(directory / RUNTIME_FILE, runtime)

    def _arrays_beside(self) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
        """What is saved besides the model: the optimizer's arrays, and the generator's."""
        return optimizer_arrays(self.optimizer, self.model), self._runtime_arrays()

    def load(self, directory: Path) -> None:
        """Restores what `save`, or another framework's, wrote; raises ValueError naming the first array that does not fit."""
        self._load_model(self.model, directory)
        load_optimizer(directory, self.optimizer, self.model)
        with safe_open(directory / RUNTIME_FILE, framework="np") as file:
            names = set(file.keys())
            if GENERATOR in names:  # Another framework's state has another generator.
                set_generator_state(file.get_tensor(GENERATOR))
            if self._scale and "loss_scale" in names:
                self._scale.scale = float(file.get_tensor("loss_scale"))
                self._scale.growth_tracker = int(file.get_tensor("growth_tracker"))
        mx.eval(self.model.parameters(), self.optimizer.state)

    def restart(self) -> None:
        """Back to before the first step; raises ValueError where ``begin`` was not given."""
        if self._begin is None:
            raise ValueError("the step was not told with which weights the training began; start the run again")
        self._begin(self.model)
        reset_optimizer(self.optimizer, self.model)
        self._scale = LossScale() if self._scale else None
        self._first_random.restore()
        mx.eval(self.model.parameters(), self.optimizer.state)

    @contextmanager
    def _put_back(self) -> Iterator[None]:
        """Where this fails, weights and state are again what they were: an update may be put together before its gradients are there."""
        places = [*leaves(self.model), *leaves(self.optimizer.state)]
        before = [container[key] for _, container, key in places]
        try:
            yield
        except Exception:
            for (_, container, key), array in zip(places, before, strict=True):
                container[key] = array
            raise

    def _guarded(self, work: Callable[[], Any]) -> Any:
        random, self._updating = RandomState(), False

        def recover() -> bool:
            random.restore()
            mx.clear_cache()
            return self._updating or not is_whole(self.model.parameters(), self.optimizer.state)

        return guarded(work, recover=recover)

    def _compile(self) -> None:
        """The functions of a step; what they read besides their arguments is declared, so that its changes are seen."""
        model, optimizer, generator = self.model.state, self.optimizer.state, mx.random.state
        self._eager = {"gradients": self._batch_gradients, "logprobs": self._batch_logprobs}
        if not self.compiled:
            self._functions = self._eager
            self._norm, self._update = global_norm, self._apply_gradients
            return
        self._functions = {
            name: mx.compile(self._traced(function), inputs=[model, generator], outputs=[generator])
            for name, function in self._eager.items()
        }
        self._norm = mx.compile(self._traced(global_norm))
        state = [model, optimizer]
        self._update = mx.compile(self._traced(self._apply_gradients), inputs=state, outputs=state)

    def _traced(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self.traces += 1
            return function(*args)

        return counted

    def _function(self, name: str, inputs: Mapping[str, mx.array]) -> Callable[..., Any]:
        """The compiled function, or the plain one for shapes beyond `MAX_COMPILED_SHAPES`."""
        shapes = tuple((key, value.shape) for key, value in inputs.items())
        if shapes not in self._shapes and self.compiled:
            if len(self._shapes) >= MAX_COMPILED_SHAPES:
                self._tell_of_shapes()
                return self._eager[name]
            self._shapes.add(shapes)
        return self._functions[name]

    def _tell_of_shapes(self) -> None:
        if not self._told_of_shapes:
            self._notify(f"batches have more than {MAX_COMPILED_SHAPES} shapes; those that come late run uncompiled")
        self._told_of_shapes = True

    def _batch_gradients(
        self, inputs: dict[str, mx.array], arrays: dict[str, mx.array], factor: mx.array, total: Any
    ) -> tuple[dict[str, mx.array], Any]:
        """The sums of a batch, and the gradient of ``factor`` times its loss on top of ``total``, which is None at first."""

        def scaled_loss() -> tuple[mx.array, dict[str, mx.array]]:
            loss, measures = self._loss(self._batch_logprobs(inputs), arrays)
            return factor * loss, {"loss": loss, **measures}

        parameters = self.model.trainable_parameters()
        self.model.update(self._narrowed(parameters))
        try:
            (_, sums), gradients = nn.value_and_grad(self.model, scaled_loss)()
        finally:
            self.model.update(parameters)  # Differentiation leaves its own placeholders in the model.
        return sums, gradients if total is None else tree_map(_wide_sum, total, gradients)

    def _batch_logprobs(self, inputs: dict[str, mx.array]) -> mx.array:
        others = {name: array for name, array in inputs.items() if name not in ("tokens", "targets")}
        return self._token_logprobs(inputs["tokens"], inputs["targets"], **others)

    def _apply_gradients(self, gradients: Any, factor: mx.array, wanted: mx.array) -> None:
        """The update with ``factor`` times the gradients; none where ``wanted`` is false."""
        weights = self.model.trainable_parameters()
        if self._leaves_out:
            optimizer: Any = self.optimizer
            self.model.update(optimizer.apply_gradients(gradients, weights, where=wanted, scale=factor))
            return
        scaled = tree_map(lambda gradient: gradient.astype(mx.float32) * factor, gradients)
        state = [(container, key, container[key]) for _, container, key in leaves(self.optimizer.state)]
        new = self.optimizer.apply_gradients(scaled, weights)
        self.model.update(tree_map(lambda after, before: mx.where(wanted, after, before), new, weights))
        for container, key, before in state:
            if container[key] is not before:
                container[key] = mx.where(wanted, container[key], before)

    def _clipping(self, norm: mx.array, scale: float) -> mx.array:
        """The factor of the gradient that bounds its norm and takes the loss scale out of it."""
        return (mx.minimum(1.0, self._grad_clip / (norm + 1e-6)) if self._grad_clip else mx.array(1.0)) / scale

    def _apply(self, schedule: StepSchedule) -> dict[str, float]:
        """Sets what the schedules change, and returns the learning rates by group."""
        rates = {}
        for index, group in enumerate(self._param_groups):
            rates[_group_name(index, group)] = group["lr"] = group["initial_lr"] * schedule.lr_scale
            if schedule.momentum is not None and "momentum" in group:
                group["momentum"] = schedule.momentum
        return rates

    def _accumulate(
        self, micro_batches: Sequence[Batch], factor: float, *, number: int, first_row: int
    ) -> tuple[Any, list[dict[str, mx.array]]]:
        """The gradient of all micro-batches, and what was measured on each; both are still being computed."""
        gradients: Any = None
        measured: list[dict[str, mx.array]] = []
        for batch in micro_batches:
            mx.async_eval(
                measured, gradients
            )  # One micro-batch after the other, or there would be the activations of all.
            arrays = _arrays(self._loss.arrays(batch))
            draws = self._draws(batch, step=number, first_row=first_row) if self._draws else {}
            first_row += len(batch.tokens)
            inputs = self._inputs(batch, draws)
            sums, gradients = self._function("gradients", inputs)(inputs, arrays, mx.array(factor), gradients)
            measured.append(sums)
        mx.async_eval(measured)
        return gradients, measured

    def _logprobs(self, batch: Batch) -> mx.array:
        inputs = self._inputs(batch, {})
        return self._function("logprobs", inputs)(inputs)

    def _inputs(self, batch: Batch, draws: Mapping[str, np.ndarray]) -> dict[str, mx.array]:
        """The model's arguments, in one order: another would be another trace."""
        for name in draws:
            if name not in self._accepted:
                raise ValueError(
                    f"the training draws {name}, which {type(self.model).__name__}.token_logprobs does not take; expected a model that "
                    "does: turn the noise off (train.neftune_alpha = 0, no dropout), or use another back-end"
                )
        names = ("tokens", "targets", "positions", "segments")
        ids = {name: getattr(batch, name) for name in names if getattr(batch, name) is not None}
        return {name: mx.array(array.astype(np.int32, copy=False)) for name, array in ids.items()} | _arrays(draws)

    def _sums(self, batch: Batch, values: dict[str, mx.array]) -> LossSum:
        """Everything that was measured, evaluated together."""
        mx.eval(values)
        numbers = {name: _number(value) for name, value in values.items()}
        return LossSum(loss=numbers.pop("loss"), weight=self._loss.weight(batch), measures=numbers)

    def _total(self, micro_batches: Sequence[Batch], sums: Sequence[dict[str, mx.array]], weight: float) -> LossSum:
        """The sum over the micro-batches of all ranks, whose weights together are ``weight``."""
        total = sum(map(self._sums, micro_batches, sums), LossSum())
        names = sorted(total.measures)
        shares = self._ranks.gathered([total.loss, *(total.measures[name] for name in names)])
        loss, *measures = shares.sum(axis=0).tolist()
        return LossSum(loss=loss, weight=weight, measures=dict(zip(names, measures, strict=True)))

    def _runtime_arrays(self) -> dict[str, mx.array]:
        arrays = {GENERATOR: generator_state()}
        if self._scale:
            arrays["loss_scale"] = mx.array(self._scale.scale, mx.float32)
            arrays["growth_tracker"] = mx.array(self._scale.growth_tracker, mx.int64)
        return arrays


def _set_precision(model: nn.Module, name: str, device: mx.Device) -> mx.Dtype:
    """Tells the model its compute type and returns it: what was asked for, or float32 of a model that has no choice."""
    precision = resolve_precision(name, device)
    if hasattr(model, "compute_dtype"):
        model.compute_dtype = precision
        return precision
    if name not in ("auto", "float32"):
        raise ValueError(
            f"train.precision is {name}, but {type(model).__name__} has no compute_dtype to set; use float32 or auto"
        )
    return mx.float32


def _wide_sum(total: mx.array, gradient: mx.array) -> mx.array:
    return total.astype(mx.float32) + gradient.astype(mx.float32)


def _submit_half(gradients: Any) -> None:
    """Hands over the part of backward that is done first.

    MLX on CUDA returns from a submission when no more than ten pieces of it wait, about two milliseconds' worth. So what is put together
    between two submissions is kept short: the forward pass, half of backward, its other half, and the update are submitted one by one.
    """
    flat = [gradient for _, gradient in tree_flatten(gradients)]
    mx.async_eval(flat[len(flat) // 2 :])


def _number(scalar: mx.array) -> float:
    return float(np.array(scalar))


def _arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, mx.array]:
    return {name: mx.array(array) for name, array in arrays.items()}


def _group_name(index: int, group: Mapping[str, Any]) -> str:
    return str(group.get("name", f"group {index}")).replace(" ", "_")
