"""The loop of every stage: batches in, optimizer steps, evaluations and checkpoints out.

Notable: the loop knows no framework, no model and no file format of theirs; it owns the order of things. Its whole state is a few
integers (the step and what follows from it) and the numbers of early stopping and of recovery, so a resumed run consumes exactly the
samples that an uninterrupted one would.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from anarcho_train.checkpoint import CheckpointStore
from anarcho_train.config import TrainConfig
from anarcho_train.interfaces import (
    EarlyStopping,
    MetricSink,
    Throughput,
    TrainingBatches,
    Unmeasured,
    ValidationBatches,
)
from anarcho_train.micro_batch import MicroBatches, largest_fitting
from anarcho_train.out_of_memory import OutOfMemory, advice
from anarcho_train.ranks import Alone, RankFailed, RankLost, Ranks, Turn, mark_known, share
from anarcho_train.recovery import Fault, Recovery, RecoveryConfig, TrainingDiverged
from anarcho_train.saving import Saves, require_free
from anarcho_train.signals import StopSignal
from anarcho_train.step import Batch, LossSum, Step, StepMetrics, StepSchedule
from anarcho_train.validation import bits_per_byte, total_loss

WAIT_SECONDS = 0.02
"""How often a run that waits for data looks for it."""


@dataclass(kw_only=True)
class TrainResult:
    """How a run ended."""

    step: int
    """Optimizer steps made, earlier attempts included."""
    tokens: int
    """Tokens consumed, earlier attempts included."""
    validation_loss: float | None = None
    """Last validation loss, in nats per token or pair."""
    bits_per_byte: float | None = None
    """The same in bits per byte of text; None of a stage that has measures of its own."""
    validation_measures: dict[str, float] = field(default_factory=dict)
    """What the stage measures besides its loss, such as the accuracy of preferences, on the validation data."""
    best_step: int | None = None
    """Step of the lowest validation loss."""
    stopped_by: int | None = None
    """Number of the signal that stopped the run early."""
    checkpoint: Path | None = None
    """The last checkpoint."""


@dataclass(kw_only=True)
class Loop:
    """One run: what it needs, and `run`, which does it."""

    step: Step
    batches: TrainingBatches
    validation: ValidationBatches | None
    schedule: Callable[[int], StepSchedule]
    config: TrainConfig
    sequence_length: int
    checkpoints: CheckpointStore
    sink: MetricSink
    early_stopping: EarlyStopping
    hashes: dict[str, str] = field(default_factory=dict)
    """Hashes of config, tokenizer and data, for the manifests."""
    throughput: Throughput = field(default_factory=Unmeasured)
    """Measures speed and remaining time."""
    gauges: Callable[[], Mapping[str, float]] = dict
    """Further values for each "train" record, such as memory readings."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the "start" record of this attempt says besides the step."""
    on_checkpoint: Callable[[], None] = lambda: None
    """Called after each checkpoint, when samples before it may be let go."""
    samples_per_step: int | None = None
    """Where samples are whole batches of changing shape: how many of them make a step, one going through the model at a time.

    Left out, samples are sequences of `sequence_length`, and the config says how many make a step and a micro-batch."""
    micro_batch_tokens: int | None = None
    """Most tokens of such a batch that go through the model at once; None is all of them, until memory runs out."""
    ranks: Ranks = field(default_factory=Alone)
    """The processes that train together; only the first writes anything, into ``sink`` as well."""
    inherits: Callable[[], bool] = lambda: True
    """Asked where another process was lost: whether this one may write the state that is left."""
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    """What is done about faults."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The configuration as JSON values, which each checkpoint keeps."""
    announcements: list[dict[str, Any]] = field(default_factory=list)
    """Events of the beginning of this attempt, and what the data adds as it is read: a ``message`` each, and further values."""
    checkpoint_bytes: int = 0
    """What a checkpoint takes on the disk, about; no smaller space is begun to be filled."""

    def __post_init__(self) -> None:
        if self.samples_per_step is None:
            self._per_step, size = self.config.batch_sequences(self.sequence_length), self.config.fixed_micro_batch
        elif self.samples_per_step < 1:
            raise ValueError(f"samples_per_step is {self.samples_per_step}; expected at least 1, or None")
        else:
            self._per_step, size = self.samples_per_step, 1
        self._share = share(self._per_step, self.ranks)
        self._micro = MicroBatches(
            samples=self._share,
            length=self.sequence_length,
            size=largest_fitting(size, sequences=self._share),
            whole=self.samples_per_step is not None,
            tokens=self.micro_batch_tokens,
        )
        self._beginning = {"step": 0, "tokens": 0, "early_stopping": self.early_stopping.state_dict()}
        self._recovery = Recovery(self.recovery, samples_per_step=self._per_step, directory=self.checkpoints.directory)
        self._saves = Saves(limit=self.recovery.max_failed_saves)
        self._result = TrainResult(step=0, tokens=0)
        self._compared_loss: float | None = None
        self._finished = False
        self._saved_step: int | None = None
        self._agreed_stop: int | None = None
        self._own: list[Batch] = []
        self._tokens = 0
        self._whole, self._concluded = True, True
        """Whether model and counters are of one step, and whether all is done that is due after it."""

    @property
    def micro_batch(self) -> str:
        """What goes through the model at once, in words."""
        return str(self._micro)

    def resume(self, checkpoint: Path) -> None:
        """Restores the state of ``checkpoint``; raises `CheckpointError` or ValueError if it does not fit."""
        state = self.checkpoints.read_state(checkpoint)
        self.step.load(checkpoint)
        self._take_up(state, checkpoint)

    def _take_up(self, state: Mapping[str, Any], checkpoint: Path | None) -> None:
        self._micro.load_state(state.get("micro_batch", {}))
        self.early_stopping.load_state_dict(state["early_stopping"])
        self._result = TrainResult(
            step=int(state["step"]),
            tokens=int(state["tokens"]),
            validation_loss=state.get("validation_loss"),
            bits_per_byte=state.get("bits_per_byte"),
            validation_measures=state.get("validation_measures", {}),
            best_step=self.early_stopping.best_step,
            checkpoint=checkpoint,
        )
        self._compared_loss = state.get("compared_loss")
        self._finished = bool(state.get("finished"))
        self._saved_step = self._result.step
        samples = int(state.get("samples", self._result.step * self._per_step))
        self._recovery.load_state_dict(state.get("recovery", {}), step=self._result.step, samples=samples)

    def run(self) -> TrainResult:
        """Trains up to the configured number of steps, or until early stopping or a signal, and returns how it ended."""
        self.throughput.begin(self._result.step)
        self._write("start", **self.facts)
        self._announce()
        with StopSignal() as stop:
            try:
                while not self._make_steps(stop):
                    pass
            except RankLost as error:
                raise RankLost(f"{error}; {self._outlive(error)}") from error
            if number := self._agreed_stop or stop.number:
                self._stop(number)
        return self._result

    def _make_steps(self, stop: StopSignal) -> bool:
        """Trains until the end or a signal; False where memory ran out in an update, so that the run went back to a whole state."""
        unreported: list[StepMetrics] = []
        try:
            while (result := self._result).step < self.config.steps and not self._finished and self._await_batch(stop):
                metrics = self._train_step()
                unreported.append(metrics)
                if self._is_logged(result.step):
                    self._log(unreported)
                    unreported = []
                if self._recover(metrics):
                    unreported = []
                else:
                    self._whole = True
                    self._conclude_step()
                self._whole = self._concluded = True
        except OutOfMemory as error:
            if not error.torn:
                raise
            self._go_back(error)
            self._whole = True
            return False
        return True

    def _conclude_step(self) -> None:
        """Evaluates and saves where that is due after the step that was made."""
        result, config = self._result, self.config
        last, improved = result.step == config.steps, False
        if self.validation and (last or (config.eval_every and result.step % config.eval_every == 0)):
            improved = self._evaluate(self.validation, last=last)
        due = config.checkpoint_every and result.step % config.checkpoint_every == 0
        if last or due or improved or self._finished:
            self._save(final=last or self._finished)
        if self._finished and not last:
            self._event("early stopping: the validation loss has not improved for too long")

    def _await_batch(self, stop: StopSignal) -> bool:
        """Waits until all ranks have their samples of the next step; False where a signal or the end of the data says to end the run."""
        with self.throughput.waiting():
            while (turn := self._turn(stop)).state == "waiting" and not turn.stop:
                time.sleep(WAIT_SECONDS)
        self._agreed_stop, self._tokens = turn.stop, turn.tokens
        self._announce()
        if turn.state == "ended" and not turn.stop:
            self._end_of_data()
        return turn.state == "ready" and not turn.stop

    def _turn(self, stop: StopSignal) -> Turn:
        """What all ranks know before the next step. Whatever the data of one fails with for good, the state is saved first."""
        state, error = "ready", None
        if not stop.requested:
            try:
                state = self.batches.state(self._recovery.first_sample(self._result.step), self._per_step)
                self._own = self._read_step() if state == "ready" else []
            except (ValueError, OSError) as failure:
                state, error = "failed", failure
        tokens = sum(batch.tokens.size for batch in self._own)
        turn = Turn.agreed(self.ranks, stop=stop.number, state=state, tokens=tokens)
        if turn.state == "failed":
            self._save(planned=False)
            failure = error or RankFailed("another process of this run cannot read its data; its own message says why")
            mark_known(failure)
            raise failure
        return turn

    def _end_of_data(self) -> None:
        """The data is used up before the configured number of steps: the run ends as if this had been its last step."""
        self._event(f"the data has come to its end after {self._result.step} of {self.config.steps} steps")
        if self.validation and self._result.step:
            if self._compared_loss is None:
                self._evaluate(self.validation, last=True)
            else:
                self._measure(self.validation, max_tokens=None)
        self._finished = True
        self._save(final=True)

    def _stop(self, number: int) -> None:
        """A signal came: the state is saved, and unless the run was at its end anyway, the signal is how it ended."""
        self._save(planned=False, needed=True)
        if self._result.step < self.config.steps and not self._finished:
            self._result.stopped_by = number
        self._event(f"stopped by signal {number}; the state is saved")

    def _outlive(self, error: RankLost) -> str:
        """Another rank is gone: the state is saved by the one that may write, which does alone what is still due after the last step.

        Returns what became of it. Where others have gone on with the run meanwhile (this process was asleep), they have written
        checkpoints that it does not know.
        """
        if not self._whole or not self.inherits():
            return "this process saves nothing"
        if self.ranks.rank and self._newest_written() != (self._saved_step or 0):
            return "others have gone on with it already"
        self.ranks = Alone()
        if not self._concluded:
            self._conclude_step()
        self._save(planned=False)
        saved = f"the state after step {self._result.step} is saved" if self._result.step else "no step was made yet"
        self._event(f"{error}; {saved}", fault="rank")
        return saved

    def _newest_written(self) -> int:
        return max((info.step for info in self.checkpoints.list(check_hashes=False)), default=0)

    def _train_step(self) -> StepMetrics:
        result = self._result
        schedule = replace(
            self.schedule(result.step),
            measure_update=self._is_logged(result.step + 1),
            max_loss=self._recovery.max_loss,
        )
        while True:
            try:
                metrics = self.step.train(self._own, schedule=schedule)
                break
            except OutOfMemory as error:
                self._whole = not error.torn
                self._shrink(error, self._own, where=f"in step {result.step + 1}")
                self._own = self._read_step()
        self._whole = self._concluded = False
        self.throughput.finish_step(self._tokens)
        result.step += 1
        result.tokens += self._tokens
        # The validation figures belong to the step at which they were measured.
        result.validation_measures = {}
        result.validation_loss = result.bits_per_byte = self._compared_loss = None
        return metrics

    def _read_step(self) -> list[Batch]:
        """This rank's micro-batches of the next step, of which rank 0 takes the first."""
        first = self._recovery.first_sample(self._result.step) + self.ranks.rank * self._share
        return self._micro.of(self.batches, first, self._share)

    def _evaluate(self, validation: ValidationBatches, *, last: bool) -> bool:
        """Measures the validation loss and decides on early stopping; returns whether the loss is the best so far.

        Evaluations are compared with each other on the same text, so the last one reads the limited part first and then the whole.
        """
        result, limit = self._result, self.config.eval_tokens
        limited = limit is not None and limit < validation.num_tokens
        if self._compared_loss is None:
            self._compared_loss = self._measure(validation, max_tokens=limit if limited else None)
            self._finished = self.early_stopping.update(self._compared_loss, result.step)
            result.best_step = self.early_stopping.best_step
        if limited and (last or self._finished):
            self._measure(validation, max_tokens=None)
        return self.early_stopping.best_step == result.step

    def _measure(self, validation: ValidationBatches, *, max_tokens: int | None) -> float:
        windowed = self.samples_per_step is None
        with self.throughput.pause("validation", every=self.config.eval_every or None):
            total = total_loss(
                self.step,
                validation,
                batch_size=int(self.ranks.gathered([self._micro.size]).min()),
                window_tokens=self.sequence_length if windowed else validation.num_tokens / validation.num_windows,
                max_tokens=max_tokens,
                measure=self._evaluate_batch,
                ranks=self.ranks,
            )
        loss, measures = total.loss / total.weight, total.means()
        bits = None if measures else bits_per_byte(total, validation)
        self._result.validation_loss, self._result.bits_per_byte = loss, bits
        self._result.validation_measures = measures
        self._write("validation", loss=loss, **(measures or {"bits_per_byte": bits}))
        return loss

    def _evaluate_batch(self, batch: Batch) -> LossSum:
        while True:
            parts = self._micro.parts(batch)
            try:
                return sum(map(self.step.evaluate, parts), LossSum())
            except OutOfMemory as error:
                self._shrink(error, parts, where=f"in the evaluation after step {self._result.step}", alone=True)

    def _shrink(self, error: OutOfMemory, micro_batches: Sequence[Batch], *, where: str, alone: bool = False) -> None:
        """Makes the micro-batches smaller after memory ran out; raises `OutOfMemory` where they cannot be, or the update was torn."""
        told = [float(self._micro.shrink(micro_batches)), float(error.torn)]
        smaller, torn = (told if alone else self.ranks.gathered(told).max(axis=0))[:2]
        if not smaller:
            if not torn:
                self._save(planned=False, needed=True)
            raise OutOfMemory(
                f"memory ran out {where} even with the smallest micro-batch ({error}); {advice(self.config)}"
            )
        what = f"out of memory {where} ({error}); from now on, {self._micro} go through the model at once"
        self._event(what, fault="memory", micro_batch_tokens=self._micro.tokens)
        if torn:
            # A process that evaluates alone cannot go back alone: it ends, and the others with it.
            raise OutOfMemory(str(error), torn=not alone or self.ranks.size == 1)

    def _go_back(self, error: OutOfMemory) -> None:
        """Restores the newest state that is whole, after an update that had begun; the same samples come again."""
        failed = self._result.step
        step = self._newest_step()
        if step:
            self.resume(self.checkpoints.path(step))
        else:
            self.step.restart()
            self._take_up(self._beginning, None)
        self.throughput.begin(step)
        self._event(
            f"went back from step {failed} to step {step}, as the update had begun when memory ran out ({error})",
            fault="memory",
            rolled_back_to=step,
        )

    def _newest_step(self) -> int:
        """The step of the newest checkpoint, as the first rank finds it; 0 where there is none."""
        path = self.checkpoints.latest_valid(notify=self._event) if self.ranks.rank == 0 else None
        step = 0 if path is None else int(self.checkpoints.read_state(path)["step"])
        return int(self.ranks.gathered([step])[0, 0])

    def _save(self, *, planned: bool = True, final: bool = False, needed: bool = False) -> None:
        """Writes a checkpoint, unless this very step has one or there is nothing to keep yet.

        The ``final`` one is tried several times. One that is not ``planned`` would not be there if nothing had interrupted the run.
        """
        result = self._result
        if result.step in (0, self._saved_step):
            return
        if self.ranks.rank:
            result.checkpoint, self._saved_step = self.checkpoints.path(result.step), result.step
            return
        state = self._state(planned=planned)
        started = time.monotonic()

        def save() -> Path:
            require_free(
                self.checkpoints.directory, self.checkpoint_bytes, purpose=f"the checkpoint of step {result.step}"
            )
            return self.checkpoints.save(result.step, self.step.save, state=state, hashes=self.hashes)

        with self.throughput.pause("checkpoint"):
            path = self._saves.attempt(save, report=self._report_failed_save, needed=needed or final, patient=final)
        if path is None:
            return
        result.checkpoint, self._saved_step = path, result.step
        self._write("checkpoint", path=str(path.name), seconds=time.monotonic() - started)
        self.on_checkpoint()

    def _report_failed_save(self, message: str, failures: int) -> None:
        self._event(f"the checkpoint of step {self._result.step} {message}", fault="save", failures=failures)

    def _state(self, *, planned: bool) -> dict[str, Any]:
        """What a checkpoint keeps besides the step's files."""
        result = self._result
        sample = self._recovery.first_sample(result.step)
        state = {
            "tokens": result.tokens,
            "samples": sample,
            "position": self.batches.position(sample),
            "early_stopping": self.early_stopping.state_dict(),
            "validation_loss": _finite(result.validation_loss),
            "bits_per_byte": _finite(result.bits_per_byte),
            "compared_loss": _finite(self._compared_loss),
            "finished": self._finished,
            "planned": planned,
            "recovery": self._recovery.state_dict(),
            "settings": self.settings,
            "micro_batch": self._micro.state(),
        }
        if result.validation_measures:
            state["validation_measures"] = {
                name: value for name, value in result.validation_measures.items() if math.isfinite(value)
            }
        return state

    def _is_logged(self, step: int) -> bool:
        return step == self.config.steps or step % self.config.log_every == 0

    def _log(self, unreported: Sequence[StepMetrics]) -> None:
        """Records means and the largest loss of the steps since the last record, and the rest as of now."""
        last, losses = unreported[-1], [metrics.loss for metrics in unreported]
        rates = {f"lr_{group}": rate for group, rate in last.learning_rates.items()}
        rates |= {f"update_ratio_{group}": ratio for group, ratio in last.update_ratios.items()}
        values = {"loss": sum(losses) / len(losses), "loss_max": max(losses), "grad_norm": last.grad_norm}
        measures = {
            name: sum(metrics.measures[name] for metrics in unreported) / len(unreported) for name in last.measures
        }
        self._write("train", **values, **measures, **rates, **self.throughput.metrics(), **self.gauges())

    def _recover(self, metrics: StepMetrics) -> bool:
        """Does about a fault what the policy says; returns whether the run was rolled back. Raises `TrainingDiverged` to stop it."""
        step = self._result.step - 1
        fault = self._recovery.judge(metrics, step=step, can_roll_back=lambda: self._earlier_step() is not None)
        if fault is None:
            return False
        if fault.action == "rollback":
            self._roll_back(fault)
            return True
        self._event(fault.message, **fault.fields)
        if fault.action == "stop":
            if not fault.escalated:
                self._save(planned=False, needed=True)
            raise TrainingDiverged(fault.ending)
        return False

    def _roll_back(self, fault: Fault) -> None:
        """Goes on from the newest checkpoint with the samples after those at fault."""
        step = self._earlier_step()
        assert step is not None, "a run is rolled back only where there is a checkpoint"
        if self.ranks.rank == 0:
            self.checkpoints.discard_after(step)
            self._recovery.roll_back(to=step, failed=fault.step)
        self.ranks.gathered([step])  # All read what the first has noted.
        self.resume(self.checkpoints.path(step))
        self.throughput.begin(step)
        sample = self._recovery.first_sample(step)
        self._event(
            f"rolled back from step {fault.step} to step {step} ({fault.what}); the run goes on with sample {sample}",
            **fault.fields,
            rolled_back_to=step,
            next_sample=sample,
            rollbacks=self._recovery.rollbacks,
        )

    def _earlier_step(self) -> int | None:
        """The step of the checkpoint to roll back to, as the first rank finds it."""
        path = self.checkpoints.before_fault() if self.ranks.rank == 0 else None
        step = -1 if path is None else int(self.checkpoints.read_state(path)["step"])
        found = int(self.ranks.gathered([step])[0, 0])
        return None if found < 0 else found

    def _announce(self) -> None:
        while self.announcements:
            self._event(**self.announcements.pop(0))

    def _event(self, message: str, **fields: Any) -> None:
        self._write("event", message=message, **fields)

    def _write(self, kind: str, **values: Any) -> None:
        self.sink.write(kind, step=self._result.step, tokens=self._result.tokens, **values)


def _finite(value: float | None) -> float | None:
    """The value as JSON has it; what is not finite is no measurement."""
    return value if value is not None and math.isfinite(value) else None
