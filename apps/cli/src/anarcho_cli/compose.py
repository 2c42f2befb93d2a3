"""A training run from raw text, or from a base model and conversations, to a trained model: the one place where the five packages meet.

Notable: a run directory appears whole (configuration, environment, a given tokenizer) and everything after that is done only where it is
not done yet, so starting and resuming are one path. Tokenizer, shards and checkpoints appear under their names only when they are complete.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import signal
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anarcho_monitor import Sinks
from anarcho_tokenize import NetworkError, load_tokenizer, read_texts, train_tokenizer
from anarcho_train import Alone, RankLost, Ranks, TrainResult, after_first, require_equal, told

from anarcho_cli import config as configuration
from anarcho_cli.attempt import Attempt, begin
from anarcho_cli.back_ends import TrainingStep
from anarcho_cli.back_ends.torch_processes import processes_of
from anarcho_cli.config import RunConfig
from anarcho_cli.data import RunData, open_run_data, prepared_directory
from anarcho_cli.diagnostics import Diagnostics, diagnosed
from anarcho_cli.disk_space import require_disk_space
from anarcho_cli.fitting.decision import Fit, agreed, is_open
from anarcho_cli.fitting.run_fit import find_fit
from anarcho_cli.models import CHECKPOINTS
from anarcho_cli.output import note
from anarcho_cli.reference import with_reference
from anarcho_cli.resume_changes import Change, announcement, take_changes
from anarcho_cli.run_directory import BASE, CONFIG_FILE, DATA, REFERENCE, TOKENIZER, create_run
from anarcho_cli.run_sample import require_prompt, write_sample
from anarcho_cli.shared_run import joined
from anarcho_cli.training_loop import make_loop, open_checkpoints, open_sinks, require_same_run


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """How a run ended."""

    run_directory: Path
    """Where everything is."""
    steps: int
    """Optimizer steps made, earlier attempts included."""
    tokens: int
    """Tokens trained on, earlier attempts included."""
    seconds: float
    """Wall time of this attempt, preparation and evaluation included."""
    validation_loss: float | None
    """Last validation loss in nats per token, or per pair of answers; None where the run stopped before one was measured."""
    bits_per_byte: float | None
    """The same in bits per byte of text."""
    validation_measures: dict[str, float]
    """What the stage measures besides, such as the accuracy of preferences."""
    best_step: int | None
    """Step of the lowest validation loss."""
    checkpoint: Path | None
    """The last checkpoint."""
    sample: str | None
    """Text that the trained model wrote; None where the run was stopped."""
    exit_code: int = 0
    """0, or 128 + the number of the signal that stopped the run."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(self).items()
        }


def train(
    config: RunConfig,
    *,
    run_directory: Path,
    device: str,
    backend: str = "torch",
    tokenizer_path: Path | None = None,
    base: Path | None = None,
    ranks: Ranks | None = None,
    diagnostics: Diagnostics | None = None,
) -> RunSummary:
    """Starts a run in ``run_directory``, which must not exist, and trains it to its end with a framework, `torch` or `mlx`.

    Its model begins with the weights of the model directory ``base``, which the run keeps, or with random ones. Where text, tokenizer or
    conversations turn out to be unusable, the directory is gone again. Of several processes, ``ranks``, the first makes all this and the
    others wait for it. Raises the packages' ValueError and OSError.
    """
    ranks = ranks or Alone()
    attempt = begin(run_directory, config, backend=backend, device=device, ranks=ranks)
    with after_first(ranks):
        if ranks.rank == 0:
            require_disk_space(run_directory / CHECKPOINTS, config)
            create_run(run_directory, config, tokenizer_path, base, backend=backend, device=device)
    with ExitStack() as stack:
        try:
            inherits = stack.enter_context(joined(run_directory, ranks))
            with after_first(ranks):
                _prepare_tokenizer(run_directory, config)
                data = stack.enter_context(_open_data(run_directory, config, ranks))
        except (NetworkError, RankLost):
            note(f"stopped before the training began; continue with --resume {run_directory}")
            raise
        except (ValueError, OSError):
            if ranks.rank == 0:
                shutil.rmtree(run_directory, ignore_errors=True)
            raise
        except KeyboardInterrupt:
            note(f"stopped before the training began; continue with --resume {run_directory}")
            raise
        return _train(attempt, config, data, inherits=inherits, diagnostics=diagnostics)


