"""Signals in every part of a run, a directory that nobody may write to, and a run that somebody else works on."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from anarcho_train import SaveFailed, StepSchedule, saving

from .conftest import CountingText, make_step

STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143}
NOBODY = 65534


def weights(run) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in run.loop.step.model.parameters()]


def before(owner, name: str, when: int, action) -> None:
    """Lets an action come before the ``when``-th call of a method."""
    original, calls = getattr(owner, name), 0

    def wrapper(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == when:
            action()
        return original(*arguments, **keywords)

    setattr(owner, name, wrapper)


def send(number: int):
    return lambda: os.kill(os.getpid(), number)


PARTS = {
    "in a step": lambda run: (run.loop.step, "train", 5),
    "in an evaluation": lambda run: (run.loop.step, "evaluate", 2),
    "in a save": lambda run: (run.loop.step, "save", 2),
    "while it reads its data": lambda run: (run.text, "batch", 9),
}


@pytest.mark.parametrize("number", STOPS, ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("part", PARTS)
def test_a_signal_in_any_part_of_a_run_costs_nothing(make_loop, tmp_path, part, number):
    whole = make_loop(tmp_path / "whole")
    whole.loop.run()
    stopped = make_loop(tmp_path / "stopped")
    before(*PARTS[part](stopped), send(number))
    result = stopped.loop.run()
    assert result.stopped_by == number
    assert 0 < result.step < 12
    assert stopped.store.latest_valid() == stopped.store.path(result.step), "the last step is saved"
    resumed = make_loop(tmp_path / "stopped", step=make_step())
    resumed.loop.resume(stopped.store.latest_valid())
    resumed.loop.run()
    assert stopped.text.consumed[: 8 * result.step] + resumed.text.consumed == whole.text.consumed
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


def test_a_signal_ends_the_waiting_for_data_that_never_comes(make_loop):
    run = make_loop()
    asked = []

    def state(first_sample: int, count: int) -> str:
        if first_sample < 8 * 4:
            return "ready"
        asked.append(first_sample)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        assert len(asked) < 10, "the run goes on waiting"
        return "waiting"

    run.text.state = state
    result = run.loop.run()
    assert (result.step, result.stopped_by) == (4, signal.SIGTERM)
    assert run.store.latest_valid() == run.store.path(4)


@pytest.mark.parametrize("number", STOPS, ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("part", ["in a save", "in an evaluation"])
def test_a_second_signal_ends_the_process_at_once(make_loop, tmp_path, part, number):
    run = make_loop(tmp_path / "run")
    before(run.loop.step, "train", 5, send(signal.SIGINT))
    owner, name, _ = PARTS[part](run)
    # What comes after the fifth step is the save that the first signal asks for; evaluations are due after every step here.
    run.loop.config = run.loop.config.__class__(**{**vars(run.loop.config), "eval_every": 1})
    before(owner, name, {"save": 5, "evaluate": 9}[name], send(number))
    child = os.fork()
    if not child:
        run.loop.run()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == STOPS[number]
    assert all(info.valid for info in run.store.list())
    assert run.store.latest_valid() is not None
    assert run.store.latest_valid() < run.store.path(5)


def as_nobody(directory: Path, action) -> str:
    """What an action raises in a process without the rights of root, for which no directory is read-only."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.geteuid() == 0:
                os.seteuid(NOBODY)
            action()
            os.write(writer, b"nothing")
        except BaseException as error:
            os.write(writer, repr(error).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        return pipe.read()


@pytest.fixture
def everybodys() -> Iterator[Path]:
    """A directory that any user may reach and write to."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o777)
    yield directory
    directory.chmod(0o777)
    shutil.rmtree(directory)


def test_a_directory_that_becomes_read_only_costs_neither_the_run_nor_the_checkpoint_before(
    make_loop, everybodys, monkeypatch
):
    monkeypatch.setattr(saving.time, "sleep", lambda seconds: None)
    run = make_loop(everybodys / "checkpoints", eval_every=0)

    def close() -> None:
        (everybodys / "checkpoints").chmod(0o555)

    before(run.loop.step, "train", 5, close)
    told = as_nobody(everybodys, run.loop.run)
    (everybodys / "checkpoints").chmod(0o755)
    assert SaveFailed.__name__ in told
    assert "ermission denied" in told
    assert [info.step for info in run.store.list()] == [3]
    again = make_loop(everybodys / "checkpoints", step=make_step(), eval_every=0)
    again.loop.resume(run.store.latest_valid())
    assert again.loop.run().step == 12


def of_file(content: bytes, header: dict) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


HOSTILE = {
    "a header of four exabytes": lambda header, content: (2**62).to_bytes(8, "little") + content,
    "tensors far behind the end": lambda header, content: of_file(
        content, {name: entry | {"data_offsets": [0, 2**50]} for name, entry in header.items()}
    ),
    "a shape without end": lambda header, content: of_file(
        content, {name: entry | {"shape": [2**62, 2**62]} for name, entry in header.items()}
    ),
    "a header that is no JSON": lambda header, content: (4).to_bytes(8, "little") + b"{{{{" + content,
    "a pickle that runs a command": lambda header, content: b"\x80\x04cposix\nsystem\n(Vtouch owned\ntR.",
    "nothing": lambda header, content: b"",
}


@pytest.mark.parametrize("framework", ["torch", "mlx"])
@pytest.mark.parametrize("file", ["optimizer.safetensors", "runtime.safetensors"])
def test_hostile_files_of_a_checkpoint_are_refused_at_once_and_nothing_of_them_is_executed(
    tmp_path, monkeypatch, framework, file
):
    monkeypatch.chdir(tmp_path)
    if framework == "mlx":
        pytest.importorskip("mlx.core")
        from .mlx_bigram import make_step as make
    else:
        make = make_step
    step = make()
    step.train([CountingText().batch(0, 4)], schedule=StepSchedule(lr_scale=1.0))
    step.save(tmp_path)
    sound = (tmp_path / file).read_bytes()
    length = int.from_bytes(sound[:8], "little")
    header = json.loads(sound[8 : 8 + length])
    header.pop("__metadata__", None)
    for what, forged in HOSTILE.items():
        (tmp_path / file).write_bytes(forged(header, sound[8 + length :]))
        started, taken = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(Exception, match=r".") as refusal:
            make().load(tmp_path)
        assert not isinstance(refusal.value, MemoryError), what
        assert time.monotonic() - started < 5
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - taken  # In KiB, on macOS in bytes.
        assert grown < 2**18 * (1024 if sys.platform == "darwin" else 1), what
        assert not (tmp_path / "owned").exists()
    (tmp_path / file).write_bytes(sound)
    make().load(tmp_path)
