"""Early stopping, the best value, their state, and the settings of the package."""

from __future__ import annotations

import json
import math

import pytest
from anarcho_monitor import EarlyStopping, MonitorConfig, MonitorError
from hypothesis import given
from hypothesis import strategies as st

VALUES = st.lists(st.one_of(st.floats(0, 10), st.just(math.nan)), max_size=30)


def feed(stopping: EarlyStopping, values: list[float], first: int = 0) -> list[bool]:
    return [stopping.update(value, step) for step, value in enumerate(values, start=first)]


def test_it_stops_after_patience_updates_without_gain() -> None:
    stopping = EarlyStopping(patience=2)
    assert feed(stopping, [3.0, 2.0, 2.5, 2.0, 1.0]) == [False, False, False, True, False]
    assert (stopping.best_value, stopping.best_step) == (1.0, 4)


def test_patience_zero_never_stops_but_tracks_the_best() -> None:
    stopping = EarlyStopping(patience=0)
    assert not any(feed(stopping, [1.0, 2.0, 0.5, *[3.0] * 50]))
    assert (stopping.best_value, stopping.best_step) == (0.5, 2)


def test_small_gains_move_the_best_but_not_the_patience() -> None:
    stopping = EarlyStopping(patience=3, min_delta=0.5)
    assert feed(stopping, [2.0, 1.9, 1.8, 1.7]) == [False, False, False, True]
    assert (stopping.best_value, stopping.best_step) == (1.7, 3)


def test_small_gains_that_add_up_are_a_gain() -> None:
    stopping = EarlyStopping(patience=2, min_delta=0.5)
    assert not any(feed(stopping, [2.0, 1.7, 1.4, 1.1, 0.8, 0.5]))


def test_nan_is_never_the_best_and_uses_up_patience() -> None:
    stopping = EarlyStopping(patience=2)
    assert feed(stopping, [math.nan, 1.0, math.nan, math.nan]) == [False, False, False, True]
    assert (stopping.best_value, stopping.best_step) == (1.0, 1)


@given(values=VALUES, cut=st.integers(0, 30), patience=st.integers(0, 4), min_delta=st.sampled_from([0.0, 0.1, 1.0]))
def test_a_restored_state_decides_like_the_uninterrupted_one(
    values: list[float], cut: int, patience: int, min_delta: float
) -> None:
    whole = EarlyStopping(patience=patience, min_delta=min_delta)
    decisions = feed(whole, values)
    before = EarlyStopping(patience=patience, min_delta=min_delta)
    feed(before, values[:cut])
    after = EarlyStopping(patience=patience, min_delta=min_delta)
    after.load_state_dict(json.loads(json.dumps(before.state_dict(), allow_nan=False)))
    assert feed(after, values[cut:], first=cut) == decisions[cut:]
    assert after.state_dict() == whole.state_dict()


@given(values=VALUES)
def test_the_best_is_the_first_smallest_value(values: list[float]) -> None:
    stopping = EarlyStopping(patience=1)
    feed(stopping, values)
    finite = [value for value in values if not math.isnan(value)]
    assert stopping.best_value == (min(finite) if finite else None)
    assert stopping.best_step == (values.index(min(finite)) if finite else None)


@pytest.mark.parametrize(
    "settings", [{"patience": -1}, {"patience": 1, "min_delta": -0.1}, {"patience": 1, "min_delta": math.nan}]
)
def test_impossible_patience_is_refused(settings: dict) -> None:
    with pytest.raises(MonitorError, match="raise it"):
        EarlyStopping(**settings)


def test_an_incomplete_state_names_what_it_lacks() -> None:
    with pytest.raises(MonitorError, match="lacks reference, updates_without_gain"):
        EarlyStopping(patience=1).load_state_dict({"best_value": 1.0, "best_step": 2})


@pytest.mark.parametrize(
    ("name", "value"),
    [("progress_seconds", -1.0), ("progress_seconds", math.nan), ("peak_flops", 0.0)],
)
def test_an_impossible_setting_is_refused_by_its_key(name: str, value: float) -> None:
    with pytest.raises(MonitorError, match=rf"monitor\.{name} is"):
        MonitorConfig(**{name: value})


def test_settings_are_frozen_and_keyword_only() -> None:
    with pytest.raises(AttributeError):
        MonitorConfig().progress_seconds = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        MonitorConfig(5)  # type: ignore[misc]
