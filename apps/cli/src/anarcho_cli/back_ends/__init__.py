"""What the composition of a run asks of a framework: modules of one interface, `torch` and `mlx`, chosen here alone.

Importing this package loads no framework; its modules load theirs where they are called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from anarcho_model.generate.sampling import SamplingConfig
from anarcho_tokenize import AnyTokenizer
from anarcho_train import Ranks
from anarcho_train.step import Batch, Step

from anarcho_cli.config import RunConfig


class TrainingStep(Step, Protocol):
    """A step with what a run says of it."""

    model: Any
    """What is trained."""
    precision: Any
    """The framework's type of matrix products."""
    compiled: bool
    """Whether the model is compiled."""

    def answer_logprobs(self, batch: Batch) -> np.ndarray:
        """The log-probability of each row's counted targets, float32 (rows,), in nats."""
        ...


class BackEnd(Protocol):
    """One framework; devices are `mps`, `cpu` and `cuda`."""

    NAME: str
    """What ``--backend`` calls it."""

    def require_supported(self, config: RunConfig, device: str) -> None:
        """Refuses what the framework or the device does not have, before anything is written; raises ValueError."""
        ...

    def limit_memory(self, device: str) -> None:
        """Bounds what this process may take, where the framework leaves that to the program."""
        ...

    def make_step(
        self, config: RunConfig, tokenizer: AnyTokenizer, base: Path, *, device: str, ranks: Ranks | None = None
    ) -> TrainingStep:
        """The model on its device, its optimizer, and the training step over both.

        The model has the weights of the directory ``base`` where that is there, else random ones. ``ranks`` are the processes that
        train together, which a back-end that trains in one alone is not given.
        """
        ...

    def generate(self, step: TrainingStep, prompt: Sequence[int], *, config: SamplingConfig) -> Iterator[int]:
        """The tokens that follow the prompt; the model is not trained any more after that."""
        ...

    def gauges(self, step: TrainingStep, device: str) -> Mapping[str, float]:
        """What is measured besides losses and speed: memory first of all."""
        ...

    def device_name(self, device: str) -> str:
        """The full name of a device, of which `peak_flops` may know the peak."""
        ...


def back_end(name: str) -> BackEnd:
    """The module of a back-end, `torch` or `mlx`."""
    if name == "mlx":
        from anarcho_cli.back_ends import mlx

        return mlx
    from anarcho_cli.back_ends import torch

    return torch


def precision_name(step: TrainingStep) -> str:
    """The type of matrix products in the words of `train.precision`, whichever the framework."""
    return str(step.precision).rpartition(".")[2]
