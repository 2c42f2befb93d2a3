"""The loop of a run: its batches, schedule, sinks and checkpoints, put together from the configuration."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anarcho_monitor import (
    EarlyStopping,
    MetricsLog,
    Progress,
    Sinks,
    TensorBoardSink,
    Throughput,
    peak_flops,
)
from anarcho_optim import schedules
from anarcho_tokenize import AnyTokenizer
from anarcho_train import CheckpointError, CheckpointStore, Loop, StepSchedule

from anarcho_cli import config as configuration
from anarcho_cli.attempt import Attempt
from anarcho_cli.back_ends import TrainingStep, precision_name
from anarcho_cli.background_saving import copies_state, has_room_for_copy
from anarcho_cli.config import RunConfig, to_dict
from anarcho_cli.data import RunData
from anarcho_cli.disk_space import checkpoint_bytes
from anarcho_cli.fitting.decision import Fit
from anarcho_cli.models import CHECKPOINTS
from anarcho_cli.run_directory import CONFIG_FILE, METRICS_FILE, TENSORBOARD


def make_loop(
    attempt: Attempt,
    config: RunConfig,
    data: RunData,
    step: TrainingStep,
    sinks: Sinks,
    tokenizer: AnyTokenizer,
    *,
    fit: Fit | None,
    inherits: Callable[[], bool],
) -> Loop:
    """The loop over ``data``; nothing is trained or restored yet. ``fit`` is what was found for what ``config`` left open."""
    run_directory, device, ranks = attempt.run_directory, attempt.device, attempt.ranks
    checkpoints = open_checkpoints(run_directory, config)
    return Loop(
        step=step,
        batches=data.train,
        validation=data.validation,
        samples_per_step=data.samples_per_step,
        micro_batch_tokens=fit.micro_batch * config.sequence_length if fit and data.samples_per_step else None,
        schedule=lambda number: _schedule(config, number),
        config=config.train,
        sequence_length=config.sequence_length,
        checkpoints=checkpoints,
        sink=sinks,
        early_stopping=EarlyStopping(
            patience=config.train.early_stopping_patience, min_delta=config.train.early_stopping_min_delta
        ),
        hashes={
            "config": hashlib.sha256((run_directory / CONFIG_FILE).read_bytes()).hexdigest(),
            "tokenizer": tokenizer.sha256,
            "data": data.sha256,
        },
        throughput=_throughput(attempt, config),
        gauges=lambda: attempt.framework.gauges(step, device),
        recovery=config.recovery,
        announcements=data.announcements,
        settings=to_dict(configuration.load(run_directory / CONFIG_FILE)),
        checkpoint_bytes=checkpoint_bytes(config),
        background=lambda: copies_state(config, device=device) and has_room_for_copy(config),
        facts={**_facts(attempt, config, step), **(fit.facts() if fit else {}), **data.facts},
        on_checkpoint=lambda: data.release(_first_needed_sample(checkpoints)),
        ranks=ranks,
        inherits=inherits,
    )


def _schedule(config: RunConfig, number: int) -> StepSchedule:
    """What the step with this number is made with."""
    return StepSchedule(
        lr_scale=schedules.lr_scale(config.optim, number, total_steps=config.train.steps),
        momentum=schedules.momentum(config.optim, number),
        number=number,
    )


def _throughput(attempt: Attempt, config: RunConfig) -> Throughput:
    """Measures against the peaks of all processes' devices together; where one is not known, against nothing."""
    own = config.monitor.peak_flops or peak_flops(attempt.framework.device_name(attempt.device))
    peaks = attempt.ranks.gathered([own or 0.0])
    return Throughput(
        total_steps=config.train.steps,
        flops_per_token=config.flops_per_token,
        peak_flops=float(peaks.sum()) if peaks.all() else None,
    )


def _facts(attempt: Attempt, config: RunConfig, step: TrainingStep) -> dict[str, Any]:
    """What the metrics file says of each attempt."""
    return {
        "backend": attempt.framework.NAME,
        "device": attempt.device,
        "processes": attempt.ranks.size,
        "precision": precision_name(step),
        "compiled": step.compiled,
        "micro_batch": config.train.micro_batch,
        "gradient_checkpointing": config.train.gradient_checkpointing,
        "parameters": config.model.num_parameters,
        "trained_parameters": config.trained_parameters,
    }


def open_checkpoints(run_directory: Path, config: RunConfig) -> CheckpointStore:
    """The checkpoints of the run."""
    return CheckpointStore(run_directory / CHECKPOINTS, keep_last=config.train.keep_last)


def _first_needed_sample(checkpoints: CheckpointStore) -> int:
    """The sample that the oldest checkpoint goes on with from which the run may have to be resumed."""
    return min((checkpoints.read_state(path)["samples"] for path in checkpoints.recent()), default=0)


def open_sinks(run_directory: Path, config: RunConfig) -> Sinks:
    """Where the measurements of the run go."""
    sinks: list[Any] = [MetricsLog(run_directory / METRICS_FILE, run=run_directory.name)]
    if config.monitor.tensorboard:
        sinks.append(TensorBoardSink(run_directory / TENSORBOARD))
    if config.monitor.progress:
        sinks.append(
            Progress(
                config.train.steps,
                tokens_per_step=config.train.batch_tokens,
                interval_seconds=config.monitor.progress_seconds,
            )
        )
    return Sinks(sinks)


def require_same_run(loop: Loop, checkpoint: Path) -> None:
    """A checkpoint continues only with the tokenizer and the data that it was made with."""
    saved = loop.checkpoints.read_hashes(checkpoint)
    for name, value in loop.hashes.items():
        if name == "config":  # Judged key by key, before anything is prepared.
            continue
        if saved.get(name) != value:
            raise CheckpointError(
                f"{checkpoint} was made with another {name} than the run directory holds now; put the run's own {name} back "
                "(or remove the checkpoint, if it is another run's), or start a new run"
            )
