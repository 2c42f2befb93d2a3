"""What is known of a pipeline's earlier runs: `state.json` in its directory, replaced as a whole at every change."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from anarcho_cli.pipeline.errors import PipelineError
from anarcho_cli.pipeline.fingerprints import FileHashes

STATE_FILE = "state.json"
FORMAT = 1

Status = Literal["running", "stopped", "failed", "complete"]


@dataclass(kw_only=True)
class Record:
    """The last attempt at a stage."""

    status: Status
    """How it ended; `running` also where the pipeline was killed meanwhile."""
    inputs: dict[str, str]
    """Label -> hash of what it was given."""
    output: str | None = None
    """What it made, once complete."""
    exit_status: int | None = None
    """Its exit status, once it has ended."""
    seconds: float | None = None
    """Wall time of the attempt."""
    process: int | None = None
    """Its process while it runs."""
    process_created: float | None = None
    """When that process began, in seconds since 1970: numbers of processes are used again."""

    @property
    def alive(self) -> bool:
        """Whether its process still runs, though the pipeline that began it may not."""
        if self.status != "running" or self.process is None:
            return False
        try:
            process = psutil.Process(self.process)
            return process.create_time() == self.process_created and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


@dataclass(kw_only=True)
class State:
    """All that a pipeline's directory knows of its stages."""

    stages: dict[str, Record] = field(default_factory=dict)
    """Name of a stage -> its last attempt."""
    hashes: FileHashes = field(default_factory=FileHashes)
    """Hashes of files."""

    def save(self, directory: Path) -> None:
        """Replaces the state file; it is the old or the new one at every instant."""
        stages = {name: asdict(record) for name, record in self.stages.items()}
        value = {"format": FORMAT, "stages": stages, "files": self.hashes.to_dict()}
        partial = directory / f".{STATE_FILE}.partial"
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(directory / STATE_FILE)


def load_state(directory: Path) -> State:
    """The state of a pipeline's directory, which may be not there yet.

    Raises PipelineError where the directory holds something else, or its state cannot be read.
    """
    file = directory / STATE_FILE
    if not directory.exists():
        return State()
    if not directory.is_dir():
        raise PipelineError(f"--dir {directory} is a file; expected a directory")
    if not file.exists():
        if any(not entry.name.startswith(".") for entry in directory.iterdir()):
            raise PipelineError(f"{directory} holds something else than a pipeline's outputs; choose another --dir")
        return State()
    try:
        value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if value["format"] != FORMAT:
            raise PipelineError(f"{file} has format {value['format']!r}; expected {FORMAT}: choose another --dir")
        stages = {name: Record(**record) for name, record in value["stages"].items()}
        return State(stages=stages, hashes=FileHashes(value["files"]))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise PipelineError(
            f"{file} is damaged ({error}); choose another --dir, or move it away to begin anew"
        ) from error
