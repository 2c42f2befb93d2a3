"""Random numbers of a training step: a function of the seed, the step and the row, and of nothing else.

Notable: no generator has a state that would have to be kept. So a resumed run draws what the uninterrupted one would have drawn, and a row
has the same numbers whichever micro-batch it is in.

Source of the noise on embeddings: NEFTune (Jain et al. 2023, arXiv:2310.05914).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anarcho_train.step import Batch

_NOISE, _DROPOUT = 0, 1


@dataclass(frozen=True, kw_only=True)
class TrainingDraws:
    """What a model's `token_logprobs` is given besides the batch, by name, while it is trained."""

    seed: int
    """Of the run."""
    dim: int
    """Numbers of an embedding."""
    neftune_alpha: float = 0.0
    """Magnitude of ``embedding_noise``, float32 (rows, length, dim); 0 gives none."""
    dropout: bool = False
    """Whether there are ``dropout_keys``, int64 (rows,): a number under 2**32 for each row."""

    def __call__(self, batch: Batch, *, step: int, first_row: int) -> dict[str, np.ndarray]:
        """The draws of a batch whose rows are those of the step from ``first_row`` on; ``step`` counts from 0."""
        rows = range(first_row, first_row + len(batch.tokens))
        draws: dict[str, np.ndarray] = {}
        if self.neftune_alpha:
            shape = (batch.tokens.shape[1], self.dim)
            uniform = [self._generator(_NOISE, step, row).random(shape, dtype=np.float32) for row in rows]
            scales = self.neftune_alpha / np.sqrt(segment_lengths(batch) * self.dim)
            draws["embedding_noise"] = (2 * np.stack(uniform) - 1) * scales[..., None].astype(np.float32)
        if self.dropout:
            keys = [self._generator(_DROPOUT, step, row).integers(2**32) for row in rows]
            draws["dropout_keys"] = np.array(keys, dtype=np.int64)
        return draws

    def neutral(self, batch: Batch) -> dict[str, np.ndarray]:
        """Arrays of the same shapes that change nothing, for evaluations in a compiled model: others would be compiled anew."""
        draws: dict[str, np.ndarray] = {}
        if self.neftune_alpha:
            draws["embedding_noise"] = np.zeros((*batch.tokens.shape, self.dim), dtype=np.float32)
        if self.dropout:
            draws["dropout_keys"] = np.full(len(batch.tokens), -1, dtype=np.int64)
        return draws

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *key))


def segment_lengths(batch: Batch) -> np.ndarray:
    """Tokens of the segment that each token belongs to, int64 (rows, length).

    Without segments a row is one, which ends with its last target that counts; what follows is padding.
    """
    if batch.segments is not None:
        return np.stack([np.bincount(row)[row] for row in batch.segments])
    counted = batch.weights != 0
    length = counted.shape[1]
    ends = np.where(counted.any(axis=1), length - counted[:, ::-1].argmax(axis=1), length)
    return np.broadcast_to(ends[:, None], counted.shape)
