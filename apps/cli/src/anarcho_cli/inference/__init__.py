"""What writing and judging texts asks of a framework: modules of one interface, `torch` and `mlx`, chosen here alone.

Importing this package and its modules loads no framework; they load theirs where they are called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from anarcho_model.generate.batching import Engine
    from anarcho_model.generate.sampling import SamplingConfig


class Inference(Protocol):
    """One framework; models are its own, devices are `mps`, `cpu` and `cuda`."""

    def load_model(self, directory: Path, *, device: str) -> Any:
        """The model of a Hugging Face directory, in float32."""
        ...

    def generate(
        self, model: Any, prompt: Sequence[int], *, config: SamplingConfig, kv_bits: int | None = None
    ) -> Iterator[int]:
        """The ids that follow the prompt, one by one."""
        ...

    def make_engine(self, model: Any, *, slots: int, context: int | None = None, kv_bits: int | None = None) -> Engine:
        """An engine that writes so many texts at once."""
        ...

    def judge(
        self,
        model: Any,
        tokens: npt.NDArray[np.int64],
        *,
        sources: npt.NDArray[np.int64],
        targets: npt.NDArray[np.int64],
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """Log-probability of each target, and whether it is the likeliest.

        `tokens` (rows, length) are read, and `sources` are places in them, row by row, after which `targets` follow.
        """
        ...


def inference_of(backend: str) -> Inference:
    """The module of a back-end, `torch` or `mlx`."""
    if backend == "mlx":
        from anarcho_cli.inference import mlx

        return mlx
    from anarcho_cli.inference import torch

    return torch
