"""A run's data: token shards that are prepared before the training, or streamed beside it; one path for both."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anarcho_tokenize import (
    AnyTokenizer,
    BucketBatches,
    PackedBatches,
    Producer,
    SequentialBatches,
    SequentialBucketBatches,
    StreamedBatches,
    TokenShards,
    is_prepared,
    load_tokenizer,
    prepare_shards,
)
from anarcho_train.interfaces import TrainingBatches, ValidationBatches

from anarcho_cli.config import RunConfig
from anarcho_cli.output import note
from anarcho_cli.preparation_progress import PreparationProgress

_POLL_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What the training loop reads."""

    train: TrainingBatches
    """Endless, or of a single epoch with data.disk_budget."""
    validation: ValidationBatches | None
    """None without data.validation_fraction."""
    samples_per_step: int | None
    """Where a sample is a whole batch of changing shape: how many make a step."""
    samples_per_epoch: int | None
    """Samples in which the data is seen once; None of a stream, which cannot be counted."""
    sha256: str
    """Names the data in checkpoints; of a stream, what it follows from."""
    facts: dict[str, Any]
    """For the run's "start" record."""
    release: Callable[[int], None]
    """Told that the samples before a number are not needed any more."""
    announcements: list[dict[str, Any]] = field(default_factory=list)
    """Events that the run is to tell: shards that are damaged and left out. A stream adds to them as it is read."""


@contextmanager
def open_run_data(
    config: RunConfig, tokenizer_directory: Path, directory: Path, *, prepares: bool = True
) -> Iterator[RunData]:
    """The batches of a run whose shards are in ``directory``, which are made, continued or streamed as the configuration says.

    Without ``prepares``, another process makes them, and this one only reads. Raises the ValueError or OSError of a source that cannot be
    read.
    """
    tokenizer = load_tokenizer(tokenizer_directory)
    if config.data.streams:
        with ExitStack() as stack:
            producer = None
            if prepares:
                producer = Producer(config.data, tokenizer_directory, directory, notify=note)
                stack.callback(producer.stop)
            yield _streamed(config, directory, tokenizer, producer)
        return
    if prepares:
        prepare(config, tokenizer, directory)
    yield _prepared(config, directory, tokenizer)


def prepared_directory(config: RunConfig) -> Path | None:
    """The directory of `anarcho data prepare`, where the configuration names one in place of texts."""
    if config.data.sources or not is_prepared(config.data.source):
        return None
    if config.data.streaming:
        raise ValueError(
            f"data.streaming is true, but {config.data.source} is prepared already; expected false, or leave the key out"
        )
    return Path(config.data.source)


def prepare(config: RunConfig, tokenizer: AnyTokenizer, directory: Path) -> None:
    """Write all shards, or those that an interrupted attempt left to do."""
    with PreparationProgress() as progress:
        report = prepare_shards(config.data, tokenizer, directory, on_progress=progress.show, notify=note)
    if progress.shown:
        for line in progress.summary(report):
            note(line)


def _prepared(config: RunConfig, directory: Path, tokenizer: AnyTokenizer) -> RunData:
    damage: list[dict[str, Any]] = []
    parts = (directory / part for part in ("train", "validation"))
    train, validation = (_of_tokenizer(open_part(config, part, damage=damage), tokenizer) for part in parts)
    if train.kind != config.data.kind:
        raise ValueError(
            f"data.kind is {config.data.kind!r}, but {directory} was prepared as {train.kind!r}; use the same, or prepare it anew"
        )
    facts = {"train_tokens": train.num_tokens, "validation_tokens": validation.num_tokens}
    if config.data.kind == "preference":
        batches, held_out = _pairs(config, train, validation)
        facts |= {"pairs": batches.num_units, "pairs_left_out": batches.num_dropped, "pairs_cut": batches.num_truncated}
        _tell_of_long_pairs(batches, config.sequence_length)
    else:
        batches, held_out = _packed(config, train), _sequential(config, validation) if validation.num_tokens else None
    return RunData(
        train=batches,
        validation=held_out,
        samples_per_step=samples_per_step(config) if config.data.kind == "preference" else None,
        samples_per_epoch=batches.num_batches if isinstance(batches, BucketBatches) else batches.num_samples,
        sha256=hashlib.sha256(f"{train.fingerprint}{validation.fingerprint}".encode()).hexdigest(),
        facts=facts,
        release=lambda sample: None,
        announcements=damage,
    )


