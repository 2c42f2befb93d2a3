"""One rank of a training of several processes, as a script: ``mlx_rank.py DIRECTORY [alone|lost]``.

It takes its share of the rows in ``DIRECTORY/rows.npz``, trains a few steps and leaves its weights and metrics there. With ``lost``, rank 1
kills itself after the first step; with ``alone``, one process trains on all rows.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from anarcho_train import StepMetrics, StepSchedule, TrainingDraws
from anarcho_train.steps.mlx_ranks import MlxRanks
from mlx_bigram import Noisy, make_step

MICRO = 2


def share(rows: dict[str, np.ndarray], rank: int, size: int) -> list[Any]:
    """The micro-batches of a rank: a contiguous part of the rows."""
    count = len(rows["tokens"]) // size
    starts = range(rank * count, (rank + 1) * count, MICRO)
    parts = [{name: array[start : start + MICRO] for name, array in rows.items()} for start in starts]
    return [SimpleNamespace(**part, positions=None, segments=None) for part in parts]


def train(rows: dict[str, np.ndarray], *, ranks: MlxRanks, after_first=lambda: None) -> tuple[Any, list[StepMetrics]]:
    """Four steps, the third of them with a weight of the last row that is no number."""
    mx.random.seed(0)
    step = make_step(Noisy(), draws=TrainingDraws(seed=2, dim=8, neftune_alpha=3.0), ranks=ranks)
    metrics = []
    for number in range(4):
        given = {name: array.copy() for name, array in rows.items()}
        if number == 2:
            given["weights"][-1, 0] = np.nan
        schedule = StepSchedule(lr_scale=1 / (number + 1), number=number)
        metrics.append(step.train(share(given, ranks.rank, ranks.size), schedule=schedule))
        if number == 0:
            after_first()
    return step.model, metrics


def main() -> None:
    directory = Path(sys.argv[1])
    mode = "".join(sys.argv[2:])
    ranks = MlxRanks(None if mode == "alone" else mx.distributed.init(strict=True, backend="ring"))
    lost = mode == "lost" and ranks.rank == 1
    with np.load(directory / "rows.npz") as file:
        rows = dict(file)
    model, metrics = train(
        rows, ranks=ranks, after_first=lambda: os.kill(os.getpid(), signal.SIGKILL) if lost else None
    )
    model.save_weights(str(directory / f"rank-{ranks.rank}.safetensors"))
    (directory / f"rank-{ranks.rank}.json").write_text(json.dumps([asdict(m) for m in metrics]))


if __name__ == "__main__":
    main()
