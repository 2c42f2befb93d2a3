"""What ranks tell each other of their speed: the spread of a step's seconds, and the name of one that always holds up the others."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from anarcho_train import Alone
from anarcho_train.rank_speeds import WINDOW, RankSpeeds, straggler
from hypothesis import given
from hypothesis import strategies as st

from .test_train_ranks import ThreadRanks, loop_of, on_ranks


def seconds(*means: float, noise: float = 0.0, steps: int = WINDOW) -> np.ndarray:
    return np.array(means) * (1 + noise * np.random.default_rng(0).standard_normal((steps, len(means))))


def test_a_rank_that_is_always_slower_by_more_than_a_tenth_is_a_straggler():
    assert straggler(seconds(1.0, 1.2, 1.0, 1.0, noise=0.02)) == 1
    assert straggler(seconds(1.0, 1.2, noise=0.02)) == 1


@pytest.mark.parametrize("size", [2, 3, 8])
def test_ranks_alike_and_little_differences_name_nobody(size):
    assert straggler(seconds(*[1.0] * size, noise=0.3)) is None
    assert straggler(seconds(*[1.0] * (size - 1), 1.05)) is None


def test_a_rank_that_is_slow_now_and_then_is_none():
    rows = seconds(1.0, 1.0, 1.0)
    rows[::4, 2] = 9.0
    assert straggler(rows) is None


@given(st.lists(st.floats(0.5, 2.0), min_size=2, max_size=6, unique=True), st.integers(0, 5))
def test_who_is_named_does_not_depend_on_the_numbers_of_ranks(means, turn):
    turn %= len(means)
    first, turned = straggler(seconds(*means)), straggler(seconds(*np.roll(means, turn)))
    assert turned == (None if first is None else (first + turn) % len(means))


def test_a_rank_alone_tells_nothing():
    speeds = RankSpeeds()
    with speeds.stepping(Alone()):
        pass
    assert speeds.take([speeds.to_tell()], Alone()) is None
    assert speeds.metrics() == {}


def test_seconds_of_waiting_for_others_are_not_those_of_a_step():
    speeds, ranks = RankSpeeds(), ThreadRanks.__new__(ThreadRanks)
    ranks.waited_seconds = 5.0
    with speeds.reading():
        time.sleep(0.03)
    with speeds.stepping(ranks):
        time.sleep(0.06)
        ranks.waited_seconds += 0.05
    step, data = speeds.to_tell()
    assert 0.0 < step < data
    assert speeds.to_tell() == (0.0, 0.0)


def test_a_slow_rank_shows_in_the_records_and_is_named_once(tmp_path):
    def work(ranks: ThreadRanks) -> Any:
        loop = loop_of(ranks, tmp_path, steps=2 * WINDOW + 3, log_every=10, eval_every=0, checkpoint_every=0)
        if ranks.rank == 2:
            read = loop.batches.batch
            loop.batches.batch = lambda first, count: (time.sleep(0.004), read(first, count))[1]
        gathered = ranks.gathered

        def watched(values: Any) -> Any:
            begin = time.monotonic()
            try:
                return gathered(values)
            finally:
                ranks.waited_seconds += time.monotonic() - begin

        ranks.gathered = watched
        loop.run()
        return loop

    loops = on_ranks(4, work)
    for loop in loops:
        named = [event for event in loop.sink.of("event") if event.get("fault") == "straggler"]
        assert [event["message"].split(" on ")[0] for event in named] == ["rank 2"]
        assert "holds up the others" in named[0]["message"]
    for record in loops[0].sink.of("train")[1:]:
        assert record["slowest_rank"] == 2
        assert record["rank_data_wait_longest"] > 0.004 > record["rank_data_wait_median"]
        assert 0 < record["rank_seconds_fastest"] <= record["rank_seconds_median"] <= record["rank_seconds_slowest"]
