"""Checkpoints are whole or absent, say what is wrong with them, and rotate without losing the best or the newest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from anarcho_train import CheckpointError, CheckpointStore, lock_run


def write(content: str):
    def write_into(directory):
        (directory / "model.bin").write_text(content)

    return write_into


def save(store: CheckpointStore, step: int, loss: float | None = None) -> None:
    store.save(step, write(f"weights {step}"), state={"validation_loss": loss}, hashes={"config": "c"})


def test_a_saved_checkpoint_is_valid_and_tells_step_age_and_size(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 7, 2.5)
    (info,) = store.list()
    assert (info.step, info.valid, info.problem, info.validation_loss) == (7, True, None, 2.5)
    assert info.bytes == sum(f.stat().st_size for f in info.path.iterdir())
    assert store.read_hashes(info.path) == {"config": "c"}
    assert store.read_state(info.path)["step"] == 7


def edit_manifest(directory: Path, **changes) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda d: (d / "model.bin").write_text("weights 8"), "another SHA-256"),
        (lambda d: (d / "model.bin").write_text("w"), "has 1 bytes; expected 9"),
        (lambda d: (d / "model.bin").unlink(), "is missing or no regular file"),
        (lambda d: (d / "manifest.json").write_text("{"), "cannot be read"),
        (lambda d: (d / "manifest.json").unlink(), "is missing"),
        (lambda d: (d / "manifest.json").write_text("[1]"), "holds a list"),
        (lambda d: (d / "manifest.json").write_text('{"format": 9, "files": {}}'), "has format 9; expected 1"),
        (lambda d: (d / "manifest.json").write_text('{"format": 1, "files": {}}'), "does not describe the checkpoint"),
        (lambda d: edit_manifest(d, step=8), "does not describe the checkpoint"),
        (lambda d: edit_manifest(d, hashes=[]), "does not describe the checkpoint"),
        (lambda d: edit_manifest(d, files={"state.json": {}, "../x": {}}), "expected names of files in the checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over_for_an_earlier_one(tmp_path, damage, sentence):
    store = CheckpointStore(tmp_path)
    save(store, 3)
    save(store, 9)
    damage(tmp_path / "step-00000009")
    assert any(sentence in problem for problem in store.verify(tmp_path / "step-00000009"))
    messages: list[str] = []
    assert store.latest_valid(notify=messages.append) == tmp_path / "step-00000003"
    assert len(messages) == 1
    assert [info.valid for info in store.list()] == [True, False]


def test_a_store_without_a_sound_checkpoint_is_an_error_and_nothing_of_it_is_deleted(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1)
    assert store.latest_valid() is None
    save(store, 3)
    (tmp_path / "step-00000003" / "model.bin").write_text("damaged!!")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        store.latest_valid()
    save(store, 3)
    assert store.latest_valid() == tmp_path / "step-00000003"
    (kept,) = tmp_path.glob("step-00000003.damaged-*")
    assert (kept / "model.bin").read_text() == "damaged!!"


def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1)
    for step, loss in [(1, float("nan")), (2, 1.0), (3, 2.0), (4, 3.0)]:
        save(store, step, loss)
    assert [info.step for info in store.list()] == [2, 4]
    assert store.best() == tmp_path / "step-00000002"


def test_rotation_keeps_the_newest_and_the_best_and_leaves_damaged_ones(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.0)]:
        save(store, step, loss)
    assert [info.step for info in store.list()] == [2, 4, 5]
    assert store.best() == tmp_path / "step-00000002"
    (tmp_path / "step-00000004" / "model.bin").unlink()
    save(store, 6)
    save(store, 7)
    assert [info.step for info in store.list()] == [2, 4, 6, 7]


def test_a_write_that_fails_leaves_the_earlier_checkpoints_and_gives_its_space_back(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)

    def fail(directory):
        (directory / "model.bin").write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        store.save(2, fail, state={})
    assert [info.step for info in store.list()] == [1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001"]


def test_a_process_killed_at_any_file_operation_leaves_the_old_or_the_new_checkpoint(tmp_path):
    program = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from anarcho_train import CheckpointStore
        fatal, count = int(sys.argv[2]), 0
        def counted(function):
            def wrapper(*args, **kwargs):
                global count
                count += 1
                if count == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return wrapper
        store = CheckpointStore(Path(sys.argv[1]), keep_last=1)
        for name in ("fsync", "mkdir", "rename", "rmdir", "unlink", "open"):
            setattr(os, name, counted(getattr(os, name)))
        def write(directory):
            for i in range(3):
                (directory / f"part-{i}.bin").write_bytes(os.urandom(3000))
        store.save(2, write, state={"validation_loss": None})
        print(count)
        """
    )
    operation, killed = 0, 0
    while True:
        operation += 1
        store = CheckpointStore(tmp_path / str(operation), keep_last=1)
        save(store, 1)
        run = subprocess.run(
            [sys.executable, "-c", program, str(store.directory), str(operation)], capture_output=True, text=True
        )
        latest = store.latest_valid()
        assert latest is not None
        assert latest.name in {"step-00000001", "step-00000002"}
        assert all(info.valid for info in store.list())
        store.sweep()
        save(store, 3)
        assert [info.step for info in store.list()] == [3]
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL, run.stderr
        killed += 1
    assert killed >= 10


def test_a_second_process_on_a_run_directory_is_refused_and_a_dead_ones_lock_is_free(tmp_path):
    program = "import sys; from anarcho_train import lock_run; lock = lock_run(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="in use by another process"):
            lock_run(tmp_path)
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    lock_run(tmp_path).release()


def test_the_manifest_is_json_that_lists_every_other_file(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    manifest = json.loads((tmp_path / "step-00000001" / "manifest.json").read_text())
    assert set(manifest["files"]) == {"model.bin", "state.json"}


def test_importing_the_package_loads_no_framework():
    code = "import sys, anarcho_train; print('torch' in sys.modules, 'mlx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == [
        "False",
        "False",
    ]
