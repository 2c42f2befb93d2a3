"""Checkpoints written from a copy while training goes on: the bytes of a direct one, one at a time, and no failure stays unknown."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from anarcho_train import CheckpointStore, OutOfMemory, SaveFailed, StepSchedule
from anarcho_train.checkpointing import Checkpointing

from .conftest import CountingText, run_until
from .test_train_recovery import NOT_A_NUMBER, bits, make_run, mlx_step, torch_step
from .test_train_saving import NO_SPACE


@pytest.fixture(params=[torch_step, mlx_step], ids=["torch", "mlx"])
def make_step(request: pytest.FixtureRequest) -> Any:
    return request.param


def background_run(directory: Path, **options: Any) -> Any:
    run = make_run(directory, faults=options.pop("faults", {}), **options)
    run.loop.background = lambda: True
    return run


def content(directory: Path) -> dict[str, bytes]:
    """The files of a checkpoint but for the time in its manifest."""
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    files["manifest.json"] = json.dumps(json.loads(files["manifest.json"])["files"]).encode()
    return files


def gated(run: Any, opened: threading.Event) -> list[int]:
    """Lets writes begin only when the gate is open; returns the steps of those that have begun."""
    snapshot, begun = run.loop.step.snapshot, []

    def held() -> Any:
        step, write = run.loop.progress.result.step, snapshot()

        def later(directory: Path) -> None:
            begun.append(step)
            assert opened.wait(20)
            write(directory)

        return later

    run.loop.step.snapshot = held
    return begun


def test_a_copy_holds_what_was_there_when_it_was_made_whatever_is_trained_since(make_step, tmp_path):
    step, text = make_step(), CountingText()
    for number in range(3):
        step.train([text.batch(8 * number, 8)], schedule=StepSchedule(lr_scale=1.0, number=number))
    (tmp_path / "now").mkdir()
    step.save(tmp_path / "now")
    write = step.snapshot()
    for number in range(3, 6):
        step.train([text.batch(8 * number, 8)], schedule=StepSchedule(lr_scale=1.0, number=number))
    (tmp_path / "later").mkdir()
    thread = threading.Thread(target=write, args=(tmp_path / "later",))
    thread.start()
    thread.join()
    for path in (tmp_path / "now").iterdir():
        assert (tmp_path / "later" / path.name).read_bytes() == path.read_bytes(), path.name
    again = make_step()
    again.load(tmp_path / "later")
    again.train([text.batch(24, 8)], schedule=StepSchedule(lr_scale=1.0, number=3))
    assert bits(again) != bits(step)


def test_checkpoints_of_a_copy_and_of_the_state_itself_are_the_same_bytes(make_step, tmp_path):
    options = {"keep_last": 20, "checkpoint_every": 1}
    direct = make_run(tmp_path / "direct", faults={}, step=make_step(), **options)
    direct.loop.run()
    aside = background_run(tmp_path / "aside", step=make_step(), **options)
    result = aside.loop.run()
    assert bits(aside.step) == bits(direct.step)
    assert result.checkpoint == aside.store.path(14)
    names = sorted(path.name for path in direct.store.directory.iterdir())
    assert names == sorted(path.name for path in aside.store.directory.iterdir())
    for name in names:
        assert content(direct.store.directory / name) == content(aside.store.directory / name), name
    assert sorted(line["path"] for line in aside.sink.of("checkpoint")) == names


def test_training_goes_on_while_one_copy_is_written_and_the_next_checkpoint_waits_for_it(tmp_path):
    run, gate = background_run(tmp_path, checkpoint_every=3), threading.Event()
    begun, copies = gated(run, gate), []
    snapshot, train = run.loop.step.snapshot, run.loop.step.train
    run.loop.step.snapshot = lambda: (copies.append(run.loop.progress.result.step), snapshot())[1]

    def trained(micro_batches: Any, *, schedule: StepSchedule) -> Any:
        if schedule.number == 5:
            until = time.monotonic() + 30  # A thread may begin late on a busy machine.
            while not begun and time.monotonic() < until:
                time.sleep(0.01)
            assert begun == [3], "the first copy is still being written two steps later"
            assert not run.store.path(3).exists()
            assert not run.sink.of("checkpoint"), "it is no checkpoint before it is on the disk"
            threading.Timer(0.2, gate.set).start()
        if schedule.number == 6:
            assert copies == [3, 6]
            assert run.store.path(3).is_dir(), "the second copy was not made before the first was written"
        return train(micro_batches, schedule=schedule)

    run.loop.step.train = trained
    assert run.loop.run().step == 14
    assert [line["path"] for line in run.sink.of("checkpoint")][-1] == "step-00000014"


def failing(run: Any, steps: set[int]) -> None:
    snapshot = run.loop.step.snapshot

    def copied() -> Any:
        step, write = run.loop.progress.result.step, snapshot()

        def write_some(directory: Path) -> None:
            write(directory)
            if step in steps:
                (directory / "model.safetensors").write_bytes(b"half")
                raise NO_SPACE

        return write_some

    run.loop.step.snapshot = copied


def test_a_failed_write_is_known_before_the_next_checkpoint_and_costs_no_other(tmp_path):
    run = background_run(tmp_path)
    failing(run, {6, 9})
    assert run.loop.run().step == 14
    events = [event for event in run.sink.of("event") if event["fault"] == "save"]
    assert [(event["message"].split(" could")[0], event["failures"]) for event in events] == [
        ("the checkpoint of step 6", 1),
        ("the checkpoint of step 9", 2),
    ]
    assert [info.step for info in run.store.list()] == [12, 14]
    assert not list(run.store.directory.glob(".*partial*"))


def test_too_many_failed_writes_in_a_row_end_the_run(tmp_path):
    run = background_run(tmp_path, checkpoint_every=2)
    failing(run, {4, 6, 8})
    with pytest.raises(SaveFailed, match=r"3 times in a row .*no space left.*checkpoints before are untouched"):
        run.loop.run()
    assert run.store.latest_valid() == run.store.path(2)


def test_a_stop_waits_for_the_writer_and_saves_again_what_it_could_not(tmp_path):
    for fails in (set(), {3}):
        run = background_run(tmp_path / str(len(fails)))
        failing(run, fails)
        train = run.loop.step.train

        def stopped(micro_batches: Any, *, schedule: StepSchedule, train: Any = train) -> Any:
            if schedule.number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return train(micro_batches, schedule=schedule)

        run.loop.step.train = stopped
        result = run.loop.run()
        assert (result.step, result.stopped_by) == (3, signal.SIGTERM)
        assert run.store.latest_valid() == result.checkpoint == run.store.path(3)


def test_an_error_of_the_run_lets_a_checkpoint_that_was_begun_be_finished(tmp_path):
    run, gate = background_run(tmp_path), threading.Event()
    gated(run, gate)

    def broken(number: int) -> StepSchedule:
        if number == 4:
            threading.Timer(0.1, gate.set).start()
            raise RuntimeError("broken")
        return StepSchedule(lr_scale=1.0, number=number)

    run.loop.schedule = broken
    with pytest.raises(RuntimeError, match="broken"):
        run.loop.run()
    assert run.store.latest_valid() == run.store.path(3)


def test_without_memory_for_a_copy_the_state_is_written_as_it_is(tmp_path):
    run = background_run(tmp_path)

    def snapshot() -> Any:
        raise OutOfMemory("no host memory")

    run.loop.step.snapshot = snapshot
    assert run.loop.run().step == 14
    assert [info.step for info in run.store.list()] == [12, 14]
    assert "no memory for a copy of the state (no host memory)" in run.sink.of("event")[0]["message"]


def test_a_roll_back_waits_for_the_checkpoint_that_is_being_written(make_step, tmp_path):
    options = {"faults": {67: NOT_A_NUMBER}, "recovery": {"non_finite": "rollback"}, "checkpoint_every": 4}
    direct = make_run(tmp_path / "direct", step=make_step(), **options)
    direct.loop.run()
    aside, gate = background_run(tmp_path / "aside", step=make_step(), **options), threading.Event()
    gated(aside, gate)
    threading.Timer(0.3, gate.set).start()
    aside.loop.run()
    assert bits(aside.step) == bits(direct.step)
    assert [event["rolled_back_to"] for event in aside.sink.of("event")] == [8]


@pytest.mark.parametrize("fatal", range(1, 56, 9))
def test_a_kill_while_a_copy_is_written_leaves_the_old_or_the_new_checkpoint(tmp_path, fatal):
    run = background_run(tmp_path, checkpoint_every=3, steps=6)
    child = os.fork()
    if child == 0:
        count = 0

        def counted(function: Any) -> Any:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                if threading.current_thread() is not threading.main_thread():
                    count += 1
                    if count == fatal:
                        os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return wrapper

        for name in ("fsync", "mkdir", "rename", "rmdir", "unlink", "open"):
            setattr(os, name, counted(getattr(os, name)))
        run.loop.run()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    newest = run.store.latest_valid()
    assert newest in (None, run.store.path(3), run.store.path(6))
    assert status or newest == run.store.path(6)
    run.store.sweep()
    whole = make_run(tmp_path / "whole", faults={}, steps=6)
    whole.loop.run()
    again = background_run(tmp_path, steps=6)
    if newest is not None:
        again.loop.resume(newest)
    again.loop.run()
    assert bits(again.step) == bits(whole.step)


class Minutes:
    """A clock that goes on by a minute with each step."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def __call__(self) -> float:
        return 60.0 * self.run.loop.progress.result.step


