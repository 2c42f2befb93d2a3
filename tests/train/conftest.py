"""A model, data and sinks so small that a whole run takes a fraction of a second."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from anarcho_train import CheckpointStore, Loop, StepSchedule, TrainConfig
from anarcho_train.steps.torch import TorchStep
from anarcho_train.steps.torch_passes import StageLoss
from safetensors.torch import load_model, save_model
from torch import nn

VOCABULARY, LENGTH = 13, 4


class Bigram(nn.Module):
    """The next token from the current one alone, through a hidden layer; the least that has matrices, an embedding and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCABULARY, bias=False)

    def token_logprobs(self, tokens: torch.Tensor, targets: torch.Tensor, **_: Any) -> torch.Tensor:
        logits = self.head(self.hidden(self.embedding(tokens)).tanh()).float()
        return logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


@dataclass
class Rows:
    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    positions: np.ndarray | None = None
    segments: np.ndarray | None = None


class CountingText:
    """A text in which each token is the one before plus one; sample i is a window of it, with padding in every third."""

    num_windows, num_tokens, num_bytes = 6, 6 * LENGTH, 12 * LENGTH

    def __init__(self) -> None:
        self.consumed: list[int] = []

    def rows(self, samples: range) -> Rows:
        start = np.array([(7 * i) % VOCABULARY for i in samples])[:, None]
        tokens = (start + np.arange(LENGTH)) % VOCABULARY
        weights = np.ones(tokens.shape, np.float32)
        weights[np.array(samples) % 3 == 0, -1] = 0
        return Rows(tokens.astype(np.int32), ((tokens + 1) % VOCABULARY).astype(np.int32), weights)

    def batch(self, first_sample: int, count: int) -> Rows:
        self.consumed += range(first_sample, first_sample + count)
        return self.rows(range(first_sample, first_sample + count))

    def position(self, sample: int) -> dict[str, int]:
        return {"epoch": sample // 100, "cursor": sample % 100}

    def state(self, first_sample: int, count: int) -> Literal["ready", "waiting", "ended"]:
        return "ready"

    def batches(self, batch_size: int, *, max_windows: int | None = None) -> Iterator[Rows]:
        for first in range(0, max_windows or self.num_windows, batch_size):
            rows = self.rows(range(first, first + batch_size))
            rows.weights[:] = 1
            yield rows


class Record:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def write(self, kind: str, *, step: int, tokens: int, **values: Any) -> None:
        self.lines.append({"kind": kind, "step": step, "tokens": tokens, **values})

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == kind]


class Patience:
    """Early stopping after ``patience`` evaluations without a better value."""

    def __init__(self, patience: int) -> None:
        self.patience, self.best_value, self.best_step, self.bad = patience, None, None, 0

    def update(self, value: float, step: int) -> bool:
        if self.best_value is None or value < self.best_value:
            self.best_value, self.best_step, self.bad = value, step, 0
        else:
            self.bad += 1
        return bool(self.patience) and self.bad >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value, "best_step": self.best_step, "bad": self.bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_value, self.best_step, self.bad = state["best_value"], state["best_step"], state["bad"]


def make_step(
    model: nn.Module | None = None, *, optimizer: str = "adamw", loss: StageLoss | None = None, **settings: Any
) -> TorchStep:
    if model is None:
        torch.manual_seed(0)
        model = Bigram()
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    return TorchStep(
        model,
        kinds[optimizer](model.parameters(), lr=0.05),
        config=TrainConfig(**{"precision": "float32", "compile": "off", "batch_tokens": 8 * LENGTH} | settings),
        save_model=lambda m, directory: save_model(m, str(directory / "model.safetensors")),
        load_model=lambda m, directory: load_model(m, directory / "model.safetensors") and None,
        loss=loss,
    )


def run_until(loop: Loop, step: int) -> None:
    """Runs it, and lets it die at the beginning of this step, the first being 0."""
    schedule = loop.schedule

    def killed(number: int) -> StepSchedule:
        if number == step:
            raise RuntimeError("killed")
        return schedule(number)

    loop.schedule = killed
    with pytest.raises(RuntimeError, match="killed"):
        loop.run()


@pytest.fixture
def make_loop(tmp_path: Path):
    """Builds a loop of 12 steps over `CountingText`, all of whose parts can be replaced."""

    def build(
        directory: Path = tmp_path / "run", *, step: Any = None, patience: int = 0, **settings: Any
    ) -> SimpleNamespace:
        defaults = {
            "steps": 12,
            "batch_tokens": 8 * LENGTH,
            "micro_batch": 4,
            "eval_every": 4,
            "checkpoint_every": 3,
            "log_every": 1,
        }
        config = TrainConfig(**{**defaults, "precision": "float32", "compile": "off", **settings})
        text, sink, stopping = CountingText(), Record(), Patience(patience)
        store = CheckpointStore(directory, keep_last=config.keep_last)
        loop = Loop(
            step=step or make_step(),
            batches=text,
            validation=CountingText(),
            schedule=lambda s: StepSchedule(lr_scale=max(0.2, 1 - s / 24)),
            config=config,
            sequence_length=LENGTH,
            checkpoints=store,
            sink=sink,
            early_stopping=stopping,
            hashes={"data": "d"},
        )
        return SimpleNamespace(loop=loop, text=text, sink=sink, store=store, stopping=stopping)

    return build
