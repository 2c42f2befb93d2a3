"""A run read back from its records: what remains of it, what was done again, what happened; and long curves made short."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from anarcho_monitor import MetricsLog, MonitorError, Point, RunHistory, TensorBoardSink, surviving_records, thin
from anarcho_monitor.history import mark_kind
from anarcho_monitor.metrics import number_from_json
from anarcho_monitor.tensorboard import tag_of
from hypothesis import given
from hypothesis import strategies as st


def record(kind: str, step: int, *, attempt: int = 1, t: float = 0.0, **values: Any) -> dict[str, Any]:
    own = {"v": 1, "run": "r", "attempt": attempt, "t_wall": 1e9 + t, "t_mono": t}
    return own | {"kind": kind, "step": step, "tokens": 10 * step} | values


KILLED_AND_RESUMED = [
    record("start", 0, device="cpu"),
    *(record("train", step, t=step, loss=9.0 - step) for step in range(1, 7)),
    record("checkpoint", 3, t=3.5, path="step-00000003"),
    record("start", 3, attempt=2, t=100),
    *(record("train", step, attempt=2, t=100 + step, loss=19.0 - step) for step in (4, 5, 6, 7)),
    record("end", 7, attempt=2, t=110),
]
KILLED_AND_RESUMED.insert(4, KILLED_AND_RESUMED.pop(7))  # The checkpoint, at its place in time.


def test_what_was_done_again_is_kept_apart_from_what_remains() -> None:
    curve = RunHistory(KILLED_AND_RESUMED).curve("train", "loss")
    assert [point.step for point in curve.points] == [1, 2, 3, 4, 5, 6, 7]
    assert [point.value for point in curve.points] == [8, 7, 6, 15, 14, 13, 12]
    assert [[point.step for point in stretch] for stretch in curve.abandoned] == [[4, 5, 6]]


def test_stretches_that_were_done_again_at_different_times_stay_apart() -> None:
    steps = [1, 2, 3, 4, 2, 3, 4, 5, 6, 5, 6]  # Back from 4 to 1, and from 6 to 4.
    curve = RunHistory([record("train", step, loss=1.0) for step in steps]).curve("train", "loss")
    assert [[point.step for point in stretch] for stretch in curve.abandoned] == [[2, 3, 4], [5, 6]]


def test_attempts_tell_where_they_began_how_long_they_took_and_whether_they_ended() -> None:
    history = RunHistory(KILLED_AND_RESUMED)
    first, second = history.attempts
    assert (first.first_step, first.last_step, first.seconds, first.ended) == (0, 6, 6.0, False)
    assert (second.first_step, second.last_step, second.seconds, second.ended) == (3, 7, 10.0, True)
    assert first.facts == {"device": "cpu"}
    assert (history.seconds, history.last_step, history.last_tokens) == (16.0, 7, 70)
    assert [(mark.step, mark.kind) for mark in history.marks] == [(3, "resume"), (3, "checkpoint")]


@pytest.mark.parametrize("kind", ["event", "start", "train"])
def test_a_run_that_rolls_back_within_an_attempt_supersedes_its_own_steps(kind: str) -> None:
    again = 3 if kind == "train" else 2  # An event or a start tells the step that was restored.
    records = [
        *(record("train", step, loss=1.0) for step in range(1, 6)),
        record(kind, again, message="rolled back to step 2", loss=2.0),
        *(record("train", step, loss=2.0) for step in range(again + 1, 5)),
    ]
    curve = RunHistory(records).curve("train", "loss")
    assert [(p.step, p.value) for p in curve.points] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    assert [[p.step for p in stretch] for stretch in curve.abandoned] == [[3, 4, 5]]


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 19)), min_size=1, max_size=8))
def test_however_often_a_run_goes_back_each_step_has_the_last_value_and_no_step_comes_twice(legs) -> None:
    """Each leg goes back to a step that was reached and makes some steps from there."""
    truth: dict[int, int] = {}
    records, at = [], 0
    for number, (steps, back) in enumerate(legs):
        begin = min(at, back)
        records.append(record("start", begin, attempt=number + 1))
        truth = {step: value for step, value in truth.items() if step <= begin}
        for step in range(begin + 1, begin + steps + 1):
            records.append(record("train", step, attempt=number + 1, loss=float(number)))
            truth[step] = number
        at = begin + steps
    history = RunHistory(records)
    curve = history.curve("train", "loss")
    assert {point.step: point.value for point in curve.points} == truth
    told = len(curve.points) + sum(map(len, curve.abandoned))
    assert told == sum(entry["kind"] == "train" for entry in records)
    assert history.survivors == surviving_records(records)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("no update at step 7: loss nan", "skip"),
        ("out of memory: micro-batch 8 becomes 4", "micro-batch"),
        ("out of memory in step 3 (x); from now on, 2 sequences go through the model at once", "micro-batch"),
        ("a spike, and an update all the same, at step 7: loss 9 of samples 1 to 8", "spike"),
        ("rolled back from step 50 to step 40 (loss nan); the run goes on with sample 9", "rollback"),
        ("went back from step 50 to step 40, as the update had begun when memory ran out (x)", "rollback"),
        ("killed by the system after step 40", "stop"),
        ("stopped by signal 15; the state is saved", "stop"),
        ("early stopping: the validation loss has not improved for too long", "stop"),
        ("something else", "event"),
    ],
)
def test_events_are_sorted_by_what_they_are_about(message: str, kind: str) -> None:
    assert mark_kind(message) == kind
    (mark,) = RunHistory([record("event", 7, message=message)]).marks
    assert (mark.step, mark.kind, mark.text) == (7, kind, message)


def test_names_are_those_with_numbers_and_the_last_value_is_the_newest() -> None:
    history = RunHistory([record("train", 1, loss=2.0, note="x", lr_a=None), record("train", 2, loss="NaN", lr_a=0.5)])
    assert history.names("train") == ["loss", "lr_a"]
    assert math.isnan(history.last("train", "loss"))
    assert history.last("validation", "loss") is None


values = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(values, min_size=1, max_size=400), st.integers(1, 30), st.integers(1, 5))
def test_thinning_keeps_the_ends_the_extremes_and_the_order(numbers: list[float], buckets: int, gap: int) -> None:
    points = [Point(step * gap, 0, value) for step, value in enumerate(numbers)]
    thinned = thin(points, buckets=buckets)
    assert len(thinned) <= max(2 * buckets, 3 * buckets + 2)
    assert thinned == sorted(thinned, key=lambda point: point.step)
    assert set(map(id, thinned)) <= set(map(id, points))
    assert (thinned[0].step, thinned[-1].step) == (0, points[-1].step)
    finite = [value for value in numbers if math.isfinite(value)]
    if finite:
        kept = [point.value for point in thinned if math.isfinite(point.value)]
        assert (min(kept), max(kept)) == (min(finite), max(finite))
    assert any(not math.isfinite(p.value) for p in thinned) == (len(finite) < len(numbers))


def test_a_spike_of_one_step_among_a_hundred_thousand_is_still_there() -> None:
    points = [Point(step, 0, 2.0) for step in range(100_000)]
    points[54_321] = Point(54_321, 0, 99.0)
    thinned = thin(points, buckets=300)
    assert Point(54_321, 0, 99.0) in thinned
    assert len(thinned) <= 902


def test_short_curves_stay_whole_and_no_buckets_are_refused() -> None:
    points = [Point(step, 0, float(step)) for step in range(10)]
    assert thin(points, buckets=5) == points
    with pytest.raises(MonitorError, match="buckets is 0"):
        thin(points, buckets=0)


def test_tensorboard_tells_every_number_of_every_surviving_record_and_no_other(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def play(attempt: int, first: int, last: int, *, back_to: int | None = None) -> None:
        sinks = [
            MetricsLog(tmp_path / "metrics.jsonl", run="r", attempt=attempt),
            TensorBoardSink(tmp_path / "tensorboard"),
        ]
        for sink in sinks:
            sink.write("start", step=first, tokens=0, device="cpu", parameters=7)
            again = last if back_to is None else back_to
            for number, step in enumerate([*range(first + 1, last + 1), *range(again + 1, last + 3)]):
                if number == last - first and back_to is not None:
                    sink.write("event", step=back_to, tokens=0, message="rolled back", rolled_back_to=back_to)
                values = {"loss": 1 / step + attempt, "lr_a": 1e-3 * step, "update_ratio_a": 0.01, "eta_seconds": 3.5}
                sink.write("train", step=step, tokens=step, **values, process_bytes=step * 2**28, note=None)
            sink.write("validation", step=last + 2, tokens=0, loss=2.5, bits_per_byte=math.inf)
            sink.write("checkpoint", step=last + 2, tokens=0, path="step", seconds=0.25)
            sink.close()

    play(1, 0, 6)
    play(2, 4, 9, back_to=7)
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    shown = {
        (tag, event.step): event.value for tag in accumulator.Tags()["scalars"] for event in accumulator.Scalars(tag)
    }
    for tag in accumulator.Tags()["scalars"]:
        steps = [event.step for event in accumulator.Scalars(tag)]
        assert steps == sorted(set(steps)), tag  # Nothing that was done again is told twice.
    history = RunHistory.read(tmp_path / "metrics.jsonl")
    expected = {}
    for entry in history.survivors:
        for name, value in entry.items():
            number = number_from_json(value)
            if name in ("v", "attempt", "step", "tokens", "t_wall", "t_mono") or number is None:
                continue
            if entry["kind"] in ("train", "validation", "checkpoint", "event"):
                tag = tag_of(entry["kind"], name)
                expected[tag, entry["step"]] = number / 2**30 if tag.endswith("_GiB") else number
    assert shown.keys() == expected.keys()
    assert all(shown[key] == pytest.approx(expected[key], rel=1e-6) for key in expected)
