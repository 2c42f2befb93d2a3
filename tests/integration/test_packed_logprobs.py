"""The log-probabilities of a document are the same in a packed row as alone, where documents are isolated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anarcho_model import InitConfig, ModelConfig
from anarcho_model.torch import GPT
from anarcho_tokenize import PackedBatches

LENGTH = 48
EOT, PAD, VOCAB = 0, 1, 97


class Shards:
    """One shard in memory; the odd ids of a conversation count as targets."""

    directory = Path("data/train")
    eot_id, pad_id = EOT, PAD
    complete = True
    damaged = ()
    damaged_tokens = 0

    def __init__(self, documents: list[list[int]], *, kind: str) -> None:
        self.kind = kind
        self._documents = np.cumsum([0, *map(len, documents)], dtype=np.int64)
        self._ids = np.array([token for document in documents for token in document], dtype=np.uint16)
        self.num_tokens = len(self._ids)
        self.shard_starts = [0, self.num_tokens]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        return self._ids[start:stop]

    def loss_mask(self, start: int, stop: int) -> np.ndarray:
        return (self._ids[start:stop] % 2).astype(np.uint8)

    def shard_documents(self, number: int) -> np.ndarray:
        return self._documents


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.set_num_threads(1)
    config = ModelConfig(
        vocab_size=VOCAB, context_length=LENGTH, num_layers=2, dim=32, num_heads=4, num_kv_heads=2, hidden_dim=48
    )
    model = GPT(config)
    model.init_weights(seed=1, init=InitConfig(embedding_std=0.3, head_std=0.3, zero_residual_outputs=False))
    return model


def logprobs(model: GPT, tokens: Any, targets: Any, **isolation: Any) -> np.ndarray:
    with torch.no_grad():
        tensors = {name: torch.from_numpy(values).long() for name, values in isolation.items()}
        found = model.token_logprobs(
            torch.from_numpy(np.asarray(tokens)).long(), torch.from_numpy(np.asarray(targets)).long(), **tensors
        )
    return found.numpy()


@pytest.mark.parametrize("packing", ["concat", "best-fit"])
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_packed_documents_have_the_log_probabilities_of_unpacked_ones(model: GPT, packing: Any, kind: str) -> None:
    random = np.random.default_rng(0)
    bodies = [random.integers(2, VOCAB, size).tolist() for size in random.integers(3, 30, 60)]
    documents = [[*body, EOT] for body in bodies] if kind == "text" else bodies
    shards: Any = Shards(documents, kind=kind)
    batches = PackedBatches(shards, length=LENGTH, seed=0, packing=packing, isolate_documents=True)
    assert batches.num_samples is not None
    batch = batches.batch(0, batches.num_samples)
    packed = logprobs(model, batch.tokens, batch.targets, positions=batch.positions, segments=batch.segments)

    streams = {tuple([EOT, *document] if kind == "text" else document) for document in documents}
    whole, sharing = 0, 0
    assert batch.segments is not None
    for row, segments in enumerate(batch.segments):
        for segment in range(segments[-1] + 1):
            columns = np.flatnonzero(segments == segment)
            if kind == "chat" and packing == "concat":  # the last input is followed by the next conversation
                columns = columns[:-1]
            if not len(columns):
                continue
            tokens, targets = batch.tokens[row, columns], batch.targets[row, columns]
            if (*tokens.tolist(), int(targets[-1])) not in streams:
                continue  # cut by a window's bounds, or padding
            alone = logprobs(model, tokens[None], targets[None])[0]
            assert np.abs(packed[row, columns] - alone).max() <= 1e-5
            counts = np.ones(len(targets)) if kind == "text" else targets % 2
            assert np.array_equal(batch.weights[row, columns], counts)
            whole, sharing = whole + 1, sharing + (columns[0] > 0)
    assert sharing > 15
    assert whole == len(documents) if packing == "best-fit" else whole > len(documents) / 3
