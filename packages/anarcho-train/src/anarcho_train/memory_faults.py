"""What a run does when memory runs out: the same samples again in smaller parts, from a state that is whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from anarcho_train.durable import replace_json
from anarcho_train.out_of_memory import OutOfMemory, advice
from anarcho_train.step import Batch

if TYPE_CHECKING:
    from anarcho_train.loop import Loop

SMALLER_FILE = "micro_batch.json"
"""Beside the checkpoints: the size of micro-batches, as a checkpoint has it, of a run that could not write one any more."""


class MemoryFaults:
    """The loop's answers to memory that runs out."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def shrink(self, error: OutOfMemory, micro_batches: Sequence[Batch], *, where: str, alone: bool = False) -> None:
        """Makes the micro-batches smaller after memory ran out; raises `OutOfMemory` where they cannot be, or the update was torn."""
        loop = self._loop
        told = [float(loop.cut.shrink(micro_batches)), float(error.torn)]
        smaller, torn = (told if alone else loop.ranks.gathered(told).max(axis=0))[:2]
        if not smaller:
            if not torn and not (alone and loop.saving.together):
                loop.saving.save(planned=False, needed=True)
            raise OutOfMemory(
                f"memory ran out {where} even with the smallest micro-batch ({error}); {advice(loop.config)}"
            )
        what = f"out of memory {where} ({error}); from now on, {loop.cut} go through the model at once"
        loop.event(what, fault="memory", micro_batch_tokens=loop.cut.tokens)
        if torn:
            # A process that evaluates alone cannot go back alone: it ends, and the others with it.
            raise OutOfMemory(str(error), torn=not alone or loop.ranks.size == 1)

    def go_back(self, error: OutOfMemory) -> None:
        """Restores the newest state that is whole, after an update that had begun; the same samples come again."""
        loop = self._loop
        failed = loop.progress.result.step
        step = self._newest_step()
        if step:
            loop.resume(loop.checkpoints.path(step))
        else:
            loop.begin_again()
        loop.throughput.begin(step)
        loop.event(
            f"went back from step {failed} to step {step}, as the update had begun when memory ran out ({error})",
            fault="memory",
            rolled_back_to=step,
        )

    def leave_word(self, micro_batches: Sequence[Batch]) -> str:
        """Before this process leaves the others for want of memory: started again, all of them take smaller micro-batches.

        Returns what there is to say of that.
        """
        loop = self._loop
        if not loop.cut.shrink(micro_batches):
            return f"the micro-batch cannot be smaller: {advice(loop.config)}"
        directory = loop.checkpoints.directory
        directory.mkdir(parents=True, exist_ok=True)
        replace_json(directory / SMALLER_FILE, loop.cut.state())
        return f"started again from the last checkpoint, {loop.cut} go through the model at once"

    def take_word(self) -> None:
        """At the beginning: takes the size that a process has left word of which found no memory."""
        loop, path = self._loop, self._loop.checkpoints.directory / SMALLER_FILE
        if not path.is_file():
            return
        before = loop.cut.tokens
        try:
            loop.cut.load_state(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}); remove it to begin with the configured micro-batch"
            ) from error
        if loop.cut.tokens != before:
            what = f"memory ran out in a process of this run before: {loop.cut} go through the model at once"
            loop.event(what, fault="memory", micro_batch_tokens=loop.cut.tokens)

    def _newest_step(self) -> int:
        """The step of the newest checkpoint, as the first rank finds it; 0 where there is none."""
        loop = self._loop
        loop.saving.wait()
        path = loop.checkpoints.latest_valid(notify=loop.event) if loop.ranks.rank == 0 else None
        step = 0 if path is None else int(loop.checkpoints.read_state(path)["step"])
        return int(loop.ranks.gathered([step])[0, 0])
