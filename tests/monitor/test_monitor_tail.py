"""A growing metrics file read by another process: every record once, whatever the moment of reading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from anarcho_monitor import MetricsLog, MetricsTail, MonitorError, read_metrics
from hypothesis import given
from hypothesis import strategies as st


def lines(count: int) -> bytes:
    return b"".join(
        json.dumps({"v": 1, "attempt": 1, "step": step, "kind": "train", "text": "naïve"}).encode() + b"\n"
        for step in range(count)
    )


@given(st.lists(st.integers(1, 90), min_size=1, max_size=30))
def test_however_the_bytes_arrive_each_record_comes_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    path = tmp_path_factory.mktemp("tail") / "metrics.jsonl"
    tail, whole, seen = MetricsTail(path), lines(20), []
    assert tail.poll() == []
    with path.open("ab", buffering=0) as file:
        for size in sizes:
            part, whole = whole[:size], whole[size:]
            file.write(part)
            seen += tail.poll()
    assert [record["step"] for record in seen] == list(range(len(seen)))
    assert seen == read_metrics(path)[: len(seen)]
    assert len(seen) == path.read_bytes().count(b"\n")


def test_a_torn_line_that_the_next_attempt_ends_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log, tail = MetricsLog(path, run="r", attempt=1), MetricsTail(path)
    log.write("train", step=1, tokens=1)
    log.close()
    with path.open("ab") as file:
        file.write(b'{"v":1,"run":"r","att')
    assert [record["step"] for record in tail.poll()] == [1]
    again = MetricsLog(path, run="r")
    again.write("start", step=1, tokens=1)
    assert [(record["attempt"], record["kind"]) for record in tail.poll()] == [(2, "start")]
    again.close()


def test_a_file_in_the_place_of_the_one_before_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(5))
    tail = MetricsTail(path)
    assert len(tail.poll()) == 5
    other = tmp_path / "other"
    other.write_bytes(lines(7))
    other.replace(path)
    assert (len(tail.poll()), tail.generation) == (7, 1)
    path.write_bytes(lines(2))
    assert (len(tail.poll()), tail.generation) == (2, 2)
    path.unlink()
    assert tail.poll() == []


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"v": 2, "anything": 1}\n')
    with pytest.raises(MonitorError, match=r"metrics\.jsonl has format version 2"):
        MetricsTail(tmp_path / "metrics.jsonl").poll()
