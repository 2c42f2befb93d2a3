"""metrics.jsonl: strict lines, crashes at any byte, attempts that redo steps."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from anarcho_monitor import MetricsLog, MonitorError, Point, next_attempt, read_curve, read_metrics
from hypothesis import given
from hypothesis import strategies as st


def refuse_constant(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


def strict_lines(path: Path) -> list[dict]:
    return [json.loads(line, parse_constant=refuse_constant) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def test_a_record_holds_the_fields_of_the_format_and_the_values(path: Path) -> None:
    log = MetricsLog(path, run="moby", attempt=3)
    log.write("train", step=7, tokens=700, loss=2.5, note=None, ok=True)
    log.close()
    (record,) = strict_lines(path)
    assert record.pop("t_wall") > 1.6e9
    assert record.pop("t_mono") >= 0
    assert record == {
        "v": 1,
        "run": "moby",
        "attempt": 3,
        "step": 7,
        "tokens": 700,
        "kind": "train",
        "loss": 2.5,
        "note": None,
        "ok": True,
    }


def test_a_line_is_in_the_file_as_soon_as_write_returns(path: Path) -> None:
    log = MetricsLog(path, run="r", attempt=1)
    for step in range(3):
        log.write("train", step=step, tokens=0)
        assert len(strict_lines(path)) == step + 1
    log.close()


def test_a_killed_process_leaves_every_record_that_it_had_written(path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from anarcho_monitor import MetricsLog\n"
        "log = MetricsLog(sys.argv[1], run='r', attempt=1)\n"
        "for step in range(5): log.write('train', step=step, tokens=step)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    finished = subprocess.run([sys.executable, "-c", program, str(path)], check=False, timeout=60)
    assert finished.returncode == -signal.SIGKILL
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_stay_strict_json_and_come_back_as_numbers(path: Path, value: float) -> None:
    log = MetricsLog(path, run="r", attempt=1)
    log.write("train", step=1, tokens=10, loss=value, nested={"a": [value]})
    log.close()
    assert isinstance(strict_lines(path)[0]["nested"]["a"][0], str)
    (point,) = read_curve(path, "train", "loss")
    assert point.value == value or (math.isnan(point.value) and math.isnan(value))


def test_scalars_of_torch_and_unknown_objects_are_written_as_numbers_and_text(path: Path) -> None:
    log = MetricsLog(path, run="r", attempt=1)
    log.write("train", step=1, tokens=10, loss=torch.tensor(1.5), half=torch.tensor(0.5, dtype=torch.bfloat16))
    log.write("train", step=2, tokens=20, loss=torch.tensor(float("nan")), path=Path("a/b"), odd=Decimal("1.5"))
    log.close()
    first, second = strict_lines(path)
    assert (first["loss"], first["half"]) == (1.5, 0.5)
    assert (second["loss"], second["path"], second["odd"]) == ("NaN", "a/b", "1.5")


@given(text=st.text(st.characters(), max_size=40))
def test_any_text_keeps_one_record_on_one_line(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "metrics.jsonl"
    log = MetricsLog(path, run="r", attempt=1)
    log.write("sample", step=1, tokens=1, text=text)
    log.write("end", step=1, tokens=1)
    log.close()
    first, last = read_metrics(path)
    assert last["kind"] == "end"
    surrogates = any("\ud800" <= char <= "\udfff" for char in text)
    assert first["text"] == text or surrogates


@pytest.mark.parametrize("name", ["v", "run", "attempt", "t_wall", "t_mono"])
def test_the_formats_own_fields_cannot_be_overwritten(path: Path, name: str) -> None:
    log = MetricsLog(path, run="r", attempt=1)
    with pytest.raises(MonitorError, match=f"'{name}'"):
        log.write("train", step=1, tokens=1, **{name: 5})
    log.close()


def test_a_file_cut_at_any_byte_is_readable_and_can_be_continued(path: Path, tmp_path: Path) -> None:
    log = MetricsLog(path, run="r", attempt=1)
    for step in (1, 2):
        log.write("train", step=step, tokens=step, loss=0.5)
    log.close()
    whole = path.read_bytes()
    first_line = whole.index(b"\n") + 1
    for size in range(len(whole) + 1):
        cut = tmp_path / f"cut-{size}.jsonl"
        cut.write_bytes(whole[:size])
        # A record without its newline is whole all the same.
        survivors = (size >= first_line - 1) + (size >= len(whole) - 1)
        assert len(read_metrics(cut)) == survivors
        log = MetricsLog(cut, run="r", attempt=2)
        log.write("train", step=9, tokens=9, loss=0.25)
        log.close()
        records = read_metrics(cut)
        assert len(records) == survivors + 1
        assert records[-1]["step"] == 9


class FullDisk:
    """A file that takes `room` bytes more, as a disk does that fills up."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def close(self) -> None:
        self.file.close()


