"""What a process does when another one of the run is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anarcho_train.ranks import RankLost

if TYPE_CHECKING:
    from anarcho_train.loop import Loop


class RankFaults:
    """The loop's answer to the loss of another rank."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def outlive(self, error: RankLost) -> str:
        """Another rank is gone: the state is saved by the one that may write, which does alone what is still due after the last step.

        Returns what became of it. Where others have gone on with the run meanwhile (this process was asleep), they have written
        checkpoints that it does not know.
        """
        loop = self._loop
        if error.no_memory:
            return loop.memory.leave_word(loop.micro_batches)
        if error.torn or not loop.progress.whole or not loop.inherits():
            return "this process saves nothing"
        if loop.ranks.rank and self._newest_written() not in loop.saving.steps():
            return "others have gone on with it already"
        loop.saving.outlive()
        if not loop.progress.concluded:
            loop.conclude_step()
        loop.saving.save(planned=False)
        step = loop.progress.result.step
        saved = f"the state after step {step} is saved" if step else "no step was made yet"
        loop.event(f"{error}; {saved}", fault="rank")
        return saved

    def _newest_written(self) -> int:
        return max((info.step for info in self._loop.checkpoints.list(check_hashes=False)), default=0)
