"""Checkpoints that are either whole or absent, and that say themselves whether they are sound.

Notable: a checkpoint is a directory written beside its final name, fsynced and renamed; ``manifest.json``, written last, lists every
file, those in folders included, with its size and SHA-256. Reading never executes anything: tensors are safetensors, whose headers are
checked before a library opens them, everything else is JSON. The newest ones and the best one stay, and before any is deleted, one that
stays is read whole and found sound.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from anarcho_train.checkpoint_files import (
    FORMAT,
    MANIFEST_FILE,
    STATE_FILE,
    CheckpointError,
    check_file,
    describe,
    read_json,
    state_problem,
    write_json,
)
from anarcho_train.durable import sync
from anarcho_train.optimizer_layout import layout_problem

_LATEST = 1e11
"""Seconds since 1970 that no checkpoint is from; dates can be made of smaller ones."""
ARRIVAL_SECONDS = 60.0
"""How long what another machine has written may take to be seen by this one; NFS remembers directories for up to a minute."""
_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL = ".partial-"


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What is known of one checkpoint directory."""

    step: int
    """Optimizer steps that had been made."""
    path: Path
    """Its directory."""
    created_at: float
    """When it was written, in seconds since 1970."""
    bytes: int
    """Size of all its files."""
    validation_loss: float | None
    """Validation loss at that step in nats per token, where one was measured."""
    compared_loss: float | None
    """The loss by which checkpoints of a run are compared: all of them measured it on the same text."""
    planned: bool
    """Whether a run that nothing interrupts has one after this step."""
    by_clock: bool
    """Whether it was written because the one before was too old."""
    valid: bool
    """Whether every file is what the manifest says."""
    problem: str | None
    """The first thing that is wrong, where something is."""


