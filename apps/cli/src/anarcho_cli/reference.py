"""The reference of preference tuning: what the base model thinks of all answers, computed before the training and kept in the run."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from anarcho_tokenize import Batch, SequentialBucketBatches, TokenShards
from anarcho_train import ReferenceCache, ReferencedTraining, ReferencedValidation

from anarcho_cli.config import RunConfig
from anarcho_cli.data import RunData
from anarcho_cli.models import WEIGHTS
from anarcho_cli.output import note

if TYPE_CHECKING:
    from anarcho_train.steps.torch import TorchStep


def with_reference(
    data: RunData, config: RunConfig, step: TorchStep, *, base: Path, shards: Path, directory: Path
) -> RunData:
    """The data with the log-probabilities of ``step``'s model, which is the base model still, kept in ``directory``.

    ``base`` holds that model, ``shards`` the parts of the data.
    """
    with (base / WEIGHTS).open("rb") as weights:
        model = hashlib.file_digest(weights, "sha256").hexdigest()
    cache = ReferenceCache(
        directory, hashes={"model": model, "data": data.sha256, "precision": str(step.precision).removeprefix("torch.")}
    )
    if not cache.complete:
        note("computing the reference's log-probabilities of all answers")
        cache.compute(_all_batches(config, shards), step.answer_logprobs)
    return dataclasses.replace(
        data,
        train=ReferencedTraining(data.train, cache),
        validation=None if data.validation is None else ReferencedValidation(data.validation, cache),
    )


def _all_batches(config: RunConfig, shards: Path) -> Iterator[Batch]:
    tokens, length = config.train.micro_batch * config.sequence_length, config.sequence_length
    for part in ("train", "validation"):
        opened = TokenShards.open(shards / part)
        if opened.num_tokens:
            yield from SequentialBucketBatches(opened, batch_tokens=tokens, length=length).batches()