def _streamed(config: RunConfig, directory: Path, tokenizer: AnyTokenizer, producer: Producer | None) -> RunData:
    """Waits for what there must be before the first step: the validation part, and the index of the training part."""
    note("reading the beginning of the stream")
    damage: list[dict[str, Any]] = []
    train = _await(config, directory / "train", tokenizer, producer, complete=False, damage=damage)
    validation = None
    if config.data.validation_fraction:
        validation = _await(config, directory / "validation", tokenizer, producer, complete=True, damage=damage)
    packed = _packed(config, train)
    batches = None if producer is None else StreamedBatches(packed, producer)
    return RunData(
        train=batches or packed,
        validation=None if validation is None else _sequential(config, validation),
        samples_per_step=None,
        samples_per_epoch=None,
        sha256=train.plan_sha256,
        facts={"validation_tokens": 0 if validation is None else validation.num_tokens},
        release=batches.release if batches else lambda sample: None,
        announcements=damage,
    )


def _await(
    config: RunConfig,
    part: Path,
    tokenizer: AnyTokenizer,
    producer: Producer | None,
    *,
    complete: bool,
    damage: list[dict[str, Any]],
) -> TokenShards:
    check = producer.check if producer else lambda: None
    while not (part / "index.json").is_file():
        check()
        time.sleep(_POLL_SECONDS)
    shards = _of_tokenizer(open_part(config, part, growing=True, damage=damage), tokenizer)
    while complete and not shards.complete:
        check()
        time.sleep(_POLL_SECONDS)
        shards.refresh()
    return shards


def open_part(
    config: RunConfig, part: Path, *, growing: bool = False, damage: list[dict[str, Any]] | None = None
) -> TokenShards:
    """The shards of a part, whose files are compared with their sha256; of those that grow, each at its first use.

    Damaged ones are refused or left out, as data.damaged_shards says; each that is left out is added to ``damage`` as an event.
    """

    def tell(message: str) -> None:
        note(message)
        if damage is not None:
            damage.append({"message": message, "fault": "shard", "action": "skip"})

    skips = config.data.damaged_shards == "skip"
    shards = TokenShards.open(
        part, growing=growing, max_damaged_share=config.data.max_bad_share if skips else None, on_damage=tell
    )
    if not growing:
        shards.verify()
    return shards


def _of_tokenizer(shards: TokenShards, tokenizer: AnyTokenizer) -> TokenShards:
    if shards.tokenizer_sha256 != tokenizer.sha256:
        raise ValueError(
            f"{shards.directory} was made by another tokenizer than the run's; put that one back, or start a new run with it"
        )
    return shards


def _packed(config: RunConfig, shards: TokenShards) -> PackedBatches:
    return PackedBatches(
        shards,
        length=config.sequence_length,
        seed=config.train.seed,
        packing=config.data.packing,
        isolate_documents=config.data.isolate_documents,
        shuffle_tokens=config.data.shuffle_tokens if config.data.streams else None,
        single_epoch=config.data.disk_budget is not None,
    )


def _pairs(
    config: RunConfig, train: TokenShards, validation: TokenShards
) -> tuple[BucketBatches, SequentialBucketBatches | None]:
    """Pairs of answers by length; a batch has the tokens of a micro-batch, if that is not found only later."""
    tokens, length = config.bucket_sequences * config.sequence_length, config.sequence_length
    batches = BucketBatches(train, batch_tokens=tokens, length=length, seed=config.train.seed)
    if not validation.num_tokens:
        return batches, None
    return batches, SequentialBucketBatches(validation, batch_tokens=tokens, length=length, ladder=batches.ladder)


def _tell_of_long_pairs(batches: BucketBatches, length: int) -> None:
    total = batches.num_units + batches.num_dropped
    for count, what in (
        (batches.num_dropped, "left out, as an answer begins only after"),
        (batches.num_truncated, "cut at"),
    ):
        if count:
            note(f"{count} of {total} pairs of answers are {what} {length} tokens (train.sequence_length)")


def samples_per_step(config: RunConfig) -> int:
    """What several processes share of a step: its sequences, or batches of pairs."""
    return config.batch_sequences // (config.bucket_sequences if config.data.kind == "preference" else 1)


def _sequential(config: RunConfig, shards: TokenShards) -> SequentialBatches:
    return SequentialBatches(
        shards,
        length=config.sequence_length,
        packing=config.data.packing,
        isolate_documents=config.data.isolate_documents,
    )
