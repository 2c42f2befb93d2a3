"""The loop over several processes, here threads of one: the same samples, sums and decisions as alone, and one that outlives another."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anarcho_train import (
    Alone,
    CheckpointStore,
    Loop,
    LossSum,
    RankFailed,
    RankLost,
    RanksDiffer,
    StepMetrics,
    StepSchedule,
    TrainConfig,
    after_first,
    require_equal,
    told,
)
from anarcho_train.ranks import Turn
from hypothesis import given
from hypothesis import strategies as st

from .conftest import LENGTH, CountingText, Patience, Record


class Exchange:
    """One in which the threads of a test tell each other their numbers."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=20)
        self.values: list[Sequence[float]] = [()] * size


class Exchanges:
    """All of a test, by number; those before a rank is lost are whole for everyone, however late a thread comes to see it."""

    def __init__(self, size: int) -> None:
        self.size, self._lost_at, self._lock = size, math.inf, threading.Lock()
        self._made: dict[int, Exchange] = {}

    def __getitem__(self, number: int) -> Exchange:
        with self._lock:
            exchange = self._made.setdefault(number, Exchange(self.size))
            if number >= self._lost_at:
                exchange.barrier.abort()
            return exchange

    def lose(self, number: int) -> None:
        """This one and all later ones fail."""
        with self._lock:
            self._lost_at = min(self._lost_at, number)
            for made, exchange in self._made.items():
                if made >= number:
                    exchange.barrier.abort()


class ThreadRanks:
    """`Ranks` of one thread; after ``lost_after`` exchanges it is gone for all."""

    def __init__(self, made: Exchanges, rank: int, *, lost_after: int | None = None) -> None:
        self.made, self.rank, self.size = made, rank, made.size
        self.exchanges, self.lost_after, self.waited_seconds = 0, lost_after, 0.0

    def gathered(self, values: Sequence[float]) -> np.ndarray:
        if self.exchanges == self.lost_after:
            self.leave()
        exchange = self.made[self.exchanges]
        self.exchanges += 1
        exchange.values[self.rank] = values
        try:
            exchange.barrier.wait()
        except threading.BrokenBarrierError:
            raise RankLost("another process of this run was lost") from None
        return np.array(exchange.values, dtype=np.float64)

    def leave(self) -> None:
        """What the end of this process does to the others."""
        self.made.lose(self.exchanges)


def on_ranks(size: int, work: Callable[[ThreadRanks], Any], *, lost_after: int | None = None) -> list[Any]:
    """What ``work`` returns on each rank, or the exception that it ends with; rank 0 is lost after so many exchanges."""
    made, results = Exchanges(size), [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadRanks(made, rank, lost_after=lost_after if rank == 0 else None))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class SummingStep:
    """A model of one number: the sum of all tokens that it was trained on, by all ranks."""

    def __init__(self, ranks: Any) -> None:
        self.ranks, self.total, self.seen = ranks, 0.0, []

    def train(self, micro_batches: Sequence[Any], *, schedule: StepSchedule) -> StepMetrics:
        self.seen.append([row.tolist() for batch in micro_batches for row in batch.tokens])
        own = [sum(float(batch.tokens.sum()) for batch in micro_batches), sum(len(b.tokens) for b in micro_batches)]
        total, weight = self.ranks.gathered(own).sum(axis=0)
        self.total += total
        return StepMetrics(loss=total / weight, weight=weight, grad_norm=1.0)

    in_parts = False

    def evaluate(self, batch: Any) -> LossSum:
        return LossSum(loss=self.total + float(batch.tokens.sum()), weight=float(batch.weights.sum()))

    def save(self, directory: Path) -> None:
        (directory / "total").write_text(str(self.total))

    def load(self, directory: Path) -> None:
        self.total = float((directory / "total").read_text())

    def restart(self) -> None:
        self.total = 0.0


def loop_of(ranks: Any, directory: Path, *, text: CountingText | None = None, **settings: Any) -> Loop:
    given = {"steps": 6, "batch_tokens": 8 * LENGTH, "micro_batch": 4, "eval_every": 2, "checkpoint_every": 3}
    return Loop(
        step=SummingStep(ranks),
        batches=text or CountingText(),
        validation=CountingText(),
        schedule=lambda number: StepSchedule(lr_scale=1.0, number=number),
        config=TrainConfig(**{**given, "log_every": 1, "eval_tokens": None} | settings),
        sequence_length=LENGTH,
        checkpoints=CheckpointStore(directory),
        sink=Record(),
        early_stopping=Patience(0),
        ranks=ranks,
    )


