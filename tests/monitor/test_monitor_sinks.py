"""The fan-out and the TensorBoard sink, read back by TensorBoard itself."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from anarcho_monitor import MetricSink, MetricsLog, MonitorError, Progress, Sinks, TensorBoardSink
from anarcho_monitor.tensorboard import tag_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


class Recorder:
    def __init__(self) -> None:
        self.records: list[tuple] = []
        self.closed = 0

    def write(self, kind: str, *, step: int, tokens: int, **values: object) -> None:
        self.records.append((kind, step, tokens, values))

    def close(self) -> None:
        self.closed += 1


class FullDiskSink(Recorder):
    full = True

    def write(self, kind: str, *, step: int, tokens: int, **values: object) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        super().write(kind, step=step, tokens=tokens, **values)


def read_back(directory: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return accumulator


def scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read_back(directory).Scalars(tag)]


def text(directory: Path, tag: str) -> str:
    return read_back(directory).Tensors(tag)[-1].tensor_proto.string_val[0].decode()


def test_every_sink_gets_every_record_and_is_closed() -> None:
    first, second = Recorder(), Recorder()
    sinks = Sinks([first, second])
    sinks.write("train", step=1, tokens=2, loss=3.0)
    sinks.close()
    assert first.records == second.records == [("train", 1, 2, {"loss": 3.0})]
    assert (first.closed, second.closed) == (1, 1)


def test_a_full_disk_costs_one_sink_its_records_is_told_once_and_heals() -> None:
    broken, healthy = FullDiskSink(), Recorder()
    reports: list[str] = []
    sinks = Sinks([broken, healthy], report=reports.append)
    for step in range(3):
        sinks.write("train", step=step, tokens=0)
    broken.full = False
    sinks.write("train", step=3, tokens=0)
    assert [record[1] for record in healthy.records] == [0, 1, 2, 3]
    assert [record[1] for record in broken.records] == [3]
    assert len(reports) == 1
    assert "FullDiskSink" in reports[0]
    assert "No space left" in reports[0]


def test_a_mistake_in_a_sink_is_not_swallowed() -> None:
    class Wrong(Recorder):
        def write(self, kind: str, *, step: int, tokens: int, **values: object) -> None:
            raise KeyError(kind)

    with pytest.raises(KeyError):
        Sinks([Wrong()]).write("train", step=1, tokens=1)


def test_all_sinks_of_the_package_satisfy_the_protocol(tmp_path: Path) -> None:
    log, board = MetricsLog(tmp_path / "metrics.jsonl", run="r", attempt=1), TensorBoardSink(tmp_path / "tensorboard")
    for sink in (log, board, Progress(1, tokens_per_step=1), Sinks([])):
        assert isinstance(sink, MetricSink)
        sink.close()
        sink.close()


@pytest.mark.parametrize(
    ("kind", "name", "tag"),
    [
        ("train", "loss", "train/loss"),
        ("train", "grad_norm", "train/grad_norm"),
        ("train", "lr_muon", "learning_rate/muon"),
        ("train", "update_ratio_adamw", "update_ratio/adamw"),
        ("train", "tokens_per_second", "throughput/tokens_per_second"),
        ("train", "process_bytes", "memory/process_GiB"),
        ("validation", "loss", "validation/loss"),
        ("validation", "bits_per_byte", "validation/bits_per_byte"),
        ("sample", "text", "sample/text"),
    ],
)
def test_tags_are_sorted_into_readable_groups(kind: str, name: str, tag: str) -> None:
    assert tag_of(kind, name) == tag


def test_tensorboard_reads_scalars_with_steps_values_and_units(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for step in (10, 20):
        sink.write("train", step=step, tokens=step * 10, loss=step / 4, lr_muon=0.5, process_bytes=3 * 2**30, note=None)
    sink.write("validation", step=20, tokens=200, bits_per_byte=1.25)
    sink.close()
    assert scalars(tmp_path, "train/loss") == [(10, 2.5), (20, 5.0)]
    assert scalars(tmp_path, "memory/process_GiB") == [(10, 3.0), (20, 3.0)]
    assert scalars(tmp_path, "validation/bits_per_byte") == [(20, 1.25)]
    assert set(read_back(tmp_path).Tags()["scalars"]) == {
        "train/loss",
        "learning_rate/muon",
        "memory/process_GiB",
        "validation/bits_per_byte",
    }


def test_tensorboard_shows_a_record_before_the_sink_is_closed(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.write("train", step=1, tokens=1, loss=2.0)
    assert scalars(tmp_path, "train/loss") == [(1, 2.0)]
    sink.close()


def test_tensorboard_shows_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.write("train", step=1, tokens=1, loss=math.nan)
    sink.close()
    ((step, value),) = scalars(tmp_path, "train/loss")
    assert step == 1
    assert math.isnan(value)


def test_tensorboard_shows_text_literally_and_the_start_as_a_list(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.write("start", step=0, tokens=0, parameters=12)
    sink.write("sample", step=5, tokens=50, text="# Call me\n<b>Ishmael\ud800")
    sink.close()
    assert text(tmp_path, "sample/text") == "    # Call me\n    <b>Ishmael?"
    assert text(tmp_path, "run/start") == "* step: `0`\n* tokens: `0`\n* parameters: `12`"


def test_a_resumed_run_replaces_the_steps_that_it_does_again(tmp_path: Path) -> None:
    first = TensorBoardSink(tmp_path)
    first.write("start", step=0, tokens=0)
    for step in (10, 20, 30):
        first.write("train", step=step, tokens=0, loss=1.0)
    first.close()
    second = TensorBoardSink(tmp_path)
    second.write("start", step=20, tokens=0)
    second.write("train", step=40, tokens=0, loss=2.0)
    second.close()
    assert scalars(tmp_path, "train/loss") == [(10, 1.0), (20, 1.0), (40, 2.0)]


def test_purge_step_hides_that_step_and_later_ones(tmp_path: Path) -> None:
    first = TensorBoardSink(tmp_path)
    for step in (10, 20, 30):
        first.write("train", step=step, tokens=0, loss=1.0)
    first.close()
    TensorBoardSink(tmp_path, purge_step=20).close()
    assert scalars(tmp_path, "train/loss") == [(10, 1.0)]


def test_neither_torch_nor_tensorflow_nor_mlx_is_loaded(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "sys.modules['tensorflow'] = None  # an import of it would raise\n"
        "from anarcho_monitor import TensorBoardSink\n"
        "assert 'tensorboard' not in sys.modules and 'rich' not in sys.modules\n"
        "sink = TensorBoardSink(sys.argv[1])\n"
        "sink.write('train', step=1, tokens=1, loss=1.0)\n"
        "sink.close()\n"
        "assert not {'torch', 'mlx'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60)
    assert scalars(tmp_path, "train/loss") == [(1, 1.0)]


def test_a_missing_tensorboard_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    with pytest.raises(MonitorError, match=r"anarcho-monitor\[tensorboard\]"):
        TensorBoardSink(tmp_path)