def timed(run: Any) -> Any:
    run.loop.saving = Checkpointing(run.loop, clock=Minutes(run))
    return run


def test_minutes_make_checkpoints_besides_steps_and_any_checkpoint_starts_them_anew(tmp_path):
    run = timed(make_run(tmp_path, faults={}, checkpoint_every=5, checkpoint_minutes=3, keep_last=9))
    run.loop.run()
    # By the clock 3, 8 and 13: the checkpoints of steps 5 and 10 are as new as any. One by the clock goes when others suffice.
    assert [line["path"][-2:] for line in run.sink.of("checkpoint")] == ["03", "05", "08", "10", "13", "14"]
    assert [info.step for info in run.store.list() if info.by_clock] == [3, 8, 13]
    assert [info.step for info in run.store.list() if info.planned] == [5, 10, 14]


def test_of_checkpoints_by_the_clock_alone_the_newest_stay(tmp_path):
    run = timed(make_run(tmp_path, faults={}, steps=13, checkpoint_every=0, checkpoint_minutes=2, keep_last=3))
    run.loop.run()
    assert [info.step for info in run.store.list()] == [10, 12, 13]


@pytest.mark.parametrize("stop", [4, 7, 11])
def test_a_run_resumed_from_a_checkpoint_by_the_clock_rolls_back_as_one_that_has_none(tmp_path, stop):
    options = {"faults": {8 * 8 + 3: NOT_A_NUMBER}, "recovery": {"non_finite": "rollback"}, "checkpoint_every": 6}
    whole = make_run(tmp_path / "whole", **options)
    whole.loop.run()
    first = timed(make_run(tmp_path / "run", checkpoint_minutes=1, **options))
    run_until(first.loop, stop)
    second = timed(make_run(tmp_path / "run", checkpoint_minutes=1, **options))
    newest = second.store.latest_valid()
    assert newest == second.store.path(stop)
    second.loop.resume(newest)
    second.loop.run()
    assert bits(second.step) == bits(whole.step)


def test_no_checkpoint_is_given_up_for_one_that_the_disk_has_not_kept(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, keep_last=1)
    for step in (1, 2):
        store.save(step, lambda directory: (directory / "model.bin").write_bytes(b"whole"), state={})
    sync = "anarcho_train.checkpoint.sync"
    lost = lambda path: path.name == "model.bin" and path.write_bytes(b"other")  # noqa: E731
    monkeypatch.setattr(sync, lost)
    store.save(3, lambda directory: (directory / "model.bin").write_bytes(b"whole"), state={})
    assert [info.valid for info in store.list()] == [True, False]
    assert store.latest_valid() == store.path(2)
