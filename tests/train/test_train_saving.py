"""Checkpoints that find no room: the run and the checkpoints before survive, the next is tried, and a run without end of it stops."""

from __future__ import annotations

import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
from anarcho_train import SaveFailed, saving
from anarcho_train.saving import Saves

from .test_train_recovery import bits, make_run

NO_SPACE = OSError(28, "No space left on device", "/disk/model.safetensors")


def failing(run, steps):
    """Lets the writing of these steps' checkpoints fail, after half of it is there; returns how often it was tried, by step."""
    save, tried = run.step.save, []

    def write(directory: Path) -> None:
        step = int(directory.name.split(".")[1].removeprefix("step-"))
        tried.append(step)
        save(directory)
        if step in steps:
            (directory / "model.safetensors").write_bytes(b"half")
            raise NO_SPACE

    run.step.save = write
    return tried


@pytest.fixture
def pauses(monkeypatch):
    slept = []
    monkeypatch.setattr(saving.time, "sleep", slept.append)
    return slept


def test_a_save_that_fails_costs_neither_the_run_nor_the_checkpoint_before(tmp_path):
    whole = make_run(tmp_path / "whole", faults={})
    whole.loop.run()
    run = make_run(tmp_path / "full", faults={})
    failing(run, {6, 9})
    assert run.loop.run().step == 14
    assert bits(run.step) == bits(whole.step)
    assert [info.step for info in run.store.list()] == [12, 14]
    assert not list(run.store.directory.glob(".*partial*")), "the space of half a checkpoint is given back"
    events = [event for event in run.sink.of("event") if event["fault"] == "save"]
    assert [(event["step"], event["failures"]) for event in events] == [(6, 1), (9, 2)]
    assert "no space left on device" in events[0]["message"]
    assert "2 more may fail" in events[0]["message"]


def test_too_many_failed_saves_in_a_row_end_the_run_with_one_sentence(tmp_path):
    run = make_run(tmp_path, faults={}, checkpoint_every=2)
    tried = failing(run, {4, 6, 8})
    with pytest.raises(SaveFailed, match=r"3 times in a row .*no space left.*checkpoints before are untouched"):
        run.loop.run()
    assert tried == [2, 4, 6, 8]
    assert run.store.latest_valid().name == "step-00000002"


def test_the_last_checkpoint_is_tried_again_after_growing_pauses(tmp_path, pauses):
    run = make_run(tmp_path, faults={}, checkpoint_every=0, recovery={"max_failed_saves": 9})
    save, tries = run.step.save, []

    def write(directory: Path) -> None:
        tries.append(directory)
        if len(tries) < 8:
            raise NO_SPACE
        save(directory)

    run.step.save = write
    assert run.loop.run().step == 14
    assert pauses == [1, 2, 4, 8, 16, 32, 60]
    assert run.store.latest_valid().name == "step-00000014"


def test_a_connection_that_is_lost_while_saving_is_no_full_disk():
    def lose():
        raise ConnectionError("a rank is gone")

    with pytest.raises(ConnectionError, match="a rank is gone"):
        Saves(limit=3).attempt(lose, report=lambda message, failures: None, needed=False, patient=True)


@contextmanager
def file_size_limit(limit: int):
    """No file may grow beyond this, as on a full disk; the signal for it is one that Python ignores."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_limit_of_the_operating_system_is_survived_at_every_size_of_file(tmp_path):
    whole = make_run(tmp_path / "whole", faults={}, steps=6)
    whole.loop.run()
    sizes = {path.stat().st_size for path in whole.store.latest_valid().iterdir()}
    for limit in [0, *sorted(size - 1 for size in sizes)]:
        run = make_run(tmp_path / f"{limit}", faults={}, steps=6)
        schedule = run.loop.schedule

        def limited(number, run=run, schedule=schedule, limit=limit):
            # The checkpoint of step 3 has been made; that of step 4, which an injected wish asks for, finds no room.
            if number == 4:
                with file_size_limit(limit):
                    run.loop.saving.save()
            return schedule(number)

        run.loop.schedule = limited
        assert run.loop.run().step == 6
        (event,) = run.sink.of("event")
        assert (event["step"], event["fault"]) == (4, "save")
        assert [info.step for info in run.store.list()] == [3, 6]
        assert bits(run.step) == bits(whole.step)


def test_nothing_is_written_where_the_disk_has_less_than_a_checkpoint_takes(tmp_path, monkeypatch, pauses):
    run = make_run(tmp_path, faults={})
    tried = failing(run, set())
    run.loop.checkpoint_bytes = 1000
    free = iter([999, 1000, 2000, 999, 5000])
    monkeypatch.setattr(saving, "free_bytes", lambda directory: next(free))
    run.loop.run()
    assert tried == [6, 9, 14]
    assert [event["step"] for event in run.sink.of("event")] == [3, 12]
    assert "checkpoint of step 3 needs 0.0 MiB, but the disk" in run.sink.of("event")[0]["message"]


def test_free_space_is_that_of_the_nearest_directory_that_is_there(tmp_path):
    assert saving.free_bytes(tmp_path / "not" / "there") > 0
