"""The loop of every stage: batches in, optimizer steps, evaluations and checkpoints out.

Notable: the loop knows no framework, no model and no file format of theirs; it owns the order of things. What is done in each case lies
beside it: `evaluations`, `checkpointing`, `loss_faults`, `memory_faults` and `rank_faults`. Its whole state is a few integers
(`progress`: the step and what follows from it) and the numbers of early stopping and of recovery, so a resumed run consumes exactly the
samples that an uninterrupted one would.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from anarcho_train.checkpoint import STATE_FILE, CheckpointError, CheckpointStore
from anarcho_train.checkpointing import Checkpointing
from anarcho_train.config import TrainConfig
from anarcho_train.evaluations import Evaluations
from anarcho_train.interfaces import (
    EarlyStopping,
    MetricSink,
    Throughput,
    TrainingBatches,
    Unmeasured,
    ValidationBatches,
)
from anarcho_train.loss_faults import LossFaults
from anarcho_train.memory_faults import MemoryFaults
from anarcho_train.micro_batch import MicroBatches, Rows, largest_fitting
from anarcho_train.out_of_memory import OutOfMemory
from anarcho_train.progress import Progress, TrainResult
from anarcho_train.rank_faults import RankFaults
from anarcho_train.rank_speeds import RankSpeeds
from anarcho_train.ranks import DONE, Alone, RankFailed, RankLost, Ranks, Turn, mark_known, share
from anarcho_train.recovery import Recovery, RecoveryConfig
from anarcho_train.signals import StopSignal
from anarcho_train.step import Batch, Step, StepMetrics, StepSchedule

WAIT_SECONDS = 0.02
"""How often a run that waits for data looks for it."""


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
    background: Callable[[], bool] = lambda: False
    """Asked before each checkpoint: whether there is room for a copy of the state, which is written while the training goes on."""
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
            self.config.length_at(0, self.sequence_length)
        elif self.samples_per_step < 1:
            raise ValueError(f"samples_per_step is {self.samples_per_step}; expected at least 1, or None")
        elif self.config.length_warmup:
            raise ValueError(
                f"train.length_warmup is {self.config.length_warmup}, but samples are whole batches, which are not cut; expected 0"
            )
        else:
            self._per_step, size = self.samples_per_step, 1
        self._share = share(self._per_step, self.ranks)
        self.cut = MicroBatches(
            samples=self._share,
            length=self.sequence_length,
            size=largest_fitting(size, sequences=self._share),
            whole=self.samples_per_step is not None,
            tokens=self.micro_batch_tokens,
        )
        """How samples are cut into what goes through the model at once."""
        self.policies = Recovery(self.recovery, samples_per_step=self._per_step, directory=self.checkpoints.directory)
        """What decides about faults, and which sample a step begins with."""
        self.progress = Progress()
        self._beginning = {"step": 0, "tokens": 0, "early_stopping": self.early_stopping.state_dict()}
        self.evaluations, self.saving, self.memory = Evaluations(self), Checkpointing(self), MemoryFaults(self)
        self._losses, self._others = LossFaults(self), RankFaults(self)
        self._agreed_stop: int | None = None
        self._own: list[Batch] = []
        self._tokens, self._saving, self._speeds = 0, DONE, RankSpeeds()

    @property
    def micro_batch(self) -> str:
        """What goes through the model at once, in words."""
        return str(self.cut)

    @property
    def micro_batches(self) -> Sequence[Batch]:
        """This rank's part of the next step, or of the one that is being made."""
        return self._own

    def resume(self, checkpoint: Path) -> None:
        """Restores the state of ``checkpoint``; raises `CheckpointError` or ValueError if it does not fit."""
        state = self.checkpoints.read_state(checkpoint)
        self.step.load(checkpoint)
        try:
            self._take_up(state, checkpoint)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{checkpoint}/{STATE_FILE} does not hold what a run goes on from ({type(error).__name__}: {error}); it was made by hand "
                "or is damaged: remove this checkpoint to go on from the one before"
            ) from error

    def begin_again(self) -> None:
        """Restores the state before the first step."""
        self.step.restart()
        self._take_up(self._beginning, None)

    def _take_up(self, state: Mapping[str, Any], checkpoint: Path | None) -> None:
        self.cut.load_state(state.get("micro_batch", {}))
        self.early_stopping.load_state_dict(state["early_stopping"])
        self.progress = Progress.restored(state, checkpoint, best_step=self.early_stopping.best_step)
        step = self.progress.result.step
        samples = int(state.get("samples", step * self._per_step))
        self.policies.load_state_dict(state.get("recovery", {}), step=step, samples=samples)

    def run(self) -> TrainResult:
        """Trains up to the configured number of steps, or until early stopping or a signal, and returns how it ended."""
        self.throughput.begin(self.progress.result.step)
        self.saving.begin()
        self.write("start", **self.facts)
        self._announce()
        self.memory.take_word()
        with StopSignal() as stop:
            try:
                while not self._make_steps(stop):
                    pass
                self.saving.wait()
                if number := self._agreed_stop or stop.number:
                    self._stop(number)
            except RankLost as error:
                raise RankLost(f"{error}; {self._others.outlive(error)}") from error
            finally:
                self.saving.close()
        return self.progress.result

    def _make_steps(self, stop: StopSignal) -> bool:
        """Trains until the end or a signal; False where memory ran out in an update, so that the run went back to a whole state."""
        unreported: list[StepMetrics] = []
        try:
            while self._goes_on() and self._await_batch(stop):
                self.saving.take_in(self._saving)
                step, metrics = self.progress.result.step + 1, self._train_step()
                unreported.append(metrics)
                if self._is_logged(step):
                    self._log(unreported)
                    unreported = []
                if self._losses.recover(metrics):
                    unreported = []
                else:
                    self.progress.whole = True
                    self.conclude_step()
                self.progress.whole = self.progress.concluded = True
        except OutOfMemory as error:
            if not error.torn:
                raise
            self.memory.go_back(error)
            self.progress.whole = True
            return False
        return True

    def _goes_on(self) -> bool:
        return self.progress.result.step < self.config.steps and not self.progress.finished

    def conclude_step(self) -> None:
        """Evaluates and saves where that is due after the step that was made."""
        result, config = self.progress.result, self.config
        last, improved = result.step == config.steps, False
        if self.validation and (last or (config.eval_every and result.step % config.eval_every == 0)):
            improved = self.evaluations.run(self.validation, last=last)
        due = config.checkpoint_every and result.step % config.checkpoint_every == 0
        if last or due or improved or self.progress.finished:
            self.saving.save(final=last or self.progress.finished)
        elif self.saving.due_by_clock():
            self.saving.save(by_clock=True)
        if self.progress.finished and not last:
            self.event("early stopping: the validation loss has not improved for too long")

    def _await_batch(self, stop: StopSignal) -> bool:
        """Waits until all ranks have their samples of the next step; False where a signal or the end of the data says to end the run."""
        with self.throughput.waiting():
            while (turn := self._turn(stop)).state == "waiting" and not turn.stop:
                time.sleep(WAIT_SECONDS)
        if slow := self._speeds.take(turn.seconds, self.ranks):
            self.event(slow, fault="straggler")
        self._agreed_stop, self._tokens, self._saving = turn.stop, turn.tokens, turn.saving
        self._announce()
        if turn.state == "ended" and not turn.stop:
            self._end_of_data()
        return turn.state == "ready" and not turn.stop

    def _turn(self, stop: StopSignal) -> Turn:
        """What all ranks know before the next step. Whatever the data of one fails with for good, the state is saved first."""
        state, error = "ready", None
        if not stop.requested:
            try:
                with self._speeds.reading():
                    state = self.batches.state(self.policies.first_sample(self.progress.result.step), self._per_step)
                    self._own = self._read_step() if state == "ready" else []
            except (ValueError, OSError) as failure:
                state, error = "failed", failure
        tokens = sum(batch.tokens.size for batch in self._own)
        turn = Turn.agreed(
            self.ranks,
            stop=stop.number,
            state=state,
            tokens=tokens,
            saving=self.saving.state,
            seconds=self._speeds.to_tell(),
        )
        if turn.state == "failed":
            self.saving.save(planned=False)
            failure = error or RankFailed("another process of this run cannot read its data; its own message says why")
            mark_known(failure)
            raise failure
        return turn

    def _end_of_data(self) -> None:
        """The data is used up before the configured number of steps: the run ends as if this had been its last step."""
        self.event(f"the data has come to its end after {self.progress.result.step} of {self.config.steps} steps")
        if self.validation and self.progress.result.step:
            if self.progress.compared_loss is None:
                self.evaluations.run(self.validation, last=True)
            else:
                self.evaluations.measure(self.validation, max_tokens=None)
        self.progress.finished = True
        self.saving.save(final=True)

    def _stop(self, number: int) -> None:
        """A signal came: the state is saved, and unless the run was at its end anyway, the signal is how it ended."""
        self.saving.save(planned=False, needed=True)
        if self._goes_on():
            self.progress.result.stopped_by = number
        self.event(f"stopped by signal {number}; the state is saved")

    def _train_step(self) -> StepMetrics:
        result = self.progress.result
        self._tell_length(result.step)
        schedule = replace(
            self.schedule(result.step),
            measure_update=self._is_logged(result.step + 1),
            max_loss=self.policies.max_loss,
        )
        while True:
            try:
                with self._speeds.stepping(self.ranks):
                    metrics = self.step.train(self._own, schedule=schedule)
                break
            except OutOfMemory as error:
                self.progress.whole = not error.torn
                self.memory.shrink(error, self._own, where=f"in step {result.step + 1}")
                self._own = self._read_step()
        self.progress.count_step(self._tokens)
        self.throughput.finish_step(self._tokens)
        return metrics

    def _tell_length(self, step: int) -> None:
        """Sequences of another length than those of the step before are worth a word."""
        length = self.config.length_at(step, self.sequence_length)
        if self.config.length_warmup and (step == 0 or length != self.config.length_at(step - 1, self.sequence_length)):
            self.event(f"sequences have {length} tokens from here on")

    def _read_step(self) -> list[Batch]:
        """This rank's micro-batches of the next step, of which rank 0 takes the first."""
        step = self.progress.result.step
        first = self.policies.first_sample(step) + self.ranks.rank * self._share
        parts = self.cut.of(self.batches, first, self._share)
        length = self.config.length_at(step, self.sequence_length)
        return parts if length == self.sequence_length else [Rows.cut(part, length) for part in parts]

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
        speeds = self.throughput.metrics() | self._speeds.metrics()
        self.write("train", **values, **measures, **rates, **speeds, **self.gauges())

    def _announce(self) -> None:
        while self.announcements:
            self.event(**self.announcements.pop(0))

    def event(self, message: str, **fields: Any) -> None:
        """Records what a person should know."""
        self.write("event", message=message, **fields)

    def write(self, kind: str, **values: Any) -> None:
        """Records the values of a moment, which is after the step that was made last."""
        self.sink.write(kind, step=self.progress.result.step, tokens=self.progress.result.tokens, **values)
