"""The reference of preference tuning: what the base model thinks of all answers, computed before the training and kept in the run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from anarcho_tokenize import Batch, SequentialBucketBatches
from anarcho_train import ReferenceCache, ReferencedTraining, ReferencedValidation
from anarcho_train.reference import MANIFEST_FILE

from anarcho_cli.back_ends import TrainingStep, precision_name
from anarcho_cli.config import RunConfig
from anarcho_cli.data import RunData, open_part
from anarcho_cli.models import WEIGHTS
from anarcho_cli.output import note


def with_reference(
    data: RunData, config: RunConfig, step: TrainingStep, *, base: Path, shards: Path, directory: Path
) -> RunData:
    """The data with the log-probabilities of ``step``'s model, which is the base model still, kept in ``directory``.

    ``base`` holds that model, ``shards`` the parts of the data.
    """
    with (base / WEIGHTS).open("rb") as weights:
        model = hashlib.file_digest(weights, "sha256").hexdigest()
    precision = _precision(directory, step)
    cache = ReferenceCache(directory, hashes={"model": model, "data": data.sha256, "precision": precision})
    if not cache.complete:
        note("computing the reference's log-probabilities of all answers")
        cache.compute(_all_batches(config, shards), step.answer_logprobs)
    return dataclasses.replace(
        data,
        train=ReferencedTraining(data.train, cache),
        validation=None if data.validation is None else ReferencedValidation(data.validation, cache),
    )


def _precision(directory: Path, step: TrainingStep) -> str:
    """The step's precision, or that of a complete reference: a run keeps it when it goes on in another framework or on another device.

    A reference that another precision left unfinished is removed: nothing has been trained with it.
    """
    precision = precision_name(step)
    try:
        manifest = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
        found, complete = str(manifest["hashes"]["precision"]), bool(manifest["complete"])
    except (OSError, ValueError, KeyError, TypeError):  # It is not there; or the cache says what is wrong with it.
        return precision
    if found != precision and not complete:
        note(f"the reference was begun in {found}; it is computed anew in {precision}")
        shutil.rmtree(directory)
    return found if complete else precision


def _all_batches(config: RunConfig, shards: Path) -> Iterator[Batch]:
    tokens, length = config.train.fixed_micro_batch * config.sequence_length, config.sequence_length
    for part in ("train", "validation"):
        opened = open_part(config, shards / part)
        if opened.num_tokens:
            yield from SequentialBucketBatches(opened, batch_tokens=tokens, length=length).batches()
