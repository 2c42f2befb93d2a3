"""A sink for TensorBoard, written with TensorBoard's own protocol buffers: neither torch nor TensorFlow is loaded.

Notable: the events go through `RecordWriter`, not `EventFileWriter`. The latter asks `tensorboard.compat.tf` for its file
system, which loads TensorFlow where that is installed, and writes on a thread whose errors surface one record late.

Tags are sorted into groups that read well in the left column: train/, validation/, learning_rate/, throughput/, memory/ ...
Memory is shown in GiB. Text (samples, messages) goes to the text dashboard.
"""

from __future__ import annotations

import os
import socket
import time
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from anarcho_monitor.errors import MonitorError
from anarcho_monitor.metrics import number_from_json, to_json

_THROUGHPUT = {"tokens_per_second", "step_seconds", "data_wait_share", "flop_utilisation", "eta_seconds"}
_SUMMARY_KINDS = {"start", "end"}


def tag_of(kind: str, name: str) -> str:
    """The TensorBoard tag of a metric, such as `train/loss` or `learning_rate/matrices`."""
    if kind == "train":
        for prefix, group in (("lr_", "learning_rate"), ("update_ratio_", "update_ratio")):
            if name.startswith(prefix):
                return f"{group}/{name.removeprefix(prefix)}"
        if name in _THROUGHPUT:
            return f"throughput/{name}"
        if name.endswith("_bytes"):
            return f"memory/{name.removesuffix('_bytes')}_GiB"
    if kind == "checkpoint":  # A group of its own would come before the ones that matter.
        return f"throughput/checkpoint_{name}"
    return f"{kind}/{name}"


class TensorBoardSink:
    """Writes one event file to `directory`.

    Data of `purge_step` and later steps from earlier event files is hidden by TensorBoard; a "start" record does the same for
    the steps after its own, so a resumed run needs no `purge_step` where the loop writes "start" with the restored step; and so does any
    record of an earlier step than the one before it, which a run writes that was rolled back.
    """

    def __init__(self, directory: str | os.PathLike[str], *, purge_step: int | None = None) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise MonitorError(
                f"TensorBoard files cannot be written ({error}): install anarcho-monitor[tensorboard] "
                "or set monitor.tensorboard = false."
            ) from error
        self._event, self._summary, self._tensor, self._types = event_pb2, summary_pb2, tensor_pb2, types_pb2
        self._last_step = 0
        self._file = _new_event_file(Path(directory))
        self._writer = RecordWriter(self._file)
        self._add(0, file_version="brain.Event:2")
        if purge_step is not None:
            self._purge(purge_step)

    def write(self, kind: str, *, step: int, tokens: int, **values: Any) -> None:
        """Writes numbers as scalars and text as text; what is neither (None, lists, switches) is for metrics.jsonl alone."""
        if kind == "start":
            self._purge(step + 1)
        elif step < self._last_step:  # An event tells the step that the run went back to, other records one done again.
            self._purge(step + 1 if kind == "event" else step)
        self._last_step = step
        if kind in _SUMMARY_KINDS:
            summary = [self._text(f"run/{kind}", _bullets({"step": step, "tokens": tokens} | values))]
        else:
            summary = [entry for name, value in values.items() if (entry := self._entry(kind, name, value)) is not None]
        if summary:
            self._add(step, summary=self._summary.Summary(value=summary))

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()

    def _entry(self, kind: str, name: str, value: Any) -> Any:
        value = to_json(value)
        tag = tag_of(kind, name)
        number = number_from_json(value)
        if number is not None:
            scale = 2**30 if tag.endswith("_GiB") else 1
            return self._summary.Summary.Value(tag=tag, simple_value=number / scale)
        # Indented text is a literal block in Markdown, so a sample shows as it is, whatever signs a model puts into it.
        return self._text(tag, _literal(value)) if isinstance(value, str) else None

    def _text(self, tag: str, text: str) -> Any:
        plugin = self._summary.SummaryMetadata.PluginData(plugin_name="text")
        data = text.encode("utf-8", errors="replace")
        return self._summary.Summary.Value(
            tag=tag,
            metadata=self._summary.SummaryMetadata(plugin_data=plugin),
            tensor=self._tensor.TensorProto(dtype=self._types.DT_STRING, string_val=[data]),
        )

    def _purge(self, step: int) -> None:
        self._add(step, session_log=self._event.SessionLog(status=self._event.SessionLog.START))

    def _add(self, step: int, **content: Any) -> None:
        self._writer.write(self._event.Event(wall_time=time.time(), step=step, **content).SerializeToString())
        self._writer.flush()


def _new_event_file(directory: Path) -> BinaryIO:
    """A fresh file whose name TensorBoard recognises and sorts by time; `x` keeps two sinks of one second apart."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
    for number in count():
        try:
            return (directory / f"{stem}.{number}").open("xb")
        except FileExistsError:
            continue
    raise AssertionError("count() never ends")


def _literal(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


def _bullets(values: dict[str, Any]) -> str:
    return "\n".join(f"* {name}: `{to_json(value)}`" for name, value in values.items())