def resume(
    run_directory: Path,
    *,
    device: str,
    backend: str = "torch",
    overrides: Sequence[str] = (),
    allow_changes: bool = False,
    ranks: Ranks | None = None,
    diagnostics: Diagnostics | None = None,
) -> RunSummary:
    """Continues a run from its newest valid checkpoint, or from the beginning where it has none.

    Neither device nor framework have to be those with which it began. ``overrides`` (``--set`` texts) and what was changed in the run's
    config.toml are judged key by key; ``allow_changes`` allows those that change what is learned from here on.
    """
    ranks = ranks or Alone()
    config = configuration.resolve(preset=None, file=run_directory / CONFIG_FILE, overrides=overrides)
    attempt = begin(run_directory, config, backend=backend, device=device, ranks=ranks)
    with joined(run_directory, ranks) as inherits, ExitStack() as stack:
        checkpoints = open_checkpoints(run_directory, config)
        checkpoint, changes = None, []
        with after_first(ranks):
            if ranks.rank == 0:
                checkpoints.sweep()
                checkpoint = checkpoints.latest_valid(notify=note)
                changes = take_changes(
                    run_directory,
                    config,
                    overridden=bool(overrides),
                    allow_changes=allow_changes,
                    checkpoints=checkpoints,
                    checkpoint=checkpoint,
                    notify=note,
                )
                require_disk_space(run_directory / CHECKPOINTS, config)
            _prepare_tokenizer(run_directory, config)
            data = stack.enter_context(_open_data(run_directory, config, ranks))
        if found := told(ranks, checkpoint.name if checkpoint else ""):
            checkpoint = checkpoints.directory / found
        return _train(
            attempt,
            config,
            data,
            inherits=inherits,
            checkpoint=checkpoint,
            changes=changes,
            diagnostics=diagnostics,
        )


def _open_data(run_directory: Path, config: RunConfig, ranks: Ranks) -> AbstractContextManager[RunData]:
    prepared = prepared_directory(config)
    return open_run_data(
        config,
        run_directory / TOKENIZER,
        prepared or run_directory / DATA,
        prepares=ranks.rank == 0 and prepared is None,
    )


