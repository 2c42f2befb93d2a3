"""When a run is saved, and what is saved of it besides the step's own files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anarcho_train.saving import Saves, require_free

if TYPE_CHECKING:
    from anarcho_train.loop import Loop


class Checkpointing:
    """The checkpoints that a loop makes."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._saves = Saves(limit=loop.recovery.max_failed_saves)

    def save(self, *, planned: bool = True, final: bool = False, needed: bool = False) -> None:
        """Writes a checkpoint, unless this very step has one or there is nothing to keep yet.

        The ``final`` one is tried several times. One that is not ``planned`` would not be there if nothing had interrupted the run.
        """
        loop = self._loop
        result = loop.progress.result
        if result.step in (0, loop.progress.saved_step):
            return
        if loop.ranks.rank:
            result.checkpoint, loop.progress.saved_step = loop.checkpoints.path(result.step), result.step
            return
        state = self._state(planned=planned)
        started = time.monotonic()

        def save() -> Path:
            require_free(
                loop.checkpoints.directory, loop.checkpoint_bytes, purpose=f"the checkpoint of step {result.step}"
            )
            return loop.checkpoints.save(result.step, loop.step.save, state=state, hashes=loop.hashes)

        with loop.throughput.pause("checkpoint"):
            path = self._saves.attempt(save, report=self._report_failure, needed=needed or final, patient=final)
        if path is None:
            return
        result.checkpoint, loop.progress.saved_step = path, result.step
        loop.write("checkpoint", path=str(path.name), seconds=time.monotonic() - started)
        loop.on_checkpoint()

    def _report_failure(self, message: str, failures: int) -> None:
        self._loop.event(
            f"the checkpoint of step {self._loop.progress.result.step} {message}", fault="save", failures=failures
        )

    def _state(self, *, planned: bool) -> dict[str, Any]:
        """What a checkpoint keeps besides the step's files."""
        loop = self._loop
        sample = loop.policies.first_sample(loop.progress.result.step)
        return {
            **loop.progress.state(),
            "samples": sample,
            "position": loop.batches.position(sample),
            "early_stopping": loop.early_stopping.state_dict(),
            "planned": planned,
            "recovery": loop.policies.state_dict(),
            "settings": loop.settings,
            "micro_batch": loop.cut.state(),
        }
