"""The training step in PyTorch: accumulation by total weight, autocast, clipping, update, and an exact state on disk.

Notable: weights and optimizer state are float32, and so are gradients unless they are known in the compute type alone
(`steps.torch_gradients`); only matrix products run in the compute type. A step whose gradient is not
finite changes nothing; on CUDA the device decides that, with an optimizer that takes ``found_inf`` and ``grad_scale`` as torch's fused ones
do, so that it never waits for the host. With several processes all of that is decided from sums over all of them, by each alike.

What is on disk, `torch_files` writes and reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from anarcho_train.config import TrainConfig
from anarcho_train.interfaces import Draws
from anarcho_train.losses.torch import NextTokenLoss
from anarcho_train.out_of_memory import OutOfMemory, guarded, is_out_of_memory, reason
from anarcho_train.step import Batch, LossSum, StepMetrics, StepSchedule
from anarcho_train.steps.torch_anomalies import CheckedLoss, first_anomaly
from anarcho_train.steps.torch_files import StateFiles
from anarcho_train.steps.torch_gradients import GradientTypes, clipped, total_norm
from anarcho_train.steps.torch_graphs import Recordings, Tensors, obstacle, shape_of
from anarcho_train.steps.torch_in_backward import UpdatesInBackward
from anarcho_train.steps.torch_memory import RandomState, empty_caches, forget_updates
from anarcho_train.steps.torch_passes import Passes, StageLoss, Sums, sums_of, total_of
from anarcho_train.steps.torch_ranks import TorchRanks
from anarcho_train.steps.torch_replicas import Replicas
from anarcho_train.steps.torch_settings import resolve_compile, resolve_precision
from anarcho_train.steps.torch_updates import UpdateSizes
from anarcho_train.steps.torch_waiting import Done, Later

if TYPE_CHECKING:
    from anarcho_train.steps.torch_shards import Shards

MAX_COMPILED_SHAPES = 64
"""So many shapes of batches are compiled before torch.compile gives up and runs the model uncompiled; its own limit is 8."""


@dataclass(frozen=True, kw_only=True)
class _Update:
    """What is known of an update when it has been handed to the device."""

    measured: Sequence[Sequence[float]]
    """Loss and measures of each micro-batch, summed."""
    grad_norm: float
    updated: bool
    sizes: UpdateSizes | None


@dataclass(frozen=True, kw_only=True)
class _Share:
    """What a rank has of a step, beside the others."""

    weight: float
    """Of the whole step."""
    first_row: int
    """Which of the step's rows this rank begins with."""
    most: int
    """Micro-batches of the rank that has most of them."""


