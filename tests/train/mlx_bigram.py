"""`conftest.Bigram` in MLX, with a matrix more for what is frozen, and a step around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from anarcho_train import TrainConfig
from anarcho_train.steps.mlx import MlxStep, StageLoss
from mlx.utils import tree_flatten

VOCABULARY, LENGTH = 13, 4


class Bigram(nn.Module):
    """The next token from the current one alone, through a hidden layer."""

    compute_dtype = mx.float32

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCABULARY, bias=False)

    def token_logprobs(
        self,
        tokens: mx.array,
        targets: mx.array,
        *,
        positions: mx.array | None = None,
        segments: mx.array | None = None,
    ) -> mx.array:
        logits = self.head(mx.tanh(self.hidden(self.embedding(tokens)))).astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return mx.take_along_axis(logprobs, targets[..., None], axis=-1).squeeze(-1)


class Noisy(Bigram):
    """Also takes noise on its embeddings."""

    def token_logprobs(self, tokens: mx.array, targets: mx.array, *, embedding_noise=None, **_: Any) -> mx.array:
        x = self.embedding(tokens)
        x = x if embedding_noise is None else x + embedding_noise
        logits = self.head(mx.tanh(self.hidden(x)))
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return mx.take_along_axis(logprobs, targets[..., None], axis=-1).squeeze(-1)


def flat(tree: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


def same(one: Any, other: Any) -> bool:
    """Whether two trees hold the same names and the same bits."""
    a, b = flat(one), flat(other)
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]).item() for name in a)


def make_step(
    model: nn.Module | None = None,
    *,
    optimizer: str = "adamw",
    loss: StageLoss | None = None,
    draws: Any = None,
    ranks: Any = None,
    notify: Any = lambda message: None,
    **settings: Any,
) -> MlxStep:
    if model is None:
        mx.random.seed(0)
        model = Bigram()
        mx.eval(model.parameters())
    kinds = {
        "adamw": lambda: optimizers.AdamW(0.05, bias_correction=True),
        "sgd": lambda: optimizers.SGD(0.05, momentum=0.9),
        "plain": lambda: optimizers.SGD(0.05),
    }
    return MlxStep(
        model,
        kinds[optimizer](),
        config=TrainConfig(**{"precision": "float32", "compile": "off", "batch_tokens": 8 * LENGTH} | settings),
        save_model=lambda m, directory: m.save_weights(str(Path(directory, "model.safetensors"))),
        load_model=lambda m, directory: m.load_weights(str(Path(directory, "model.safetensors"))) and None,
        loss=loss,
        draws=draws,
        ranks=ranks,
        notify=notify,
    )
