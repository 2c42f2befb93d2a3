"""Metrics, memory, throughput, progress and early stopping for training runs.

The training loop writes records to a `MetricSink`; metrics.jsonl, TensorBoard and the progress display are sinks. Importing
this package loads neither torch nor mlx nor tensorboard: a reading or a sink that needs one loads it when it is made.
"""

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