def without_speeds(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not name.startswith("rank_") and name != "slowest_rank"}


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_see_the_samples_of_one_in_its_order_and_measure_what_it_does(tmp_path, size):
    alone = loop_of(Alone(), tmp_path / "alone", micro_batch=2)
    expected = alone.run()

    def work(ranks: ThreadRanks) -> tuple[Loop, Any]:
        loop = loop_of(ranks, tmp_path / "shared", micro_batch=2)
        return loop, loop.run()

    loops, results = zip(*on_ranks(size, work), strict=True)
    for step, rows in enumerate(alone.step.seen):
        assert [row for loop in loops for row in loop.step.seen[step]] == rows
    for loop, result in zip(loops, results, strict=True):
        assert result == replace(expected, checkpoint=result.checkpoint)
        assert loop.step.total == alone.step.total
    for kind in ("train", "validation"):
        assert [without_speeds(line) for line in loops[0].sink.of(kind)] == alone.sink.of(kind)
    assert (tmp_path / "shared" / "step-00000006" / "total").read_text() == str(alone.step.total)


def test_only_the_first_rank_writes_checkpoints(tmp_path):
    def work(ranks: ThreadRanks) -> None:
        loop_of(ranks, tmp_path / str(ranks.rank)).run()

    assert on_ranks(2, work) == [None, None]
    assert (tmp_path / "0" / "step-00000006").is_dir()
    assert not (tmp_path / "1").exists()


def test_a_micro_batch_that_a_rank_has_no_samples_for_is_cut_down_to_its_share(tmp_path):
    loops = on_ranks(4, lambda ranks: loop_of(ranks, tmp_path, micro_batch=8))
    assert {loop.micro_batch for loop in loops} == {"2 of 2 sequences"}


def test_a_number_of_ranks_that_does_not_divide_the_samples_is_refused_with_one_that_does(tmp_path):
    for error in on_ranks(3, lambda ranks: loop_of(ranks, tmp_path)):
        assert isinstance(error, RanksDiffer)
        assert "8 samples, which 3 processes cannot share evenly; start 2 of them" in str(error)


def test_fewer_validation_batches_than_ranks_are_measured_all_the_same(tmp_path):
    def work(ranks: Any) -> float:
        return (
            loop_of(ranks, tmp_path / str(ranks.size), steps=1, eval_tokens=LENGTH, micro_batch=2).run().validation_loss
        )

    assert len(set(on_ranks(4, work))) == 1
    assert on_ranks(4, work)[3] == work(Alone())


class Waiting(CountingText):
    """A text whose samples are there when they are asked for the third time, or never."""

    def __init__(self, states: Sequence[str]) -> None:
        super().__init__()
        self.states = [*states]

    def state(self, first_sample: int, count: int) -> Any:
        state = self.states.pop(0) if self.states else "ready"
        if state == "broken":
            raise ValueError("this shard is damaged")
        return state


def test_all_wait_for_the_rank_whose_samples_are_not_there_yet(tmp_path):
    texts = [Waiting([]), Waiting(["waiting", "waiting"])]
    results = on_ranks(2, lambda ranks: loop_of(ranks, tmp_path, text=texts[ranks.rank]).run().step)
    assert results == [6, 6]


def test_data_that_ends_for_one_rank_ends_the_run_of_all_at_the_same_step(tmp_path):
    texts = [Waiting([]), Waiting(["ready", "ready", "ended"])]
    results = on_ranks(2, lambda ranks: loop_of(ranks, tmp_path, text=texts[ranks.rank], eval_every=0).run())
    assert [result.step for result in results] == [2, 2]
    assert CheckpointStore(tmp_path).read_state(tmp_path / "step-00000002")["finished"]


def test_data_that_fails_on_one_rank_ends_the_others_after_the_state_is_saved(tmp_path):
    texts = [Waiting([]), Waiting(["ready", "broken"])]
    first, second = on_ranks(2, lambda ranks: loop_of(ranks, tmp_path, text=texts[ranks.rank], eval_every=0).run())
    assert isinstance(first, RankFailed)
    assert str(second) == "this shard is damaged"
    assert (tmp_path / "step-00000001").is_dir()


