"""Running a pipeline: stage after stage, until one fails; run again, it goes on there.

Notable: before a stage begins and after it has ended, the state file says so; whatever is killed at whatever time, the next
run knows what is complete. An output that is to be made anew is moved aside, never deleted.
"""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from anarcho_cli.output import duration_text, note
from anarcho_cli.pipeline.command_line import arguments
from anarcho_cli.pipeline.definition import Pipeline, Stage
from anarcho_cli.pipeline.errors import PipelineError
from anarcho_cli.pipeline.planning import Planner, Step, make_plan
from anarcho_cli.pipeline.process import Processes, anarcho
from anarcho_cli.pipeline.stage_commands import REPORT_FILE, Output
from anarcho_cli.pipeline.state import Record, State, load_state
from anarcho_cli.pipeline.summary import report_lines

STANDARD_ERROR = 2

Launch = Callable[[Sequence[str]], list[str]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run of a pipeline ended."""

    pipeline: str
    """Name of the pipeline."""
    directory: Path
    """Where its outputs are."""
    steps: tuple[Step, ...]
    """The stages that were come to, the one that failed last."""
    seconds: float
    """Wall time of all of them."""
    exit_status: int
    """0, or the exit status of the stage that failed, or 128 + the number of the signal that stopped it."""

    def to_dict(self) -> dict[str, Any]:
        """The outcome as JSON."""
        steps = [{**step.to_dict(), "output": str(self.directory / step.stage.name)} for step in self.steps]
        return {
            "pipeline": self.pipeline,
            "directory": str(self.directory),
            "stages": steps,
            "seconds": self.seconds,
            "exit_status": self.exit_status,
        }


def default_directory(pipeline: Pipeline) -> Path:
    """Where the outputs of a pipeline are kept unless --dir says otherwise."""
    return Path("runs") / pipeline.name


def run_pipeline(pipeline: Pipeline, directory: Path, *, start: str | None = None, launch: Launch = anarcho) -> Outcome:
    """Runs what has to run of a pipeline; with ``start``, that stage anew, and those before it are taken as they are.

    ``launch`` makes a command line of the arguments of `anarcho`. Raises PipelineError where it cannot begin.
    """
    began = time.monotonic()
    make_plan(
        pipeline, directory, load_state(directory), start=start
    )  # Refuses what cannot be done, with nothing written.
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory), Processes() as processes:
        state = load_state(directory)
        _refuse_running(state)
        state.save(directory)
        run = _Run(pipeline, directory, state, processes, launch)
        steps, status = run.all_stages(Planner(pipeline, directory, state, start=start))
    return Outcome(
        pipeline=pipeline.name,
        directory=directory,
        steps=tuple(steps),
        seconds=time.monotonic() - began,
        exit_status=status,
    )


class _Run:
    """One run of a pipeline in its locked directory."""

    def __init__(self, pipeline: Pipeline, directory: Path, state: State, processes: Processes, launch: Launch) -> None:
        self.pipeline, self.directory, self.state = pipeline, directory, state
        self.processes, self.launch = processes, launch

    def all_stages(self, planner: Planner) -> tuple[list[Step], int]:
        """Every stage in order, until one fails or a signal comes; returns the steps and the exit status."""
        steps: list[Step] = []
        for number, stage in enumerate(self.pipeline.stages, start=1):
            if self.processes.number is not None:
                self._say_how_to_go_on(f"stopped before the stage '{stage.name}'")
                return steps, 128 + self.processes.number
            step = planner.step(stage)
            steps.append(step)
            place = f"stage {number} of {len(self.pipeline.stages)}, {stage.name} ({stage.command_name})"
            note(f"{place}: {step.action}, {step.why}")
            if step.action == "skip":
                self._accept(step)
            elif status := self._execute(step, planner):
                ending = "was stopped" if self.processes.number is not None else f"ended with status {status}"
                self._say_how_to_go_on(f"{place} {ending}")
                return steps, status
        return steps, 0

    def _execute(self, step: Step, planner: Planner) -> int:
        """Runs a stage and records how it ended; returns its exit status."""
        stage, resume = step.stage, step.action == "resume"
        if not resume:
            self._move_aside(stage)
        line = arguments(self.pipeline, stage, self.directory, resume=resume)
        note(f"$ {shlex.join(['anarcho', *line])}")
        record = Record(status="running", inputs={label: value for label, value in step.inputs.items() if value})
        self.state.stages[stage.name] = record
        self.state.save(self.directory)
        began = time.monotonic()
        status = self._launch(stage, line, record)
        record.exit_status, record.seconds = status, time.monotonic() - began
        record.process = record.process_created = None
        if status == 0:
            record.output = planner.outputs[stage.name] = planner.fingerprint(stage)
        stopped = status != 0 and self.processes.number is not None
        record.status = "stopped" if stopped else "failed" if status or record.output is None else "complete"
        self.state.save(self.directory)
        if status == 0 and record.output is None:
            raise PipelineError(
                f"the stage '{stage.name}' ended with status 0, but there is nothing at {self.directory / stage.name}; "
                "see what it printed"
            )
        if status == 0:
            note(f"{stage.name} is complete after {duration_text(record.seconds)}: {self.directory / stage.name}")
            for line in report_lines(self.directory / stage.name / REPORT_FILE):
                note(f"  {line}")
        return status

    def _launch(self, stage: Stage, line: list[str], record: Record) -> int:
        """Runs the process of a stage; a report appears whole or not at all."""

        def started(process: int) -> None:
            try:
                record.process_created = psutil.Process(process).create_time()
            except psutil.Error:  # It has ended already.
                return
            record.process = process
            self.state.save(self.directory)

        command = self.launch(line)
        if stage.command.output is not Output.report:
            return self.processes.run(command, output=STANDARD_ERROR, started=started)
        staging = self.directory / f".{stage.name}.partial"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        with (staging / REPORT_FILE).open("wb") as file:
            status = self.processes.run(command, output=file, started=started)
        if status == 0:
            staging.rename(self.directory / stage.name)
        return status

    def _move_aside(self, stage: Stage) -> None:
        output, number = self.directory / stage.name, 1
        if not output.exists():
            return
        while (aside := self.directory / f"{stage.name}.old-{number}").exists():
            number += 1
        output.rename(aside)
        note(f"moved the earlier output of {stage.name} to {aside}")

    def _accept(self, step: Step) -> None:
        """Records that a stage before --from is taken as it is, or the next run would run it after all."""
        inputs = {label: value for label, value in step.inputs.items() if value is not None}
        if step.accepted and step.output is not None and len(inputs) == len(step.inputs):
            record = self.state.stages[step.stage.name]
            record.inputs, record.output = inputs, step.output
            self.state.save(self.directory)

    def _say_how_to_go_on(self, what: str) -> None:
        line = ["anarcho", "pipeline", "run", str(self.pipeline.path)]
        if self.directory != default_directory(self.pipeline):
            line += ["--dir", str(self.directory)]
        for override in self.pipeline.overrides:
            line += ["--set", override]
        note(f"{what}; go on there with {shlex.join(line)}")


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    from anarcho_train.checkpoint import CheckpointError, lock_run

    try:
        lock = lock_run(directory)
    except CheckpointError as error:
        raise PipelineError(
            f"{directory} is in use by another pipeline; wait until it ends, stop it, or choose another --dir"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _refuse_running(state: State) -> None:
    """A pipeline that was killed may have left its stage running, which would write where the next one does."""
    for name, record in state.stages.items():
        if record.alive:
            raise PipelineError(
                f"the stage '{name}' of an earlier run still runs as process {record.process}; "
                "wait until it ends, or stop that process"
            )
