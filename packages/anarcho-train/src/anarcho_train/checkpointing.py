"""When a run is saved, and what is saved of it besides the step's own files.

Notable: where there is room for a copy of the state, training stands still for the copy alone, and a thread writes it: never more than
one, so the next checkpoint waits for the one before. A write that has failed is known before the next step; whatever ends the run, or
reads checkpoints, waits for the writer first. Copy and direct write give the same bytes. Where several ranks have parts of the state, or
one writes while all go on with the training, all have to know what becomes of it, as `joined_saving` says.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anarcho_train.background_writing import BackgroundWriter
from anarcho_train.joined_saving import JoinedSaving
from anarcho_train.out_of_memory import OutOfMemory
from anarcho_train.ranks import DONE, Alone
from anarcho_train.saving import Saves, require_free

if TYPE_CHECKING:
    from anarcho_train.loop import Loop


@dataclass(frozen=True, kw_only=True)
class _Copied:
    """A state whose copy is being written."""

    step: int
    started: float
    copy_seconds: float


class Checkpointing:
    """The checkpoints that a loop makes."""

    def __init__(self, loop: Loop, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._loop, self._clock = loop, clock
        self._saves = Saves(limit=loop.recovery.max_failed_saves)
        self._writer = BackgroundWriter()
        self._copied: _Copied | None = None
        self._joined: JoinedSaving | None = None
        self._last_time = clock()

    def begin(self) -> None:
        """The run begins, or goes on, now: the minutes until the next checkpoint are counted from here."""
        self._last_time = self._clock()
        loop = self._loop
        if loop.ranks.size > 1 and (loop.step.in_parts or loop.ranks.gathered([loop.background()]).all()):
            self._joined = JoinedSaving(self._loop, self._saves, note=self._note, reporter=self._reporter)

    @property
    def together(self) -> bool:
        """Whether no rank can save alone."""
        return self._joined is not None

    @property
    def state(self) -> float:
        """How far this rank is with a checkpoint of which it writes a part, to be told to the others."""
        return self._joined.state if self._joined else DONE

    def due_by_clock(self) -> bool:
        """Whether the newest checkpoint is as old as the configuration allows; of several ranks, by the clock of the first."""
        loop, minutes = self._loop, self._loop.config.checkpoint_minutes
        if not minutes:
            return False
        due = self._clock() - self._last_time >= 60 * minutes
        return bool(loop.ranks.gathered([due])[0, 0])

    def save(self, *, planned: bool = True, by_clock: bool = False, final: bool = False, needed: bool = False) -> None:
        """Writes a checkpoint, unless this very step has one or there is nothing to keep yet.

        The ``final`` one is tried several times. One that is not ``planned`` would not be there if nothing had interrupted the run, or,
        saved ``by_clock``, not after this very step. Raises `SaveFailed`.
        """
        loop = self._loop
        if final or needed:
            self.wait()
        step = loop.progress.result.step
        if step in (0, loop.progress.saved_step):
            return
        if loop.ranks.rank and self._joined is None:
            loop.progress.result.checkpoint, loop.progress.saved_step = loop.checkpoints.path(step), step
            return
        state = copy.deepcopy(self._state(planned=planned and not by_clock, by_clock=by_clock))
        # A try that fails is not made again at once.
        self._last_time = self._clock()
        if self._joined is not None:
            self._joined.save(step, state, here=final or needed, patient=final)
        elif final or needed or not (loop.background() and self._save_aside(step, state)):
            self._save_here(step, state, needed=needed or final, patient=final)

    def wait(self) -> None:
        """Returns when no checkpoint is being written any more; raises `SaveFailed`."""
        if self._joined is not None:
            self._joined.wait()
        elif self._copied is not None:
            with self._loop.throughput.pause("checkpoint"):
                self._writer.wait()
            self.take_in()

    def take_in(self, state: float = DONE) -> None:
        """Notes how a checkpoint that was being written has come out; does nothing while it still is. Raises `SaveFailed`.

        ``state`` is what that of all ranks comes to.
        """
        if self._joined is not None:
            self._joined.advance(state)
        elif self._copied is not None and not self._writer.busy:
            self._take_in_copy(self._copied)

    def _take_in_copy(self, copied: _Copied) -> None:
        loop = self._loop
        self._copied = None
        path = self._saves.attempt(self._writer.result, report=self._reporter(copied.step), needed=False, patient=False)
        if path is not None:
            seconds = self._writer.finished_at - copied.started
            self._note(path, seconds=seconds, copy_seconds=copied.copy_seconds)
        elif loop.progress.saved_step == copied.step:
            loop.progress.saved_step = None

    def steps(self) -> set[int]:
        """Of which steps the newest checkpoint may be, as far as this rank knows."""
        return self._joined.steps if self._joined else {self._loop.progress.saved_step or 0}

    def outlive(self) -> None:
        """The other ranks are gone, and this one goes on alone; what was being written is finished first. Raises `SaveFailed`."""
        joined, self._joined = self._joined, None
        if joined is not None:
            joined.outlive()
        else:
            self.wait()
        self._loop.ranks = Alone()

    def close(self) -> None:
        """The run ends, in whatever way: what is being written is finished, and a failure is told, but raised no more."""
        self._writer.close()
        if self._joined is not None:
            self._joined.close()
        if self._copied is not None:
            error, step = self._writer.error, self._copied.step
            self._copied = None
            if error is not None:
                self._loop.event(f"the checkpoint of step {step} could not be written ({error})", fault="save")

    def _save_aside(self, step: int, state: dict[str, Any]) -> bool:
        """Copies the state and lets it be written; False where memory does not suffice for the copy."""
        loop = self._loop
        self.wait()
        started = self._clock()
        try:
            with loop.throughput.pause("checkpoint"):
                write = loop.step.snapshot()
        except OutOfMemory as error:
            loop.event(
                f"there is no memory for a copy of the state ({error}); training waits for the checkpoint",
                fault="memory",
            )
            return False
        self._copied = _Copied(step=step, started=started, copy_seconds=self._clock() - started)
        self._writer.begin(lambda: self._write(step, write, state))
        loop.progress.saved_step = step
        return True

    def _save_here(self, step: int, state: dict[str, Any], *, needed: bool, patient: bool) -> None:
        loop, started = self._loop, self._clock()
        with loop.throughput.pause("checkpoint"):
            path = self._saves.attempt(
                lambda: self._write(step, loop.step.save, state),
                report=self._reporter(step),
                needed=needed,
                patient=patient,
            )
        if path is not None:
            loop.progress.saved_step = step
            self._note(path, seconds=self._clock() - started)

    def _write(self, step: int, write: Callable[[Path], None], state: dict[str, Any]) -> Path:
        loop = self._loop
        require_free(loop.checkpoints.directory, loop.checkpoint_bytes, purpose=f"the checkpoint of step {step}")
        return loop.checkpoints.save(step, write, state=state, hashes=loop.hashes)

    def _note(self, path: Path, **seconds: float) -> None:
        self._loop.progress.result.checkpoint = path
        self._loop.write("checkpoint", path=path.name, **seconds)
        if not self._loop.ranks.rank:
            self._loop.on_checkpoint()

    def _reporter(self, step: int) -> Callable[[str, int], None]:
        return lambda message, failures: self._loop.event(
            f"the checkpoint of step {step} {message}", fault="save", failures=failures
        )

    def _state(self, *, planned: bool, by_clock: bool) -> dict[str, Any]:
        """What a checkpoint keeps besides the step's files."""
        loop = self._loop
        sample = loop.policies.first_sample(loop.progress.result.step)
        return {
            **loop.progress.state(),
            "samples": sample,
            "position": loop.batches.position(sample),
            "early_stopping": loop.early_stopping.state_dict(),
            "planned": planned,
            "by_clock": by_clock,
            "recovery": loop.policies.state_dict(),
            "settings": loop.settings,
            "micro_batch": loop.cut.state(),
        }
