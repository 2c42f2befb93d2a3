"""A training run from raw text, or from a base model and conversations, to a trained model: the one place where the five packages meet.

Notable: a run directory appears whole (configuration, environment, a given tokenizer) and everything after that is done only where it is
not done yet, so starting and resuming are one path. Tokenizer, shards and checkpoints appear under their names only when they are complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anarcho_model.flops import training_flops_per_token
from anarcho_monitor import (
    EarlyStopping,
    MetricsLog,
    Progress,
    Sinks,
    TensorBoardSink,
    Throughput,
    peak_flops,
    read_memory,
)
from anarcho_optim import schedules
from anarcho_tokenize import (
    AnyTokenizer,
    Message,
    NetworkError,
    StreamDecoder,
    encode_chat,
    load_tokenizer,
    read_texts,
    train_tokenizer,
)
from anarcho_tokenize.symbols import END
from anarcho_train import CheckpointError, CheckpointStore, Loop, StepSchedule, TrainResult, lock_run

from anarcho_cli import config as configuration
from anarcho_cli.config import RunConfig
from anarcho_cli.data import RunData, open_run_data
from anarcho_cli.diagnosis import processor_facts, system_facts
from anarcho_cli.models import CHECKPOINTS, WEIGHTS
from anarcho_cli.output import note
from anarcho_cli.reference import with_reference

if TYPE_CHECKING:
    from anarcho_train.steps.torch import TorchStep

CONFIG_FILE = "config.toml"
ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"
TOKENIZER = "tokenizer"
DATA = "data"
BASE = "base"
REFERENCE = "reference"


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
    tokenizer_path: Path | None = None,
    base: Path | None = None,
) -> RunSummary:
    """Starts a run in ``run_directory``, which must not exist, and trains it to its end.

    Its model begins with the weights of the model directory ``base``, which the run keeps, or with random ones. Where text, tokenizer or
    conversations turn out to be unusable, the directory is gone again. Raises the packages' ValueError and OSError.
    """
    started = time.monotonic()
    _require_precision(config, device)
    _create_run(run_directory, config, tokenizer_path, base)
    with _locked(run_directory), ExitStack() as stack:
        try:
            _prepare_tokenizer(run_directory, config)
            data = stack.enter_context(_open_data(run_directory, config))
        except NetworkError:
            note(f"stopped before the training began; continue with --resume {run_directory}")
            raise
        except (ValueError, OSError):
            shutil.rmtree(run_directory, ignore_errors=True)
            raise
        except KeyboardInterrupt:
            note(f"stopped before the training began; continue with --resume {run_directory}")
            raise
        return _train(run_directory, config, data, device=device, started=started)


def resume(run_directory: Path, *, device: str) -> RunSummary:
    """Continues a run from its newest valid checkpoint, or from the beginning where it has none."""
    started = time.monotonic()
    config = configuration.load(run_directory / CONFIG_FILE)
    with _locked(run_directory):
        _prepare_tokenizer(run_directory, config)
        with _open_data(run_directory, config) as data:
            return _train(run_directory, config, data, device=device, started=started)


def _open_data(run_directory: Path, config: RunConfig) -> AbstractContextManager[RunData]:
    return open_run_data(config, run_directory / TOKENIZER, run_directory / DATA)


def _require_precision(config: RunConfig, device: str) -> None:
    """Refuses an arithmetic that the device does not have, before anything is written; loads torch."""
    import torch
    from anarcho_train.steps.torch import resolve_precision

    resolve_precision(config.train.precision, torch.device(device))


def _create_run(run_directory: Path, config: RunConfig, tokenizer_path: Path | None, base: Path | None) -> None:
    """Makes the directory of a new run under another name and renames it, so that a run is never half begun."""
    if run_directory.exists():
        raise FileExistsError(
            f"the run {run_directory} exists already; choose another --name, or continue it with --resume {run_directory}"
        )
    staging = run_directory.with_name(f".{run_directory.name}.partial-{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        (staging / CONFIG_FILE).write_text(configuration.dumps(config), encoding="utf-8")
        environment = {**system_facts(), "processor": processor_facts()}
        (staging / ENVIRONMENT_FILE).write_text(json.dumps(environment, indent=1) + "\n", encoding="utf-8")
        if tokenizer_path is not None:
            load_tokenizer(tokenizer_path).save(staging / TOKENIZER)
        if base is not None:
            _keep_base(base, staging / BASE)
        staging.rename(run_directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _keep_base(base: Path, directory: Path) -> None:
    """Links the base model's files into the run, or copies them, so that it can begin anew when they are gone elsewhere."""
    directory.mkdir()
    for name in (WEIGHTS, "config.json"):
        try:
            (directory / name).hardlink_to(base / name)
        except OSError:
            shutil.copyfile(base / name, directory / name)


