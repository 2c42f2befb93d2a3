"""Checkpoints of several ranks, of which each writes its part, or the first one all: they agree on which one there is.

Notable: a part is copied to the host's memory and written by a thread while the training goes on, never more than one. What has become of
it is told in the exchange before each step, so no further one is needed; when all parts are on the disk, the first rank makes a
checkpoint of them, again in its thread, and the next exchanges tell all whether it is there. So every rank does the same from the same
numbers: it counts failures, tries again and ends the run alike.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anarcho_train.background_writing import BackgroundWriter
from anarcho_train.out_of_memory import OutOfMemory
from anarcho_train.ranks import BUSY, DONE, FAILED, Alone, RankFailed, agreed_state, mark_known, texts
from anarcho_train.saving import SaveFailed, Saves, reason, require_free

if TYPE_CHECKING:
    from anarcho_train.loop import Loop

_POLL_SECONDS = 0.02


@dataclass(kw_only=True)
class _Pending:
    """A checkpoint that is being written."""

    step: int
    state: dict[str, Any]
    started: float
    copy_seconds: float
    before: int | None
    """The step of the checkpoint before."""
    joining: bool = False
    """Whether all parts are written, and the first rank puts them together."""


class JoinedSaving:
    """Writes the checkpoints of a loop; every method but `close` and `outlive` is called by all ranks alike.

    ``note`` is told what was written, ``reporter`` makes what is told of a failure.
    """

    def __init__(
        self,
        loop: Loop,
        saves: Saves,
        *,
        note: Callable[..., None],
        reporter: Callable[[int], Callable[[str, int], None]],
    ) -> None:
        self._loop, self._saves, self._note, self._reporter = loop, saves, note, reporter
        self._writer = BackgroundWriter()
        self._pending: _Pending | None = None

    @property
    def state(self) -> float:
        """How far this rank is with what it has to write, for `advance`."""
        if self._pending is None:
            return DONE
        if self._writer.busy:
            return BUSY
        return FAILED if self._writer.error else DONE

    @property
    def steps(self) -> set[int]:
        """Of which steps the newest checkpoint may be: of one that is being written, nobody knows yet whether it is there."""
        found = {self._loop.progress.saved_step} | ({self._pending.before} if self._pending else set())
        return {step or 0 for step in found}

    def save(self, step: int, state: dict[str, Any], *, here: bool, patient: bool) -> None:
        """Writes the checkpoint, ``here`` and now or beside the training where all ranks have room for a copy. Raises `SaveFailed`."""
        self.wait()
        aside = not here and bool(self._loop.ranks.gathered([self._loop.background()]).all())
        if not (aside and self._begin(step, state)):
            self._save_here(step, state, needed=here, patient=patient)

    def advance(self, agreed: float) -> None:
        """Goes on with what is being written, as far as all ranks are with it. Raises `SaveFailed`."""
        pending = self._pending
        if pending is None or agreed == BUSY:
            return
        if agreed == FAILED:
            self._end(pending, self._told_failure(self._writer.error))
        elif not pending.joining:
            parts = self._told_parts(self._writer.result() if self._writes else {})
            if self._loop.ranks.rank == 0:
                self._writer.begin(lambda: self._join(pending.step, parts, pending.state))
            pending.joining = True
        else:
            self._end(pending, None)

    def wait(self) -> None:
        """Returns when nothing is being written any more. Raises `SaveFailed`."""
        if self._pending is None:
            return
        with self._loop.throughput.pause("checkpoint"):
            while self._pending is not None:
                agreed = agreed_state(self._loop.ranks.gathered([self.state])[:, 0])
                self.advance(agreed)
                if agreed == BUSY:
                    time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """The run ends, in whatever way: what this rank is writing is finished; a checkpoint that lacks others' parts is given up."""
        self._writer.close()
        pending, self._pending = self._pending, None
        if pending is None:
            return
        rank, error = self._loop.ranks.rank, self._writer.error
        if not pending.joining or error is not None:
            self._loop.checkpoints.discard_part(pending.step, rank)
            why = error or "the run ended before all processes had written their parts"
            self._loop.event(f"the checkpoint of step {pending.step} could not be written ({why})", fault="save")

    def outlive(self) -> None:
        """The others are gone, this rank goes on alone: the first one finishes what it writes, another forgets what that was writing."""
        loop, pending = self._loop, self._pending
        if pending is not None and loop.ranks.rank:
            self._pending = None
            there = loop.checkpoints.path(pending.step).is_dir()
            loop.progress.saved_step = pending.step if there else pending.before
        loop.ranks = Alone()
        self.wait()
        self._writer.close()

    @property
    def _writes(self) -> bool:
        """Whether this rank has a part."""
        return self._loop.step.in_parts or self._loop.ranks.rank == 0

    def _begin(self, step: int, state: dict[str, Any]) -> bool:
        """Copies this rank's part and lets it be written; False where memory does not suffice for some rank's copy."""
        loop, started, told = self._loop, time.monotonic(), ""
        write: Callable[[Path], None] | None = None
        with loop.throughput.pause("checkpoint"):
            try:
                write = loop.step.snapshot() if self._writes else None
            except OutOfMemory as error:
                told = str(error)
            lacking = loop.ranks.gathered([self._writes and write is None])[:, 0]
        if lacking.any():
            loop.event(
                f"there is no memory for a copy of the state ({told or 'another process of the run'}); training waits for the checkpoint",
                fault="memory",
            )
            return False
        seconds = time.monotonic() - started
        before = loop.progress.saved_step
        self._pending = _Pending(step=step, state=state, started=started, copy_seconds=seconds, before=before)
        if write is not None:
            self._writer.begin(lambda: self._write_part(step, write))
        loop.progress.saved_step = step
        return True

    def _end(self, pending: _Pending, error: OSError | None) -> None:
        """Notes how a checkpoint that was written beside the training has come out."""
        self._pending = None
        path = self._attempt(pending.step, lambda: self._outcome(pending.step, error), needed=False, patient=False)
        if path is not None:
            self._note(path, seconds=time.monotonic() - pending.started, copy_seconds=pending.copy_seconds)
        elif self._loop.progress.saved_step == pending.step:
            self._loop.progress.saved_step = pending.before

    def _save_here(self, step: int, state: dict[str, Any], *, needed: bool, patient: bool) -> None:
        loop, started = self._loop, time.monotonic()
        with loop.throughput.pause("checkpoint"):
            path = self._attempt(step, lambda: self._written_here(step, state), needed=needed, patient=patient)
        if path is not None:
            loop.progress.saved_step = step
            self._note(path, seconds=time.monotonic() - started)

    def _written_here(self, step: int, state: dict[str, Any]) -> Path:
        """One attempt while the training stands still; raises OSError in all ranks where it fails in one."""
        loop, failure = self._loop, None
        own: dict[str, Any] | None = None
        try:
            own = self._write_part(step, loop.step.save) if self._writes else {}
        except OSError as error:
            failure = error
        parts = self._told_parts(own)
        try:
            if None not in parts and loop.ranks.rank == 0:
                self._join(step, parts, state)
        except OSError as error:
            failure = error
        failed = loop.ranks.gathered([failure is not None]).any()
        return self._outcome(step, self._told_failure(failure) if failed else None)

    def _outcome(self, step: int, failure: OSError | None) -> Path:
        if failure is not None:
            self._loop.checkpoints.discard_part(step, self._loop.ranks.rank)
            raise failure
        return self._loop.checkpoints.path(step)

    def _attempt(self, step: int, save: Callable[[], Path], *, needed: bool, patient: bool) -> Path | None:
        try:
            return self._saves.attempt(save, report=self._reporter(step), needed=needed, patient=patient)
        except SaveFailed as error:
            failure = error if self._loop.ranks.rank == 0 else RankFailed(str(error))
            mark_known(failure)
            raise failure from error

    def _write_part(self, step: int, write: Callable[[Path], None]) -> dict[str, Any]:
        loop = self._loop
        if loop.ranks.rank == 0:
            purpose = f"the checkpoint of step {step}"
            require_free(loop.checkpoints.directory, loop.checkpoint_bytes, purpose=purpose)
        return loop.checkpoints.write_part(step, loop.ranks.rank, write)

    def _join(self, step: int, parts: list[dict[str, Any]], state: dict[str, Any]) -> Path:
        return self._loop.checkpoints.join_parts(step, parts, state=state, hashes=self._loop.hashes)

    def _told_parts(self, own: dict[str, Any] | None) -> list[dict[str, Any]]:
        """What each rank has written, by its number; None of one that has failed."""
        return [json.loads(text) for text in texts(self._loop.ranks, json.dumps(own))]

    def _told_failure(self, own: BaseException | None) -> OSError:
        """What the first rank that has failed says; ``own`` is raised where no disk fails with it."""
        if own is not None and not isinstance(own, OSError):
            raise own
        told = texts(self._loop.ranks, "" if own is None else reason(own))
        return next(OSError(f"in process {rank}: {text}") for rank, text in enumerate(told) if text)