def test_a_signal_that_one_rank_has_received_and_the_least_ready_state_hold_for_all():
    said = [{"stop": None, "state": "ready", "tokens": 5}, {"stop": 15, "state": "waiting", "tokens": 7}]
    turns = on_ranks(2, lambda ranks: Turn.agreed(ranks, **said[ranks.rank]))
    assert turns == [Turn(stop=15, state="waiting", tokens=12)] * 2


def lost_run(tmp_path: Path, *, lost_after: int, inherits: bool = True, **settings: Any) -> list[Any]:
    """The loops of two ranks, rank 0 of which loses the other; only rank 1 may write."""

    def work(ranks: ThreadRanks) -> Loop:
        loop = loop_of(ranks, tmp_path, **{"eval_every": 0, "checkpoint_every": 0, **settings})
        loop.inherits = lambda: inherits and ranks.rank == 1
        with pytest.raises(RankLost):
            loop.run()
        return loop

    return on_ranks(2, work, lost_after=lost_after)


def test_who_outlives_the_first_rank_saves_the_last_finished_step(tmp_path):
    _, heir = lost_run(tmp_path, lost_after=5)  # Two exchanges a step: the third step was begun.
    store = CheckpointStore(tmp_path)
    assert [info.step for info in store.list()] == [2]
    resumed = loop_of(Alone(), tmp_path)
    resumed.resume(store.latest_valid())
    whole = loop_of(Alone(), tmp_path / "whole")
    assert resumed.run().tokens == whole.run().tokens
    assert resumed.step.total == whole.step.total
    assert heir.sink.of("event")[-1]["fault"] == "rank"


def test_who_outlives_does_the_evaluation_that_was_due_alone(tmp_path):
    _, heir = lost_run(tmp_path, lost_after=5, eval_every=2)  # The fifth exchange is the evaluation's.
    state = CheckpointStore(tmp_path).read_state(tmp_path / "step-00000002")
    whole = loop_of(Alone(), tmp_path / "whole")
    whole.run()
    assert state["compared_loss"] == pytest.approx(whole.sink.of("validation")[0]["loss"])
    assert heir.early_stopping.best_step == 2


def test_who_outlives_writes_nothing_unless_it_may_or_where_others_have_gone_on(tmp_path):
    lost_run(tmp_path / "refused", lost_after=5, inherits=False)
    assert not (tmp_path / "refused").exists()
    CheckpointStore(tmp_path / "moved").save(4, lambda directory: None, state={})
    lost_run(tmp_path / "moved", lost_after=5)
    assert [info.step for info in CheckpointStore(tmp_path / "moved").list()] == [4]


def test_ranks_that_differ_are_refused_with_what_differs_and_where():
    def work(ranks: ThreadRanks) -> None:
        require_equal(ranks, {"config": "a", "data": "b" if ranks.rank < 2 else "c"})

    for error in on_ranks(3, work):
        assert isinstance(error, RanksDiffer)
        assert "do not agree on: data (rank 0 has another value than rank 2)" in str(error)


def test_ranks_of_versions_that_compare_other_things_are_refused():
    facts = [{"config": "a"}, {"config": "a", "data": "b"}]
    for error in on_ranks(2, lambda ranks: require_equal(ranks, facts[ranks.rank])):
        assert "different versions" in str(error)


@given(st.text(max_size=40))
def test_what_the_first_rank_says_reaches_all_as_it_is(text):
    assert on_ranks(2, lambda ranks: told(ranks, text if ranks.rank == 0 else "other")) == [text, text]


def test_the_others_begin_when_the_first_has_finished_however_long_that_takes():
    order: list[int] = []

    def work(ranks: ThreadRanks) -> int:
        with after_first(ranks, beat_seconds=0.01):
            if ranks.rank == 0:
                threading.Event().wait(0.1)
            order.append(ranks.rank)
        return ranks.exchanges

    exchanges = on_ranks(2, work)
    assert order == [0, 1]
    assert exchanges[0] == exchanges[1] > 2, "the first was heard of meanwhile"


def test_what_the_first_fails_with_is_its_own_and_ends_the_others():
    def work(ranks: ThreadRanks) -> None:
        with after_first(ranks):
            raise OSError("the disk is full")

    first, second = on_ranks(2, work)
    assert str(first) == "the disk is full"
    assert isinstance(second, RankFailed)


def test_who_waits_for_the_first_misses_it_when_it_is_gone():
    def work(ranks: ThreadRanks) -> None:
        with after_first(ranks, beat_seconds=0.01):
            threading.Event().wait(0.2)

    assert all(isinstance(error, RankLost) for error in on_ranks(2, work, lost_after=3))