@contextmanager
def _locked(run_directory: Path) -> Iterator[None]:
    lock = lock_run(run_directory)
    try:
        yield
    finally:
        lock.release()


def _prepare_tokenizer(run_directory: Path, config: RunConfig) -> None:
    """Trains the tokenizer where it is not there yet."""
    directory = run_directory / TOKENIZER
    if directory.is_dir():
        return
    note(f"training a tokenizer of {config.tokenizer.vocab_size} pieces on {config.data.name}")
    staging = directory.with_name(f".{TOKENIZER}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    train_tokenizer(read_texts(config.data, notify=note), config=config.tokenizer).save(staging)
    staging.rename(directory)


def _train(run_directory: Path, config: RunConfig, data: RunData, *, device: str, started: float) -> RunSummary:
    tokenizer = load_tokenizer(run_directory / TOKENIZER)
    _require_prompt(config, tokenizer)
    base = run_directory / BASE
    step = _make_step(config, tokenizer, base, device=device)
    if config.data.kind == "preference" and config.preference.needs_reference:
        shards, kept = run_directory / DATA, run_directory / REFERENCE
        data = with_reference(data, config, step, base=base, shards=shards, directory=kept)
    progress_sinks = _sinks(run_directory, config)
    try:
        loop = _make_loop(run_directory, config, data, step, progress_sinks, tokenizer, device=device)
        loop.checkpoints.sweep()
        if checkpoint := loop.checkpoints.latest_valid(notify=note):
            _require_same_run(loop, checkpoint)
            loop.resume(checkpoint)
        result = loop.run()
        sample = None if result.stopped_by else _sample(config, step, tokenizer)
        if sample is not None:
            progress_sinks.write("sample", step=result.step, tokens=result.tokens, text=sample)
        progress_sinks.write("end", step=result.step, tokens=result.tokens, seconds=time.monotonic() - started)
    finally:
        progress_sinks.close()
    return _summary(run_directory, result, sample, seconds=time.monotonic() - started)


def _require_prompt(config: RunConfig, tokenizer: AnyTokenizer) -> None:
    """The sample's prompt must leave room in the context, or the run would fail at its very end."""
    length = len(_sample_prompt(config, tokenizer))
    if length >= config.model.context_length:
        raise ValueError(
            f"sample.prompt has {length} tokens with what precedes it; expected fewer than model.context_length "
            f"{config.model.context_length}: shorten it"
        )


def _make_step(config: RunConfig, tokenizer: AnyTokenizer, base: Path, *, device: str) -> TorchStep:
    """The model on its device, its optimizer, and the training step over both; loads torch."""
    from anarcho_model.torch import GPT
    from anarcho_model.weights import load_weights, save_pretrained
    from anarcho_optim.torch import MuonAdamW, param_groups
    from anarcho_train.losses.torch_preference import PreferenceLoss
    from anarcho_train.steps.torch import TorchStep

    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size is {config.model.vocab_size}, but the run's tokenizer has {tokenizer.vocab_size} pieces; "
            "leave model.vocab_size out, it follows the tokenizer"
        )
    model = GPT(config.model)
    if base.is_dir():
        load_weights(model, base)
    else:
        model.init_weights(seed=config.train.seed, init=config.init)
    model.gradient_checkpointing = config.train.gradient_checkpointing
    model.to(device)

    def save_model(trained: Any, directory: Path) -> None:
        save_pretrained(trained, directory, eos_token_id=tokenizer.eot_id, pad_token_id=tokenizer.pad_id)
        tokenizer.save(directory)

    return TorchStep(
        model,
        MuonAdamW(param_groups(model, config=config.optim)),
        config=config.train,
        loss=PreferenceLoss(config.preference) if config.data.kind == "preference" else None,
        save_model=save_model,
        load_model=lambda trained, directory: load_weights(model, directory),
        flops=training_flops_per_token(config.model, config.sequence_length) * config.total_tokens,
        notify=note,
    )


