"""Metrics, memory, throughput, progress and early stopping for training runs.

The training loop writes records to a `MetricSink`; metrics.jsonl, TensorBoard and the progress display are sinks. Importing
this package loads neither torch nor mlx nor tensorboard: a reading or a sink that needs one loads it when it is made.
Names are resolved on first use, so that a configuration can be had without the rest.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anarcho_monitor.config import MonitorConfig
    from anarcho_monitor.early_stopping import EarlyStopping
    from anarcho_monitor.errors import MonitorError
    from anarcho_monitor.history import Attempt, Curve, Mark, RunHistory
    from anarcho_monitor.memory import MemoryReading, SystemMemory, read_memory, read_system_memory
    from anarcho_monitor.metrics import (
        MetricsLog,
        Point,
        next_attempt,
        read_curve,
        read_metrics,
        superseded,
        surviving_records,
    )
    from anarcho_monitor.progress import Progress
    from anarcho_monitor.sinks import MetricSink, Sinks
    from anarcho_monitor.tail import MetricsTail
    from anarcho_monitor.tensorboard import TensorBoardSink
    from anarcho_monitor.thinning import thin
    from anarcho_monitor.throughput import Throughput, peak_flops

__all__ = [
    "Attempt",
    "Curve",
    "EarlyStopping",
    "Mark",
    "MemoryReading",
    "MetricSink",
    "MetricsLog",
    "MetricsTail",
    "MonitorConfig",
    "MonitorError",
    "Point",
    "Progress",
    "RunHistory",
    "Sinks",
    "SystemMemory",
    "TensorBoardSink",
    "Throughput",
    "next_attempt",
    "peak_flops",
    "read_curve",
    "read_memory",
    "read_metrics",
    "read_system_memory",
    "superseded",
    "surviving_records",
    "thin",
]

_HOMES = {
    "config": ("MonitorConfig",),
    "early_stopping": ("EarlyStopping",),
    "errors": ("MonitorError",),
    "history": (
        "Attempt",
        "Curve",
        "Mark",
        "RunHistory",
    ),
    "memory": (
        "MemoryReading",
        "SystemMemory",
        "read_memory",
        "read_system_memory",
    ),
    "metrics": (
        "MetricsLog",
        "Point",
        "next_attempt",
        "read_curve",
        "read_metrics",
        "superseded",
        "surviving_records",
    ),
    "progress": ("Progress",),
    "sinks": (
        "MetricSink",
        "Sinks",
    ),
    "tail": ("MetricsTail",),
    "tensorboard": ("TensorBoardSink",),
    "thinning": ("thin",),
    "throughput": (
        "Throughput",
        "peak_flops",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
