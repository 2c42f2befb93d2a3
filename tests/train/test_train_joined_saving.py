"""Checkpoints of which each rank writes a part, here threads of one process: there is one when all parts are, and all ranks know alike."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from anarcho_train import Alone, CheckpointStore, OutOfMemory, RankFailed, RankLost, SaveFailed
from anarcho_train.ranks import texts

from .test_train_ranks import SummingStep, ThreadRanks, loop_of, on_ranks
from .test_train_saving import NO_SPACE

BOTH = pytest.mark.parametrize("aside", [False, True], ids=["here", "aside"])


class PartStep(SummingStep):
    """Each rank writes a file; `fails` is asked before with the number of steps made."""

    in_parts = True

    def __init__(self, ranks: Any, fails: Callable[[int, int], None] = lambda rank, step: None) -> None:
        super().__init__(ranks)
        self.fails = fails

    def save(self, directory: Path) -> None:
        self.snapshot()(directory)

    def snapshot(self) -> Callable[[Path], None]:
        total, step = self.total, len(self.seen)

        def write(directory: Path) -> None:
            self.fails(self.ranks.rank, step)
            (directory / f"total-{self.ranks.rank}").write_text(str(total))

        return write


class WholeStep(PartStep):
    """The first rank writes all."""

    in_parts = False

    def load(self, directory: Path) -> None:
        self.total = float((directory / "total-0").read_text())


def loop_in_parts(
    ranks: Any, directory: Path, *, aside: bool, fails: Any = None, kind: type[PartStep] = PartStep, **settings: Any
) -> Any:
    loop = loop_of(ranks, directory, **settings)
    loop.step = kind(ranks, *([fails] if fails else []))
    loop.background = lambda: aside
    return loop


def no_space_in(rank: int, *steps: int) -> Callable[[int, int], None]:
    def fails(own: int, step: int) -> None:
        if own == rank and step in steps:
            raise NO_SPACE

    return fails


def events(loop: Any) -> list[str]:
    return [event["message"] for event in loop.sink.of("event")]


@BOTH
@pytest.mark.parametrize("size", [2, 4])
def test_a_checkpoint_has_the_part_of_every_rank_and_all_ranks_know_it(tmp_path, size, aside):
    def work(ranks: ThreadRanks) -> Any:
        loop = loop_in_parts(ranks, tmp_path, aside=aside, eval_every=0)
        return loop, loop.run()

    loops, results = zip(*on_ranks(size, work), strict=True)
    store = CheckpointStore(tmp_path)
    assert [(info.step, info.problem) for info in store.list()] == [(3, None), (6, None)]
    names = {path.name for path in store.path(6).iterdir()}
    assert names == {*(f"total-{rank}" for rank in range(size)), "state.json", "manifest.json"}
    assert {result.checkpoint for result in results} == {store.path(6)}
    assert {loop.progress.saved_step for loop in loops} == {6}
    assert len({(store.path(6) / f"total-{rank}").read_text() for rank in range(size)}) == 1
    assert not list(tmp_path.glob(".*")), "nothing is left of the parts"
    assert all(line["seconds"] >= 0 for line in loops[0].sink.of("checkpoint"))


@BOTH
@pytest.mark.parametrize("rank", [0, 1])
def test_a_part_that_cannot_be_written_costs_that_checkpoint_alone_and_all_count_it(tmp_path, rank, aside):
    def work(ranks: ThreadRanks) -> Any:
        loop = loop_in_parts(ranks, tmp_path, aside=aside, fails=no_space_in(rank, 2), checkpoint_every=2, eval_every=0)
        loop.run()
        return loop

    loops = on_ranks(2, work)
    store = CheckpointStore(tmp_path)
    assert [(info.step, info.problem) for info in store.list()] == [(4, None), (6, None)]
    assert len({tuple(events(loop)) for loop in loops}) == 1
    assert (
        f"the checkpoint of step 2 could not be written (in process {rank}: /disk/model.safetensors: no space left on device)"
        in events(loops[0])[0]
    )
    assert not list(tmp_path.glob(".*")), "the space is given back"


@BOTH
def test_too_many_failures_in_a_row_end_all_ranks_and_the_first_says_why(tmp_path, aside):
    def work(ranks: ThreadRanks) -> Any:
        loop_in_parts(
            ranks, tmp_path, aside=aside, fails=no_space_in(1, 1, 2, 3, 4), checkpoint_every=1, eval_every=0
        ).run()

    first, second = on_ranks(2, work)
    assert isinstance(first, SaveFailed)
    assert "3 times in a row (in process 1: /disk/model.safetensors: no space left on device)" in str(first)
    assert isinstance(second, RankFailed)
    assert CheckpointStore(tmp_path).latest_valid() is None


def test_training_goes_on_while_parts_are_written_and_no_checkpoint_is_there_before_the_last_one(tmp_path):
    gate, steps_before = threading.Event(), []

    def work(ranks: ThreadRanks) -> Any:
        def fails(rank: int, step: int) -> None:
            if rank == 1 and step == 2:
                assert gate.wait(20)

        loop = loop_in_parts(ranks, tmp_path, aside=True, fails=fails, checkpoint_every=2, eval_every=0, steps=5)
        train = loop.step.train

        def trained(micro_batches: Any, *, schedule: Any) -> Any:
            if ranks.rank == 1 and schedule.number == 3:
                steps_before.append((schedule.number, CheckpointStore(tmp_path).path(2).exists()))
                gate.set()
            return train(micro_batches, schedule=schedule)

        loop.step.train = trained
        loop.run()
        return loop

    loops = on_ranks(2, work)
    assert steps_before == [(3, False)]
    assert [line["path"][-2:] for line in loops[0].sink.of("checkpoint")] == ["02", "04", "05"]


def test_where_one_rank_has_no_room_for_a_copy_all_write_while_the_training_waits(tmp_path):
    def work(ranks: ThreadRanks) -> Any:
        loop = loop_in_parts(ranks, tmp_path, aside=True, eval_every=0)
        if ranks.rank:

            def snapshot() -> Any:
                raise OutOfMemory("no host memory")

            loop.step.save, loop.step.snapshot = (
                lambda directory: (directory / "total-1").write_text("1") and None,
                snapshot,
            )
        loop.run()
        return loop

    first, second = on_ranks(2, work)
    assert [info.step for info in CheckpointStore(tmp_path).list() if info.valid] == [3, 6]
    assert "no memory for a copy of the state (another process of the run)" in events(first)[0]
    assert "no memory for a copy of the state (no host memory)" in events(second)[0]


def test_a_rank_that_is_lost_at_any_exchange_leaves_sound_checkpoints_alone(tmp_path):
    newest = []
    for lost_after in range(2, 44, 6):
        directory = tmp_path / str(lost_after)

        def work(ranks: ThreadRanks, directory: Path = directory) -> Any:
            loop = loop_in_parts(ranks, directory, aside=True, checkpoint_every=1, eval_every=0)
            loop.inherits = lambda: False
            loop.run()

        on_ranks(2, work, lost_after=lost_after)
        store = CheckpointStore(directory)
        store.sweep()
        assert all(info.valid for info in store.list())
        assert all({"total-0", "total-1"} <= {path.name for path in info.path.iterdir()} for info in store.list())
        newest.append(max((info.step for info in store.list()), default=0))
    assert newest[0] == 0
    assert newest[-1] > 0


def test_ranks_that_are_lost_give_up_the_checkpoint_that_lacks_a_part(tmp_path):
    gate = threading.Event()

    def work(ranks: ThreadRanks) -> Any:
        loop = loop_in_parts(
            ranks,
            tmp_path,
            aside=True,
            fails=lambda rank, step: gate.wait(20) and None,
            checkpoint_every=2,
            eval_every=0,
        )
        train = loop.step.train

        def trained(micro_batches: Any, *, schedule: Any) -> Any:
            if schedule.number == 3:
                threading.Timer(0.2, gate.set).start()
                ranks.leave()
            return train(micro_batches, schedule=schedule)

        loop.step.train = trained
        loop.inherits = lambda: False
        with pytest.raises(RankLost):
            loop.run()
        return loop

    loops = on_ranks(2, work)
    assert [info.step for info in CheckpointStore(tmp_path).list()] == []
    assert not list(tmp_path.glob(".*"))
    assert "before all processes had written their parts" in events(loops[0])[-1]


def test_each_rank_hears_the_text_of_every_other():
    words = ["", "ä word", "x" * 300]
    assert on_ranks(3, lambda ranks: texts(ranks, words[ranks.rank])) == [words] * 3
    assert texts(Alone(), "alone") == ["alone"]


def test_a_kill_at_file_operations_leaves_the_old_or_the_new_checkpoint(tmp_path):
    """One process writes both parts and joins them; it is killed at every third operation in turn."""
    fatal, ended = 0, -signal.SIGKILL
    while ended == -signal.SIGKILL:
        fatal += 3
        store = CheckpointStore(tmp_path / str(fatal), keep_last=1)
        store.save(1, lambda directory: (directory / "total-0").write_text("old") and None, state={})
        child = os.fork()
        if child == 0:
            kill_at(fatal)
            parts = [store.write_part(2, n, lambda directory, n=n: _write_part(directory, n)) for n in (0, 1)]
            store.join_parts(2, parts, state={})
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        latest = store.latest_valid()
        assert latest is not None
        assert latest.name in {"step-00000001", "step-00000002"}
        assert all(info.valid for info in store.list())
        store.sweep()
        assert not list(store.directory.glob(".*"))
    assert ended == 0
    assert latest == store.path(2)
    assert fatal > 20


def _write_part(directory: Path, rank: int) -> None:
    (directory / f"total-{rank}").write_text("new")


def kill_at(operation: int) -> None:
    """Ends this process before its n-th file operation."""
    count = 0

    def counted(function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    for name in ("fsync", "mkdir", "rename", "rmdir", "unlink", "open"):
        setattr(os, name, counted(getattr(os, name)))


def test_a_part_that_is_never_seen_is_told_with_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("anarcho_train.checkpoint.ARRIVAL_SECONDS", 0.05)
    store = CheckpointStore(tmp_path)
    parts = [store.write_part(2, rank, lambda directory, rank=rank: _write_part(directory, rank)) for rank in (0, 1)]
    store.discard_part(2, 1)
    with pytest.raises(OSError, match=r"part-00001/total-1 is not seen here with the 3 bytes"):
        store.join_parts(2, parts, state={})
    assert not list(tmp_path.iterdir())


def test_two_processes_that_write_one_name_are_refused(tmp_path):
    store = CheckpointStore(tmp_path)
    parts = [store.write_part(2, rank, lambda directory: _write_part(directory, 0)) for rank in (0, 1)]
    with pytest.raises(OSError, match="has the name of another process's file"):
        store.join_parts(2, parts, state={})
    assert store.list() == []


def test_a_rank_that_finds_no_memory_in_its_evaluation_saves_nothing_without_the_others(tmp_path):
    def work(ranks: ThreadRanks) -> Any:
        loop = loop_in_parts(ranks, tmp_path, aside=False, eval_every=1, micro_batch=1, checkpoint_every=0)
        if ranks.rank == 1:

            def evaluate(batch: Any) -> Any:
                ranks.leave()
                raise OutOfMemory("too small")

            loop.step.evaluate = evaluate
        loop.inherits = lambda: False
        loop.run()

    first, second = on_ranks(2, work)
    assert isinstance(first, RankLost)
    assert isinstance(second, OutOfMemory)
    assert "even with the smallest micro-batch" in str(second)


def test_what_the_first_rank_writes_beside_the_training_is_known_to_all(tmp_path):
    def work(ranks: ThreadRanks) -> Any:
        fails = no_space_in(0, 4)
        loop = loop_in_parts(ranks, tmp_path, aside=True, fails=fails, kind=WholeStep, checkpoint_every=2, eval_every=0)
        return loop, loop.run()

    loops, results = zip(*on_ranks(4, work), strict=True)
    store = CheckpointStore(tmp_path)
    assert [(info.step, info.problem) for info in store.list()] == [(2, None), (6, None)]
    assert [path.name for path in store.path(6).glob("total-*")] == ["total-0"]
    assert {loop.progress.saved_step for loop in loops} == {6}
    assert {result.checkpoint for result in results} == {store.path(6)}
    assert len({tuple(events(loop)) for loop in loops}) == 1


@pytest.mark.parametrize("survivor", [0, 1], ids=["the writer", "another"])
@pytest.mark.parametrize("written", [False, True], ids=["before it is written", "after"])
def test_who_outlives_a_write_beside_the_training_leaves_the_last_step(tmp_path, survivor, written):
    """The other rank is lost in its third step, while the checkpoint of the second one is written, or some time after it."""
    made, gate, done = threading.Event(), threading.Event(), threading.Event()

    def work(ranks: ThreadRanks) -> Any:
        def fails(rank: int, step: int) -> None:
            if step == 2:
                assert gate.wait(20)

        loop = loop_in_parts(ranks, tmp_path, aside=True, fails=fails, kind=WholeStep, checkpoint_every=2, eval_every=0)
        train = loop.step.train

        def trained(micro_batches: Any, *, schedule: Any) -> Any:
            metrics = train(micro_batches, schedule=schedule)
            if schedule.number == (4 if written else 2):
                if ranks.rank != survivor:
                    assert made.wait(20)
                    gate.set()
                    ranks.leave()
                    done.set()
                    raise RuntimeError("dead")
                made.set()
                assert done.wait(20)
            elif written and schedule.number == 2:
                gate.set()
            return metrics

        def gone(*arguments: Any, **named: Any) -> Any:
            raise OSError("dead")

        if survivor and not written and ranks.rank == 0:
            loop.checkpoints.join_parts = gone  # With the process, its thread is dead.
        loop.step.train = trained
        with contextlib.suppress(RankLost, RuntimeError):
            loop.run()
        return loop

    loop = on_ranks(2, work)[survivor]
    last = 5 if written else 3
    store = CheckpointStore(tmp_path)
    assert all(info.valid for info in store.list())
    assert max(info.step for info in store.list()) == last
    assert loop.progress.saved_step == last
    assert f"the state after step {last} is saved" in events(loop)[-1]