def _make_loop(
    run_directory: Path,
    config: RunConfig,
    data: RunData,
    step: TorchStep,
    sink: Sinks,
    tokenizer: AnyTokenizer,
    *,
    device: str,
) -> Loop:
    checkpoints = CheckpointStore(run_directory / CHECKPOINTS, keep_last=config.train.keep_last)

    def schedule(number: int) -> StepSchedule:
        return StepSchedule(
            lr_scale=schedules.lr_scale(config.optim, number, total_steps=config.train.steps),
            momentum=schedules.momentum(config.optim, number),
        )

    return Loop(
        step=step,
        batches=data.train,
        validation=data.validation,
        samples_per_step=data.samples_per_step,
        schedule=schedule,
        config=config.train,
        sequence_length=config.sequence_length,
        checkpoints=checkpoints,
        sink=sink,
        early_stopping=EarlyStopping(
            patience=config.train.early_stopping_patience, min_delta=config.train.early_stopping_min_delta
        ),
        hashes={
            "config": hashlib.sha256((run_directory / CONFIG_FILE).read_bytes()).hexdigest(),
            "tokenizer": tokenizer.sha256,
            "data": data.sha256,
        },
        throughput=Throughput(
            total_steps=config.train.steps,
            flops_per_token=training_flops_per_token(config.model, config.sequence_length),
            peak_flops=config.monitor.peak_flops or peak_flops(_device_name(device)),
        ),
        gauges=lambda: read_memory(device).metrics(),
        facts={
            "device": device,
            "precision": str(step.precision).removeprefix("torch."),
            "compiled": step.compiled,
            "parameters": config.model.num_parameters,
            **data.facts,
        },
        on_checkpoint=lambda: data.release(_first_needed_sample(checkpoints)),
    )


def _first_needed_sample(checkpoints: CheckpointStore) -> int:
    """The sample that the oldest checkpoint goes on with from which the run may have to be resumed."""
    return min((checkpoints.read_state(path)["samples"] for path in checkpoints.recent()), default=0)


def _device_name(device: str) -> str:
    """The full name of a CUDA device; other devices have no peak that their name tells."""
    if device != "cuda":
        return device
    import torch

    return torch.cuda.get_device_name()


def _sinks(run_directory: Path, config: RunConfig) -> Sinks:
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


def _require_same_run(loop: Loop, checkpoint: Path) -> None:
    """A checkpoint continues only under the configuration, the tokenizer and the data that it was made with."""
    saved = loop.checkpoints.read_hashes(checkpoint)
    for name, value in loop.hashes.items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"{checkpoint} was made with another {name} than the run directory holds now; put the run's own {name} back "
                "(or remove the checkpoint, if it is another run's), or start a new run"
            )


def _sample_prompt(config: RunConfig, tokenizer: AnyTokenizer) -> list[int]:
    """The beginning of a document, or of a conversation in which the prompt is the user's."""
    if config.data.kind == "text":
        return [tokenizer.eot_id, *tokenizer.encode(config.sample.prompt)]
    return encode_chat(tokenizer, [Message("user", config.sample.prompt)], add_generation_prompt=True)


def _sample(config: RunConfig, step: TorchStep, tokenizer: AnyTokenizer) -> str:
    """The prompt of the configuration, and what the trained model makes of it."""
    from anarcho_model.generate.torch import generate
    from anarcho_model.torch import GPT

    assert isinstance(step.model, GPT)
    stops = config.sample.stop_token_ids or (tokenizer.eot_id, tokenizer.special_tokens[END])
    settings = dataclasses.replace(config.sample, stop_token_ids=stops)
    tokens = generate(step.model, _sample_prompt(config, tokenizer), config=settings)
    decoder = StreamDecoder(tokenizer, continues=config.data.kind == "text")
    text = "".join(decoder.push(token) for token in tokens if token < tokenizer.vocab_size) + decoder.flush()
    return config.sample.prompt + (text if config.data.kind == "text" else f"\n{text}")


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
