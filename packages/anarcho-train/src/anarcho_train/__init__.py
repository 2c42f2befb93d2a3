"""The training loop, its stages and its exact checkpoints, for any model.

``anarcho_train.steps.torch`` holds the PyTorch step; importing this package loads no framework.
Names are resolved on first use, so that a configuration can be had without the rest.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anarcho_train.anomalies import AnomalyDetection, NonFiniteNumbers
    from anarcho_train.checkpoint import CheckpointError, CheckpointInfo, CheckpointStore, lock_run
    from anarcho_train.config import PreferenceConfig, TrainConfig
    from anarcho_train.draws import TrainingDraws
    from anarcho_train.loop import Loop
    from anarcho_train.micro_batch import LinearPeak, MicroBatches, divisors, next_smaller
    from anarcho_train.out_of_memory import OutOfMemory
    from anarcho_train.progress import TrainResult
    from anarcho_train.ranks import (
        Alone,
        RankFailed,
        RankLost,
        Ranks,
        RanksDiffer,
        after_first,
        known_to_all,
        require_equal,
        share,
        told,
    )
    from anarcho_train.recovery import RecoveryConfig, TrainingDiverged
    from anarcho_train.reference import ReferenceCache, ReferenceCacheError, ReferencedTraining, ReferencedValidation
    from anarcho_train.saving import SaveFailed, free_bytes
    from anarcho_train.signals import StopSignal
    from anarcho_train.step import Batch, LossSum, Step, StepMetrics, StepSchedule
    from anarcho_train.validation import evaluate

__all__ = [
    "Alone",
    "AnomalyDetection",
    "Batch",
    "CheckpointError",
    "CheckpointInfo",
    "CheckpointStore",
    "LinearPeak",
    "Loop",
    "LossSum",
    "MicroBatches",
    "NonFiniteNumbers",
    "OutOfMemory",
    "PreferenceConfig",
    "RankFailed",
    "RankLost",
    "Ranks",
    "RanksDiffer",
    "RecoveryConfig",
    "ReferenceCache",
    "ReferenceCacheError",
    "ReferencedTraining",
    "ReferencedValidation",
    "SaveFailed",
    "Step",
    "StepMetrics",
    "StepSchedule",
    "StopSignal",
    "TrainConfig",
    "TrainResult",
    "TrainingDiverged",
    "TrainingDraws",
    "after_first",
    "divisors",
    "evaluate",
    "free_bytes",
    "known_to_all",
    "lock_run",
    "next_smaller",
    "require_equal",
    "share",
    "told",
]

_HOMES = {
    "anomalies": (
        "AnomalyDetection",
        "NonFiniteNumbers",
    ),
    "checkpoint": (
        "CheckpointError",
        "CheckpointInfo",
        "CheckpointStore",
        "lock_run",
    ),
    "config": (
        "PreferenceConfig",
        "TrainConfig",
    ),
    "draws": ("TrainingDraws",),
    "loop": ("Loop",),
    "micro_batch": (
        "LinearPeak",
        "MicroBatches",
        "divisors",
        "next_smaller",
    ),
    "out_of_memory": ("OutOfMemory",),
    "progress": ("TrainResult",),
    "ranks": (
        "Alone",
        "RankFailed",
        "RankLost",
        "Ranks",
        "RanksDiffer",
        "after_first",
        "known_to_all",
        "require_equal",
        "share",
        "told",
    ),
    "recovery": (
        "RecoveryConfig",
        "TrainingDiverged",
    ),
    "reference": (
        "ReferenceCache",
        "ReferenceCacheError",
        "ReferencedTraining",
        "ReferencedValidation",
    ),
    "saving": (
        "SaveFailed",
        "free_bytes",
    ),
    "signals": ("StopSignal",),
    "step": (
        "Batch",
        "LossSum",
        "Step",
        "StepMetrics",
        "StepSchedule",
    ),
    "validation": ("evaluate",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
