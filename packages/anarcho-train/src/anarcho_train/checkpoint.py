"""Checkpoints that are either whole or absent, and that say themselves whether they are sound.

Notable: a checkpoint is a directory written beside its final name, fsynced and renamed; ``manifest.json``, written last, lists every
file, those in folders included, with its size and SHA-256. Reading never executes anything: tensors are safetensors, whose headers are
checked before a library opens them, everything else is JSON. The newest ones and the best one stay, and before any is deleted, one that
stays is read whole and found sound.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from anarcho_train.durable import sync
from anarcho_train.tensor_header import header_problem

FORMAT = 1
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
MAX_JSON_BYTES = 64 * 2**20
"""State and manifest are far smaller; what is larger was not written here."""
_LATEST = 1e11
"""Seconds since 1970 that no checkpoint is from; dates can be made of smaller ones."""
_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL = ".partial-"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, what is wrong with it and what to do."""


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
        final = self.path(step)
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.directory / f".{final.name}{_PARTIAL}{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            write(partial)
            _write_json(partial / STATE_FILE, {"format": FORMAT, "step": step, **state})
            files = {
                path.relative_to(partial).as_posix(): _describe(path)
                for path in sorted(partial.rglob("*"))
                if path.is_file()
            }
            manifest = {
                "format": FORMAT,
                "step": step,
                "created_at": time.time(),
                "hashes": hashes or {},
                "files": files,
            }
            _write_json(partial / MANIFEST_FILE, manifest)
            for path in (*partial.rglob("*"), partial):
                sync(path)
        except BaseException:  # A full disk is full of this: give the space back.
            shutil.rmtree(partial, ignore_errors=True)
            raise
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
        if problem := _state_problem(state, step=manifest.get("step")):
            return [f"{path}/{STATE_FILE} {problem}; it was made by hand or is damaged"]
        return [
            problem for name, entry in files.items() if (problem := _check_file(Path(path), name, entry, check_hashes))
        ]

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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises `CheckpointError` naming the file if it is missing or no such object."""
    try:
        if path.is_symlink() or path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} is a link, or larger than {MAX_JSON_BYTES} bytes; expected a regular file: this checkpoint is damaged"
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; this checkpoint is not whole") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); this checkpoint is damaged") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds a {type(value).__name__}; expected a JSON object: this checkpoint is damaged"
        )
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _check_file(directory: Path, name: str, entry: Any, check_hashes: bool) -> str | None:
    path = directory / name
    inside = PurePosixPath(name)
    if inside.is_absolute() or not inside.parts or ".." in inside.parts or inside.as_posix() != name:
        return f"{directory}/{MANIFEST_FILE} names {name!r}; expected names of files in the checkpoint"
    linked = path.is_symlink() or any((directory / parent).is_symlink() for parent in inside.parents[:-1])
    if not isinstance(entry, dict) or linked or not path.is_file():
        return f"{path} is missing or no regular file"
    if path.stat().st_size != entry.get("size"):
        return f"{path} has {path.stat().st_size} bytes; expected {entry.get('size')}: it is truncated or was changed"
    if check_hashes and _sha256(path) != entry.get("sha256"):
        return f"{path} has another SHA-256 than its manifest says: it is damaged or was changed"
    if path.suffix == ".safetensors" and (problem := header_problem(path)):
        return f"{path} {problem}; it was made by hand or is damaged"
    return None


def _state_problem(state: dict[str, Any], *, step: Any) -> str | None:
    """What a run could not go on from, as words after the file's name; what a key means is known where it is read."""
    if state.get("step", step) != step:
        return f"is of step {state['step']!r}; expected {step!r}, as the manifest says"
    counts = {name: state[name] for name in ("tokens", "samples") if name in state}
    for name, value in counts.items():
        if type(value) is not int or not 0 <= value < 2**63:
            return f"has {name} = {str(value)[:40]!r}; expected a whole number from 0"
    for name, kind in (("early_stopping", dict), ("recovery", dict), ("micro_batch", dict), ("settings", dict)):
        if not isinstance(state.get(name, {}), kind):
            return f"has {name} = {str(state[name])[:40]!r}; expected an object"
    for name in ("validation_loss", "compared_loss", "bits_per_byte"):
        if not isinstance(state.get(name), int | float | None) or isinstance(state.get(name), bool):
            return f"has {name} = {str(state[name])[:40]!r}; expected a number or null"
    return None


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