class CheckpointStore:
    """The checkpoints of one run, under ``directory``/step-00001000 and so on."""

    def __init__(self, directory: Path, *, keep_last: int = 2) -> None:
        self.directory = Path(directory)
        self.keep_last = keep_last

    def save(
        self, step: int, write: Callable[[Path], None], *, state: dict[str, Any], hashes: dict[str, str] | None = None
    ) -> Path:
        """Writes the checkpoint of ``step`` and returns its directory; the newest valid one is the old or the new one at every instant.

        ``write`` puts the files of model and optimizer into the directory that it is given; ``state`` is stored as ``state.json``,
        ``hashes`` (of config, tokenizer, data) in the manifest.
        """
        partial = self._staging(step, os.getpid())
        try:
            write(partial)
            return self._publish(step, partial, _described(partial), state=state, hashes=hashes)
        except BaseException:  # A full disk is full of this: give the space back.
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def write_part(self, step: int, number: int, write: Callable[[Path], None]) -> dict[str, Any]:
        """Writes what one of several processes, of this number, has of the checkpoint of ``step``, which `join_parts` makes of all.

        Returns size and SHA-256 of each of its files, which are on the disk then.
        """
        partial = self._staging(step, _part(number))
        try:
            write(partial)
            found = _described(partial)
            for path in (*partial.rglob("*"), partial):
                sync(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return found

    def join_parts(
        self,
        step: int,
        parts: Sequence[dict[str, Any]],
        *,
        state: dict[str, Any],
        hashes: dict[str, str] | None = None,
    ) -> Path:
        """Makes the checkpoint of what all processes have written, by their numbers; the rest as `save`.

        Raises OSError where what another one has written is not seen here.
        """
        partial, found = self.directory / self._partial_name(step, _part(0)), dict(parts[0])
        try:
            for number, files in enumerate(parts[1:], 1):
                for name, entry in files.items():
                    source = self.directory / self._partial_name(step, _part(number)) / name
                    _await_file(source, entry["size"])
                    if name in found:
                        raise OSError(f"{source} has the name of another process's file; expected names of their own")
                    source.rename(partial / name)
                shutil.rmtree(self.directory / self._partial_name(step, _part(number)), ignore_errors=True)
                found |= files
            return self._publish(step, partial, found, state=state, hashes=hashes)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def discard_part(self, step: int, number: int) -> None:
        """Deletes what a process has written for a checkpoint that there will not be."""
        shutil.rmtree(self.directory / self._partial_name(step, _part(number)), ignore_errors=True)

    def _staging(self, step: int, writer: object) -> Path:
        """An empty directory for what becomes a checkpoint."""
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.directory / self._partial_name(step, writer)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        return partial

    def _partial_name(self, step: int, writer: object) -> str:
        return f".{self.path(step).name}{_PARTIAL}{writer}"

    def _publish(
        self,
        step: int,
        partial: Path,
        files: dict[str, Any],
        *,
        state: dict[str, Any],
        hashes: dict[str, str] | None,
    ) -> Path:
        """Gives a directory, of which the ``files`` are known, the name of a checkpoint."""
        final = self.path(step)
        write_json(partial / STATE_FILE, {"format": FORMAT, "step": step, **state})
        manifest = {
            "format": FORMAT,
            "step": step,
            "created_at": time.time(),
            "hashes": hashes or {},
            "files": dict(sorted({**files, STATE_FILE: describe(partial / STATE_FILE)}.items())),
        }
        write_json(partial / MANIFEST_FILE, manifest)
        for path in (*partial.rglob("*"), partial):
            sync(path)
        if final.exists():  # Only a damaged one can be in the way; a person may want to look at it.
            final.rename(final.with_name(f"{final.name}.damaged-{time.time_ns()}"))
        partial.rename(final)
        sync(self.directory)
        self._rotate()
        return final

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.directory / f"step-{step:08d}"

    def list(self, *, check_hashes: bool = True) -> list[CheckpointInfo]:
        """All checkpoints, oldest first, with their validity; without ``check_hashes`` only names and sizes are compared."""
        return [self._info(path, check_hashes) for _, path in self._paths()]

    def verify(self, path: Path, *, check_hashes: bool = True) -> list[str]:
        """What is wrong with the checkpoint at ``path``, one sentence a finding; an empty list means that it is sound."""
        try:
            manifest = read_json(Path(path) / MANIFEST_FILE)
            state = read_json(Path(path) / STATE_FILE)
        except CheckpointError as error:
            return [str(error)]
        files = manifest.get("files")
        if manifest.get("format") != FORMAT:
            return [f"{path}/{MANIFEST_FILE} has format {manifest.get('format')!r}; expected {FORMAT}"]
        match = _NAME.fullmatch(Path(path).name)
        written = manifest.get("created_at")
        described = isinstance(manifest.get("hashes"), dict) and isinstance(written, float) and 0 <= written < _LATEST
        named = match is None or manifest.get("step") == int(match[1])
        if not (isinstance(files, dict) and STATE_FILE in files and described and named):
            return [
                f"{path}/{MANIFEST_FILE} does not describe the checkpoint of this name; it was made by hand or is damaged"
            ]
        if problem := state_problem(state, step=manifest.get("step")):
            return [f"{path}/{STATE_FILE} {problem}; it was made by hand or is damaged"]
        problems = [
            problem for name, entry in files.items() if (problem := check_file(Path(path), name, entry, check_hashes))
        ]
        layout = None if problems else layout_problem(Path(path))
        return [layout] if layout else problems

    def latest_valid(self, *, notify: Callable[[str], None] = lambda message: None) -> Path | None:
        """The newest sound checkpoint, or None where there is no checkpoint; every damaged newer one is reported through ``notify``.

        Raises `CheckpointError` where there are checkpoints and none is sound.
        """
        paths = [path for _, path in reversed(self._paths())]
        for path in paths:
            problems = self.verify(path)
            if not problems:
                return path
            notify(f"{problems[0]}; this checkpoint is passed over")
        if paths:
            raise CheckpointError(
                f"none of the {len(paths)} checkpoints in {self.directory} is sound; put one back, or delete the folder to begin again"
            )
        return None

    def recent(self) -> Sequence[Path]:
        """The sound checkpoints that a run may go on from, oldest first: the newest one, and `keep_last` of those that were planned."""
        return [info.path for info in self._newest([info for info in self.list(check_hashes=False) if info.valid])]

    def before_fault(self) -> Path | None:
        """The newest sound checkpoint that was planned: where a run is rolled back to, however often it was interrupted."""
        for _, path in reversed(self._paths()):
            if not self.verify(path) and self.read_state(path).get("planned", True):
                return path
        return None

    def discard_after(self, step: int) -> None:
        """Deletes the sound checkpoints after ``step``, which the run does not go on from any more; damaged ones are passed over anyway."""
        for info in self.list():
            if info.step > step and info.valid:
                _delete(info.path)

    def best(self) -> Path | None:
        """The sound checkpoint with the lowest validation loss, or None where no checkpoint has one."""
        best = best_of([info for info in self.list() if info.valid])
        return best.path if best else None

    def read_state(self, path: Path) -> dict[str, Any]:
        """The content of a checkpoint's ``state.json``; raises `CheckpointError` if it cannot be read."""
        return read_json(path / STATE_FILE)

    def read_hashes(self, path: Path) -> dict[str, str]:
        """The hashes of config, tokenizer and data that the checkpoint's manifest holds."""
        return read_json(path / MANIFEST_FILE).get("hashes", {})

    def sweep(self) -> list[Path]:
        """Deletes what interrupted writes left behind and returns it; call it only while no other process writes here."""
        orphans = sorted(self.directory.glob(f".step-*{_PARTIAL}*")) if self.directory.is_dir() else []
        for orphan in orphans:
            shutil.rmtree(orphan)
        return orphans

    def _paths(self) -> list[tuple[int, Path]]:
        if not self.directory.is_dir():
            return []
        named = ((_NAME.fullmatch(path.name), path) for path in self.directory.iterdir() if path.is_dir())
        return sorted((int(match[1]), path) for match, path in named if match)

    def _info(self, path: Path, check_hashes: bool) -> CheckpointInfo:
        problems = self.verify(path, check_hashes=check_hashes)
        manifest: dict[str, Any] = {}
        state: dict[str, Any] = {}
        if not problems:
            manifest, state = read_json(path / MANIFEST_FILE), self.read_state(path)
        match = _NAME.fullmatch(path.name)
        return CheckpointInfo(
            step=int(match[1]) if match else -1,
            path=path,
            created_at=float(manifest.get("created_at", path.stat().st_mtime)),
            bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
            planned=bool(state.get("planned", True)),
            by_clock=bool(state.get("by_clock")),
            validation_loss=state.get("validation_loss"),
            compared_loss=state.get("compared_loss", state.get("validation_loss")),
            valid=not problems,
            problem=problems[0] if problems else None,
        )

    def _rotate(self) -> None:
        """Deletes all but the newest `keep_last` sound checkpoints and the best one; damaged ones stay for a person to look at.

        One that was not planned, of a run that was stopped, goes when there is a newer one: the others are as if there had been no stop.
        """
        sound = [info for info in self.list(check_hashes=False) if info.valid]
        keep = {info.path for info in self._newest(sound)}
        if best := best_of(sound):
            keep.add(best.path)
        doomed = [info.path for info in sound if info.path not in keep]
        # Nothing is given up before something newer was read from the disk whole: the newest of all, else the next.
        newer = [info.path for info in reversed(sound)] if doomed else []
        verified = next((path for path in newer if not self.verify(path)), None)
        for path in doomed:
            if verified is not None and path < verified:
                _delete(path)

    def _newest(self, sound: Sequence[CheckpointInfo]) -> Sequence[CheckpointInfo]:
        """The newest of all, `keep_last` of those that were planned, and in place of those that there are not, of those by the clock."""
        steps = [info.step for info in sound if info.planned][-self.keep_last :]
        if rest := self.keep_last - len(steps):
            steps += [info.step for info in sound if info.by_clock][-rest:]
        return [info for info in sound if info.step in steps or info is sound[-1]]


def _part(number: int) -> str:
    return f"part-{number:05d}"


def _described(directory: Path) -> dict[str, Any]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): describe(path) for path in files}