def _prepare_tokenizer(run_directory: Path, config: RunConfig) -> None:
    """Trains the tokenizer where it is not there yet."""
    directory = run_directory / TOKENIZER
    if directory.is_dir():
        return
    if prepared := prepared_directory(config):
        raise ValueError(
            f"{prepared} holds tokens, from which no tokenizer can be trained; give the one that made them as --tokenizer"
        )
    note(f"training a tokenizer of {config.tokenizer.vocab_size} pieces on {config.data.name}")
    staging = directory.with_name(f".{TOKENIZER}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    train_tokenizer(read_texts(config.data, notify=note), config=config.tokenizer).save(staging)
    staging.rename(directory)


def with_counted_steps(config: RunConfig, *, tokenizer_path: Path | None) -> RunConfig:
    """The configuration with the steps that its epochs come to: the data is prepared as for a run, in a temporary directory."""
    note("counting the samples of an epoch; this prepares the data as the run will")
    with tempfile.TemporaryDirectory(prefix="anarcho-") as folder:
        if tokenizer_path is not None:
            load_tokenizer(tokenizer_path).save(Path(folder) / TOKENIZER)
        _prepare_tokenizer(Path(folder), config)
        with _open_data(Path(folder), config, Alone()) as data:
            return _with_steps(config, data)


def _with_steps(config: RunConfig, data: RunData) -> RunConfig:
    """The configuration with the number of steps that `train.epochs` comes to."""
    if config.train.epochs is None:
        return config
    assert data.samples_per_epoch is not None, "a configuration with epochs has data that can be counted"
    steps = config.train.steps_of_epochs(
        samples_per_epoch=data.samples_per_epoch, samples_per_step=data.samples_per_step or config.batch_sequences
    )
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def _train(
    attempt: Attempt,
    config: RunConfig,
    data: RunData,
    *,
    inherits: Callable[[], bool],
    checkpoint: Path | None = None,
    changes: Sequence[Change] = (),
    diagnostics: Diagnostics | None = None,
) -> RunSummary:
    """Trains from the beginning, or on from a checkpoint since which ``changes`` were made to the configuration."""
    run_directory, framework, ranks = attempt.run_directory, attempt.framework, attempt.ranks
    config = _with_steps(config, data)
    tokenizer = load_tokenizer(run_directory / TOKENIZER)
    require_prompt(config, tokenizer)
    framework.limit_memory(attempt.device)
    fit = _find_fit(attempt, config)
    config = fit.applied(config) if fit else config
    step = framework.make_step(config, tokenizer, run_directory / BASE, device=attempt.device, ranks=ranks)
    data = _with_reference(attempt, config, data, step)
    with closing(open_sinks(run_directory, config) if ranks.rank == 0 else Sinks([])) as sinks:
        loop = make_loop(attempt, config, data, step, sinks, tokenizer, fit=fit, inherits=inherits)
        require_equal(ranks, {**loop.hashes, "the micro-batch": loop.micro_batch})
        if checkpoint is not None:
            require_same_run(loop, checkpoint)
            loop.resume(checkpoint)
        if fit:
            loop.announcements.append(fit.event())
        if changes:
            loop.announcements.append(announcement(changes))
        wanted = diagnostics or Diagnostics()
        with diagnosed(loop, run_directory, wanted, backend=framework.NAME, device=attempt.device):
            result = loop.run()
        sample = None if result.stopped_by or ranks.rank else write_sample(config, framework, step, tokenizer)
        if sample is not None:
            sinks.write("sample", step=result.step, tokens=result.tokens, text=sample)
        sinks.write("end", step=result.step, tokens=result.tokens, seconds=attempt.seconds)
    return _summary(run_directory, result, sample, seconds=attempt.seconds)


def _find_fit(attempt: Attempt, config: RunConfig) -> Fit | None:
    """What all processes take for the settings that the configuration leaves open."""
    name, device, processes = attempt.framework.NAME, attempt.device, None
    if name == "torch" and attempt.ranks.size > 1 and is_open(config):
        processes = processes_of(config, attempt.ranks, device=device)
    with after_first(attempt.ranks):
        fit = find_fit(attempt.run_directory, config, backend=name, device=device, processes=processes)
    return agreed(fit, attempt.ranks)


def _with_reference(attempt: Attempt, config: RunConfig, data: RunData, step: TrainingStep) -> RunData:
    """The data, with what the base model makes of it where the loss compares with that."""
    if config.data.kind != "preference" or not config.preference.needs_reference:
        return data
    run = attempt.run_directory
    with after_first(attempt.ranks):
        shards = prepared_directory(config) or run / DATA
        return with_reference(data, config, step, base=run / BASE, shards=shards, directory=run / REFERENCE)


def _summary(run_directory: Path, result: TrainResult, sample: str | None, *, seconds: float) -> RunSummary:
    finite = result.validation_loss is not None and math.isfinite(result.validation_loss)
    return RunSummary(
        run_directory=run_directory,
        steps=result.step,
        tokens=result.tokens,
        seconds=seconds,
        validation_loss=result.validation_loss if finite else None,
        bits_per_byte=result.bits_per_byte if finite else None,
        validation_measures=result.validation_measures,
        best_step=result.best_step,
        checkpoint=result.checkpoint,
        sample=sample,
        exit_code=0 if result.stopped_by is None else 128 + signal.Signals(result.stopped_by),
    )