def test_after_a_full_disk_the_next_record_starts_on_a_line_of_its_own(path: Path) -> None:
    log = MetricsLog(path, run="r", attempt=1)
    log.write("train", step=1, tokens=1)
    disk = FullDisk(log._file, room=20)
    log._file = disk  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left"):
        log.write("train", step=2, tokens=2)
    disk.room = 10_000
    log.write("train", step=3, tokens=3)
    log.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 3]


def write_attempt(path: Path, steps: list[int], *, restored: int | None, value: float) -> None:
    log = MetricsLog(path, run="r")
    if restored is not None:
        log.write("start", step=restored, tokens=restored * 10)
    for step in steps:
        log.write("train", step=step, tokens=step * 10, loss=value)
    log.close()


def test_a_curve_leaves_out_steps_past_the_restored_checkpoint(path: Path) -> None:
    write_attempt(path, [10, 20, 25, 30], restored=0, value=1.0)
    write_attempt(path, [40], restored=20, value=2.0)
    assert read_curve(path, "train", "loss") == [Point(10, 100, 1.0), Point(20, 200, 1.0), Point(40, 400, 2.0)]


def test_a_second_resume_from_an_older_checkpoint_cuts_all_earlier_attempts(path: Path) -> None:
    write_attempt(path, [10, 20, 30], restored=0, value=1.0)
    write_attempt(path, [30, 40], restored=20, value=2.0)
    write_attempt(path, [30], restored=10, value=3.0)
    assert [(point.step, point.value) for point in read_curve(path, "train", "loss")] == [(10, 1.0), (30, 3.0)]


def test_without_a_start_record_the_first_step_of_an_attempt_is_where_it_takes_over(path: Path) -> None:
    write_attempt(path, [10, 20, 30], restored=None, value=1.0)
    write_attempt(path, [20, 30], restored=None, value=2.0)
    assert [point.value for point in read_curve(path, "train", "loss")] == [1.0, 2.0, 2.0]


def test_a_curve_has_one_point_a_step_and_only_numbers(path: Path) -> None:
    log = MetricsLog(path, run="r", attempt=1)
    for value in (3.0, 2.0, None, "text", True):
        log.write("validation", step=5, tokens=50, loss=value)
    log.write("train", step=5, tokens=50, loss=9.0)
    log.close()
    assert read_curve(path, "validation", "loss") == [Point(5, 50, 2.0)]


def test_attempts_are_counted_from_the_file(path: Path) -> None:
    assert next_attempt(path) == 1
    write_attempt(path, [1], restored=0, value=1.0)
    write_attempt(path, [1], restored=0, value=1.0)
    assert next_attempt(path) == 3


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no metrics file at .*metrics\.jsonl"):
        read_metrics(path)


def test_a_newer_format_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"v": 1}\n{"v": 2}\n')
    with pytest.raises(MonitorError, match="line 2 has format version 2"):
        read_metrics(path)