class TorchStep:
    """`anarcho_train.step.Step` for a torch model and any torch optimizer.

    ``save_model`` and ``load_model`` write and read the model's own files, so that the format stays with the model. ``loss`` is that of
    the stage; left out, of the next token. ``draws`` are what is random in training, and never in an evaluation.
    ``begin`` gives the model the weights with which the training began, for `restart`.
    ``flops`` is the work of the whole run, for `resolve_compile`. ``notify`` receives one sentence
    whenever something is worth telling a person.

    Where memory runs out, `train`, `evaluate`, `answer_logprobs` and `save` raise `anarcho_train.OutOfMemory`: gradients are dropped,
    caches empty, random generators as before.

    With several ``ranks``, each is given its own share of a step's micro-batches, rank 0 the first: gradients, losses and weights are
    those of all ranks together, so every rank makes the same update and reports the same metrics, and memory that runs out in one is
    `OutOfMemory` in all. The model is whole in each, unless it was made ``shards``. Evaluations and files stay with the rank that asks.
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
        ranks: TorchRanks | None = None,
        shards: Shards | None = None,
        notify: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.device = next(model.parameters()).device
        self.precision = resolve_precision(config.precision, self.device)
        self.compiled = resolve_compile(config.compile, self.device, flops=flops)
        self._may_fall_back = config.compile == "auto"
        self._grad_clip = config.grad_clip
        self._notify = notify
        self._scaler = self._new_scaler()
        self._ranks = ranks or TorchRanks()
        self._several = self._ranks.size > 1
        self._ranks.join_devices(self.device)
        self._passes = Passes(model, loss or NextTokenLoss(), precision=self.precision, draws=draws)
        self._parts = shards or Replicas(
            model,
            self._ranks,
            logprobs=lambda *tensors, **named: self._passes.logprobs(*tensors, **named),
            in_parts=config.update_in_backward,
        )
        if self.compiled:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILED_SHAPES)
            self._passes.logprobs = self._parts.compiled(self._passes.logprobs)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._files = StateFiles(
            model,
            optimizer,
            self._parts,
            scaler=lambda: self._scaler,
            save_model=save_model,
            load_model=load_model,
        )
        self._begin, self._first_random = begin, RandomState(self.device)
        self._keeps_state = bool(optimizer.state)
        self._updating, self._sizes_before = False, None
        gated = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._decides_on_device = gated and self.device.type == "cuda" and not self._scaler.is_enabled()
        self._last_update = Done(self.device) if self._several else None
        saves_memory = config.update_in_backward or bool(getattr(model, "gradient_checkpointing", False))
        self._gradients = GradientTypes(model, optimizer, compute=self.precision, saves_memory=saves_memory)
        self._at_once = UpdatesInBackward(model, optimizer) if config.update_in_backward else None
        if self._at_once and (self._several or self._scaler.is_enabled()):
            raise ValueError("train.update_in_backward is true; expected one process, and no float16")
        against = obstacle(
            self.device,
            processes=self._ranks.size,
            scaled=self._scaler.is_enabled(),
            in_backward=config.update_in_backward,
        )
        if against and config.cuda_graphs is True:
            notify(f"train.cuda_graphs is true, but {against}; training goes on without")
        lend = getattr(optimizer, "use_graph", lambda record: None)
        self._recordings = Recordings(model, choice=False if against else config.cuda_graphs, notify=notify, lend=lend)
        if shards is not None:
            shards.serve()
        elif self._several:
            self._ranks.is_torn = self._is_torn

    @property
    def in_parts(self) -> bool:
        """Whether each rank saves a part of the state, so that all of them have to."""
        return self._parts.shared

    def train(self, micro_batches: Sequence[Batch], *, schedule: StepSchedule) -> StepMetrics:
        """One update; the gradient is that of the mean loss over the weight of all micro-batches together."""
        with self._ranks.watched():
            return self._guarded(lambda: self._train(micro_batches, schedule=schedule), renews=True)

    def _train(self, micro_batches: Sequence[Batch], *, schedule: StepSchedule) -> StepMetrics:
        share = self._share(micro_batches)
        weight = share.weight
        self._apply(schedule)
        try:
            measured = self._accumulate(micro_batches, share, schedule)
        except Exception as error:
            if not (
                self.compiled
                and self._may_fall_back
                and not self._updating
                and type(error).__module__.startswith(("torch._inductor", "torch._dynamo"))
            ):
                raise
            self._leave_compilation(error)
            measured = self._accumulate(micro_batches, share, schedule)
        self._may_fall_back = False
        decided = self._update_on_device if self._decides_on_device else self._update
        update = self._updated_at_once if self._at_once else decided
        values = self._ranks.sum(measured.values.sum(0, keepdim=True)) if self._several else measured.values
        found = self._updated(lambda: update(values, weight, schedule))
        total = total_of(measured.names, found.measured, weight=weight)
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

    def _share(self, micro_batches: Sequence[Batch]) -> _Share:
        """What this rank has of the step, and what all have together."""
        own = float(sum(self._passes.loss.weight(batch) for batch in micro_batches))
        told = self._ranks.gathered([own, sum(len(batch.tokens) for batch in micro_batches), len(micro_batches)])
        rank = self._ranks.rank
        return _Share(weight=float(told[:, 0].sum()), first_row=int(told[:rank, 1].sum()), most=int(told[:, 2].max()))

    def _updated(self, update: Callable[[], _Update]) -> _Update:
        """The update, which several ranks make together: one that fails in it alone cannot tell the others but by leaving."""
        if not self._several:
            return update()
        try:
            return update()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            what = reason(error)
        raise self._ranks.abandon(f"memory ran out in the update of this process ({what})")

    def _update(self, measured: Tensor, weight: float, schedule: StepSchedule) -> _Update:
        """Reads loss and norm, and then updates or does not."""
        self._scaler.unscale_(self.optimizer)
        norm = self._norm()
        grad_norm, losses = float(norm), measured.tolist()
        if self._grad_clip and grad_norm > self._grad_clip and not self._gradients.narrow:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self._grad_clip, norm)
        loss = math.fsum(row[0] for row in losses)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        updated = finite and weight > 0 and (schedule.max_loss is None or loss / weight <= schedule.max_loss)
        sizes = self._sizes() if updated and schedule.measure_update else None
        if updated:
            bound = self._grad_clip if self._gradients.narrow else 0.0
            with self._update_under_way(), clipped(self.optimizer, norm, bound):
                self._scaler.step(self.optimizer)
        self._scaler.update()
        return _Update(measured=losses, grad_norm=grad_norm, updated=updated, sizes=sizes)

    def _update_on_device(self, measured: Tensor, weight: float, schedule: StepSchedule) -> _Update:
        """Lets the device decide whether the update counts, which works on while the host reads the numbers and goes on."""
        norm = self._norm()
        wanted = norm.isfinite() & _allows_update(measured[:, 0].sum(), weight, schedule)
        made = _update_later(norm, wanted, measured)
        sizes = self._sizes() if schedule.measure_update else None
        optimizer: Any = self.optimizer
        optimizer.found_inf = (~wanted).float()
        optimizer.grad_scale = ((norm + 1e-6) / self._grad_clip).clamp(min=1.0) if self._grad_clip else None
        try:
            with self._update_under_way():
                optimizer.step()
        finally:
            optimizer.found_inf = optimizer.grad_scale = None
        return made(sizes)

    def _updated_at_once(self, measured: Tensor, weight: float, schedule: StepSchedule) -> _Update:
        """Reads what has been done within the backward pass."""
        assert self._at_once is not None
        return _update_later(self._at_once.norm, self._at_once.updated, measured)(self._sizes_before)

    @contextmanager
    def _updating_at_once(self, losses: Sequence[Tensor], weight: float, schedule: StepSchedule) -> Iterator[None]:
        """Within the block, the last backward pass of a step, weights change, if the step's ``losses`` allow that."""
        if self._at_once is None:
            yield
            return
        wanted = _allows_update(torch.stack(list(losses)).sum(), weight, schedule)
        self._sizes_before = self._sizes() if schedule.measure_update else None
        self._updating = True
        with self._at_once.during(wanted=wanted):
            yield

    @contextmanager
    def _update_under_way(self) -> Iterator[None]:
        """Weights and state are neither before nor after the update until it is done, by the device as well."""
        self._updating = True
        with record_function("optimizer"):
            yield
        if self._last_update is not None:
            self._last_update.note()
            self._updating = False

    def _is_torn(self) -> bool:
        """Whether another rank was lost within the update."""
        return self._updating or not (self._last_update is None or self._last_update.soon())

    def _norm(self) -> Tensor:
        return total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def _sizes(self) -> UpdateSizes:
        return UpdateSizes(self._parameters_by_group(), total=self._parts.sum)

    def explain(self, micro_batches: Sequence[Batch], *, schedule: StepSchedule) -> str | None:
        """Where the first number that is not finite comes from when a step is done again, uncompiled and without an update."""
        if self._parts.shared:
            return "weights lie in shards, where nothing is looked for; go on with train.strategy = 'ddp', or in one process"
        share = self._share(micro_batches)
        passes = self._passes
        compiled, loss = passes.logprobs, passes.loss
        uncompiled: Any = self.model.token_logprobs
        checked: Any = CheckedLoss(loss)
        passes.logprobs, passes.loss = uncompiled, checked

        def again() -> None:
            self._backward(uncompiled, micro_batches, share, schedule)

        try:
            return first_anomaly(self.model, again)
        finally:
            passes.logprobs, passes.loss = compiled, loss
            self.optimizer.zero_grad(set_to_none=True)

    def evaluate(self, batch: Batch) -> LossSum:
        """The summed loss of a batch."""

        def sums() -> LossSum:
            passes, recordings = self._passes, self._recordings
            arrays = passes.arrays(batch, self._neutral(batch))
            kind = "evaluation", shape_of(arrays)
            with self._without_update():
                measured = recordings.run(kind, arrays, passes.measured) if recordings.wants(kind) else None
                if measured is None:
                    with recordings.watched(kind):
                        measured = passes.measured(passes.tensors(arrays))
            return total_of(measured.names, measured.values.tolist(), weight=passes.loss.weight(batch))

        return self._guarded(sums)

    def answer_logprobs(self, batch: Batch) -> np.ndarray:
        """The log-probability of each row's counted targets, ``sum(weights * logprobs)``, float32 (rows,), in nats.

        Of a model that is not trained yet these are the reference's, in the very arithmetic of the training.
        """

        def rows() -> np.ndarray:
            with self._without_update():
                logprobs = self._passes.answers(batch, self._neutral(batch))
            return logprobs.cpu().numpy()

        return self._guarded(rows)

    def save(self, directory: Path) -> None:
        """Writes the model's files, the optimizer's state and the random state into ``directory``."""
        self._guarded(lambda: self._files.save(directory))

    def snapshot(self) -> Callable[[Path], None]:
        """A copy in the host's memory of what `save` would write now; what is returned writes it, from any thread."""
        return self._guarded(self._files.snapshot)

    def load(self, directory: Path) -> None:
        """Restores what `save` wrote; raises ValueError naming the first tensor that is missing, left over or of another shape."""
        self._files.load(directory)

    def whole_model(self) -> nn.Module:
        """The model, or of one in shards a copy that is whole, on the CPU."""
        return self._parts.whole_model()

    def restart(self) -> None:
        """Back to before the first step; raises ValueError where ``begin`` was not given."""
        if self._begin is None:
            raise ValueError("the step was not told with which weights the training began; start the run again")
        self._parts.change(self._begin)
        forget_updates(self.optimizer, keeps_state=self._keeps_state)
        self._scaler = self._new_scaler()
        self._first_random.restore()

    def _guarded(self, work: Callable[[], Any], *, renews: bool = False) -> Any:
        """The result, or `OutOfMemory`; ``renews`` where all ranks break off together."""
        random, self._updating, given_up = RandomState(self.device), False, False

        def recover() -> bool:
            nonlocal given_up
            self.optimizer.zero_grad(set_to_none=True)
            if renews:
                self._parts.renew()
            state = self._scaler.state_dict()
            self._scaler = self._new_scaler()  # The old one remembers that it has unscaled gradients in this step.
            self._scaler.load_state_dict(state)
            random.restore()
            given_up = len(self._recordings) > 0
            if given_up:
                self._recordings.stop()
            empty_caches(self.device)
            return self._updating

        try:
            return guarded(work, recover=recover)
        except OutOfMemory as error:
            if error.torn or not given_up:
                raise
            self._notify(
                f"memory ran out beside recorded passes ({error}); they are given up, and it is tried again without"
            )
        return guarded(work, recover=recover)  # with the memory of the recordings, which are given up

    def _new_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.float16)

    def _parameters_by_group(self) -> dict[str, Sequence[Tensor]]:
        return {_group_name(i, group): group["params"] for i, group in enumerate(self.optimizer.param_groups)}

    def _apply(self, schedule: StepSchedule) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule.lr_scale
            if schedule.momentum is not None and "momentum" in group:
                group["momentum"] = schedule.momentum

    def _accumulate(self, micro_batches: Sequence[Batch], share: _Share, schedule: StepSchedule) -> Sums:
        """Gradients of all micro-batches, those of other ranks included, and what was measured on each of this rank."""
        if not self._recordings.wanted:
            return self._backward(self._parts, micro_batches, share, schedule)
        kind = "training", *(shape_of(self._passes.arrays(batch, {})) for batch in micro_batches)
        recorded = share.weight and self._recordings.wants(kind)
        sums = self._recorded(kind, micro_batches, share, schedule) if recorded else None
        if sums is None:
            with self._recordings.watched(kind):
                sums = self._backward(self._parts, micro_batches, share, schedule)
        return sums

    def _recorded(
        self, kind: Hashable, micro_batches: Sequence[Batch], share: _Share, schedule: StepSchedule
    ) -> Sums | None:
        """The same by recorded passes of one process; None where they could not be recorded."""
        self.optimizer.zero_grad(set_to_none=True)
        self._gradients.begin(accumulated=len(micro_batches) > 1)
        # As CUDA rounds the division by a number that the host knows.
        scale = np.float32(1.0) / np.float32(share.weight)

        def work(tensors: Tensors) -> Sums:
            factor = tensors.pop("scale")
            loss, measures = self._passes.loss_of(tensors)
            (loss * factor).backward()
            return sums_of([(loss, measures)])

        found, first_row = [], share.first_row
        for number, batch in enumerate(micro_batches):
            arrays = self._passes.drawn(batch, step=schedule.number, first_row=first_row)
            key = kind, number > 0, shape_of(arrays)
            with record_function("forward and backward"):
                sums = self._recordings.run(key, {**arrays, "scale": np.array(scale)}, work)
            if sums is None:
                return None
            found.append(Sums(sums.names, sums.values.clone()))
            first_row += len(batch.tokens)
        return Sums(found[0].names, torch.cat([sums.values for sums in found]))

    def _backward(
        self, logprobs: Callable[..., Tensor], micro_batches: Sequence[Batch], share: _Share, schedule: StepSchedule
    ) -> Sums:
        """Gradients that ``logprobs`` gives; where it is that of all ranks together, the last backward pass is for their exchange."""
        together = logprobs is self._parts
        self.optimizer.zero_grad(set_to_none=True)
        self._gradients.begin(accumulated=self._several or len(micro_batches) > 1)
        found = []
        first_row = share.first_row
        divisor = share.weight / (self._ranks.size if together else 1)  # Gradients are averaged.

        def forward(batch: Batch, counted: float) -> Tensor:
            nonlocal first_row
            arrays = self._passes.drawn(batch, step=schedule.number, first_row=first_row)
            tensors = self._passes.tensors(arrays)
            with record_function("forward"):
                loss, measures = self._passes.loss_of(tensors, logprobs=logprobs)
            if not counted:
                return 0.0 * loss
            first_row += len(batch.tokens)
            found.append((loss.detach(), measures))  # with its graph, it would keep the activations
            return loss

        def backward(loss: Tensor) -> None:
            with record_function("backward"):
                self._scaler.scale(loss / divisor).backward()

        *others, last = self._parts.padded(micro_batches, share.most)
        with self._parts.agreed() if together else nullcontext():
            for batch in others:
                with self._parts.local() if together else nullcontext():
                    backward(forward(*batch))
            loss = forward(*last)
        losses = [loss for loss, _ in found]
        at_once = self._updating_at_once(losses, share.weight, schedule) if together else nullcontext()
        with self._parts.agreed() if together else nullcontext(), self._parts.exchanging(), at_once:
            backward(loss)
        return sums_of(found)

    def _neutral(self, batch: Batch) -> Mapping[str, np.ndarray]:
        """A compiled model keeps its training graph in an evaluation, with the arguments that it has there."""
        return self._passes.neutral(batch) if self.compiled else {}

    @contextmanager
    def _without_update(self) -> Iterator[None]:
        """A compiled model keeps its training graph: without gradients it would be compiled a second time."""
        with torch.set_grad_enabled(self.compiled and not self._parts.shared), self._parts.evaluating():
            yield

    def _leave_compilation(self, error: Exception) -> None:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        products = ", and without 8-bit products" if getattr(self.model, "float8", False) else ""
        self._notify(f"torch.compile failed here ({reason}); training goes on without it{products}")
        self.compiled = False
        self._recordings.forget()
        self._parts.leave_compilation()
        self._passes.logprobs = self.model.token_logprobs  # type: ignore[assignment]


def _allows_update(loss: Tensor, weight: float, schedule: StepSchedule) -> Tensor:
    """Whether a step of this summed loss may change weights, a scalar on the device."""
    allowed = loss.isfinite() & (weight > 0)
    if schedule.max_loss is not None:
        allowed &= loss <= schedule.max_loss * weight
    return allowed


def _update_later(norm: Tensor, updated: Tensor, measured: Tensor) -> Callable[[UpdateSizes | None], _Update]:
    """Reads the numbers of an update when it is called: on CUDA, what the device is given until then does not delay them."""
    numbers = torch.cat((torch.stack((norm, updated)), measured.flatten()))
    read = Later(numbers).read if numbers.is_cuda else numbers.tolist

    def made(sizes: UpdateSizes | None) -> _Update:
        grad_norm, done, *values = read()
        rows = torch.tensor(values, dtype=torch.float64).view(measured.shape).tolist()
        return _Update(measured=rows, grad_norm=grad_norm, updated=bool(done), sizes=sizes)

    return made


def _group_name(index: int, group: dict[str, Any]) -> str:
    return str(group.get("name", f"group {index}")).replace(" ", "_")