def _await_file(path: Path, size: int) -> None:
    """Returns when the file is there with all its bytes; raises OSError where it never is."""
    until = time.monotonic() + ARRIVAL_SECONDS
    while not (path.is_file() and path.stat().st_size == size):
        if time.monotonic() > until:
            raise OSError(f"{path} is not seen here with the {size} bytes that another process has written of it")
        time.sleep(0.05)


def _delete(checkpoint: Path) -> None:
    doomed = checkpoint.with_name(f".{checkpoint.name}{_PARTIAL}old")
    checkpoint.rename(doomed)  # A half-deleted checkpoint must never look like a damaged one.
    shutil.rmtree(doomed)


def best_of(infos: Sequence[CheckpointInfo]) -> CheckpointInfo | None:
    """The one with the lowest compared loss, the earliest of equals; None where none has a finite one."""
    scored = [(info.compared_loss, info.step, info) for info in infos if info.compared_loss is not None]
    finite = [entry for entry in scored if math.isfinite(entry[0])]
    return min(finite, key=lambda entry: entry[:2])[2] if finite else None


def lock_run(run_directory: Path) -> FileLock:
    """Takes the lock of a run directory, so that one process at a time writes there; raises `CheckpointError` if another one holds it.

    The lock is the operating system's, so a process that dies releases it. Call ``release()`` when done.
    """
    lock = FileLock(Path(run_directory) / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(
            f"{run_directory} is in use by another process; wait until that run ends or stop it, or start a run under another name"
        ) from None
    return lock
