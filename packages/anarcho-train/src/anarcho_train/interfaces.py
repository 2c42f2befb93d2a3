"""What the loop and the steps ask of the parts that they are given: data, draws, sinks, early stopping and a clock, as protocols."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol

import numpy as np

from anarcho_train.step import Batch


class TrainingBatches(Protocol):
    """An endless, reproducible order of samples, addressed by number."""

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples ``first_sample`` to ``first_sample + count - 1`` of the global order."""
        ...

    def position(self, sample: int) -> dict[str, int]:
        """Where the sample stands, as integers that a person can read (epoch, cursor)."""
        ...

    def state(self, first_sample: int, count: int) -> Literal["ready", "waiting", "ended"]:
        """Whether these samples are there, will be, or never will be because the data has come to its end."""
        ...


class ValidationBatches(Protocol):
    """Held-out text, every token once."""

    num_windows: int
    num_tokens: int
    num_bytes: int

    def batches(self, batch_size: int, *, max_windows: int | None = None) -> Iterator[Batch]:
        """Batches of one fixed shape, padded with weight 0; at most ``max_windows`` rows, spread evenly over the text."""
        ...


class Draws(Protocol):
    """Random arrays for the model's ``token_logprobs``, by the names of its arguments; `anarcho_train.draws` has some."""

    def __call__(self, batch: Batch, *, step: int, first_row: int) -> dict[str, np.ndarray]:
        """Those of a batch, whose rows are those of the step from ``first_row`` on."""
        ...

    def neutral(self, batch: Batch) -> dict[str, np.ndarray]:
        """Arrays of the same shapes with which the model computes as without any."""
        ...


class MetricSink(Protocol):
    """Where measurements go."""

    def write(self, kind: str, *, step: int, tokens: int, **values: Any) -> None:
        """Records the values of one moment."""
        ...


class EarlyStopping(Protocol):
    """Decides on the validation loss when to stop."""

    best_value: float | None
    best_step: int | None

    def update(self, value: float, step: int) -> bool:
        """Takes one validation loss; True means stop."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Its numbers, as JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores them."""
        ...


class Throughput(Protocol):
    """Measures how fast the run is; the loop marks what it is doing."""

    def begin(self, first_step: int) -> None:
        """The run begins, or goes on, after ``first_step`` steps."""
        ...

    def finish_step(self, tokens: int) -> None:
        """Ends an optimizer step of ``tokens`` tokens."""
        ...

    def waiting(self) -> AbstractContextManager[None]:
        """A stretch of a step that waits for data."""
        ...

    def pause(self, name: str, *, every: int | None = None) -> AbstractContextManager[None]:
        """A stretch outside any step, such as an evaluation."""
        ...

    def metrics(self) -> dict[str, float]:
        """Speed and remaining time, for each "train" record."""
        ...


class Unmeasured:
    """The `Throughput` of a run that nobody times."""

    def begin(self, first_step: int) -> None:
        pass

    def finish_step(self, tokens: int) -> None:
        pass

    def waiting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def pause(self, name: str, *, every: int | None = None) -> AbstractContextManager[None]:
        return nullcontext()

    def metrics(self) -> dict[str, float]:
        return {}
