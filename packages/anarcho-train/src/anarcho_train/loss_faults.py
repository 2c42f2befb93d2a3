"""What a run does about a loss or a gradient that is at fault, as `anarcho_train.recovery` decides it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anarcho_train.recovery import Fault, TrainingDiverged
from anarcho_train.step import StepMetrics

if TYPE_CHECKING:
    from anarcho_train.loop import Loop


class LossFaults:
    """The loop's answers to losses that are at fault."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def recover(self, metrics: StepMetrics) -> bool:
        """Does about a fault what the policy says; returns whether the run was rolled back. Raises `TrainingDiverged` to stop it."""
        loop = self._loop
        step = loop.progress.result.step - 1
        fault = loop.policies.judge(metrics, step=step, can_roll_back=lambda: self._earlier_step() is not None)
        if fault is None:
            return False
        if fault.action == "rollback":
            self._roll_back(fault)
            return True
        loop.event(fault.message, **fault.fields)
        if fault.action == "stop":
            if not fault.escalated:
                loop.saving.save(planned=False, needed=True)
            raise TrainingDiverged(fault.ending)
        return False

    def _roll_back(self, fault: Fault) -> None:
        """Goes on from the newest checkpoint with the samples after those at fault."""
        loop = self._loop
        step = self._earlier_step()
        assert step is not None, "a run is rolled back only where there is a checkpoint"
        if loop.ranks.rank == 0:
            loop.checkpoints.discard_after(step)
            loop.policies.roll_back(to=step, failed=fault.step)
        loop.ranks.gathered([step])  # All read what the first has noted.
        loop.resume(loop.checkpoints.path(step))
        loop.throughput.begin(step)
        sample = loop.policies.first_sample(step)
        loop.event(
            f"rolled back from step {fault.step} to step {step} ({fault.what}); the run goes on with sample {sample}",
            **fault.fields,
            rolled_back_to=step,
            next_sample=sample,
            rollbacks=loop.policies.rollbacks,
        )

    def _earlier_step(self) -> int | None:
        """The step of the checkpoint to roll back to, as the first rank finds it."""
        loop = self._loop
        loop.saving.wait()
        path = loop.checkpoints.before_fault() if loop.ranks.rank == 0 else None
        step = -1 if path is None else int(loop.checkpoints.read_state(path)["step"])
        found = int(loop.ranks.gathered([step])[0, 0])
        return None if found < 0 else found
