"""When a run's validation data is measured, and what follows from it: the best step, and early stopping."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anarcho_train.interfaces import ValidationBatches
from anarcho_train.out_of_memory import OutOfMemory
from anarcho_train.step import Batch, LossSum
from anarcho_train.validation import bits_per_byte, total_loss

if TYPE_CHECKING:
    from anarcho_train.loop import Loop


class Evaluations:
    """The evaluations of a loop."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def run(self, validation: ValidationBatches, *, last: bool) -> bool:
        """Measures the validation loss and decides on early stopping; returns whether the loss is the best so far.

        Evaluations are compared with each other on the same text, so the last one reads the limited part first and then the whole.
        """
        loop = self._loop
        result, limit = loop.progress.result, loop.config.eval_tokens
        limited = limit is not None and limit < validation.num_tokens
        if loop.progress.compared_loss is None:
            loop.progress.compared_loss = self.measure(validation, max_tokens=limit if limited else None)
            loop.progress.finished = loop.early_stopping.update(loop.progress.compared_loss, result.step)
            result.best_step = loop.early_stopping.best_step
        if limited and (last or loop.progress.finished):
            self.measure(validation, max_tokens=None)
        return loop.early_stopping.best_step == result.step

    def measure(self, validation: ValidationBatches, *, max_tokens: int | None) -> float:
        """Measures the loss of all of it, or of about ``max_tokens`` spread over it, and records it as that of this step."""
        loop = self._loop
        windowed = loop.samples_per_step is None
        with loop.throughput.pause("validation", every=loop.config.eval_every or None):
            total = total_loss(
                loop.step,
                validation,
                batch_size=int(loop.ranks.gathered([loop.cut.size]).min()),
                window_tokens=loop.sequence_length if windowed else validation.num_tokens / validation.num_windows,
                max_tokens=max_tokens,
                measure=self._evaluate_batch,
                ranks=loop.ranks,
            )
        loss, measures = total.loss / total.weight, total.means()
        bits = None if measures else bits_per_byte(total, validation)
        loop.progress.result.validation_loss, loop.progress.result.bits_per_byte = loss, bits
        loop.progress.result.validation_measures = measures
        loop.write("validation", loss=loss, **(measures or {"bits_per_byte": bits}))
        return loss

    def _evaluate_batch(self, batch: Batch) -> LossSum:
        loop = self._loop
        while True:
            parts = loop.cut.parts(batch)
            try:
                return sum(map(loop.step.evaluate, parts), LossSum())
            except OutOfMemory as error:
                where = f"in the evaluation after step {loop.progress.result.step}"
                loop.memory.shrink(error, parts, where=where, alone=True)
