"""Which stages of a pipeline have to run, and why: a stage whose inputs and output are what they were is skipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from anarcho_cli.layers import suggestion
from anarcho_cli.pipeline.definition import REFERENCE, Pipeline, Stage
from anarcho_cli.pipeline.errors import PipelineError
from anarcho_cli.pipeline.fingerprints import TABLE, VERSION, known_inputs, output_fingerprint, short
from anarcho_cli.pipeline.stage_commands import Output
from anarcho_cli.pipeline.state import Record, State
from anarcho_cli.runs import RunError, existing_run

Action = Literal["run", "resume", "skip"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is to be done about one stage."""

    stage: Stage
    """The stage."""
    action: Action
    """What to do."""
    why: str
    """The reason, in words."""
    inputs: Mapping[str, str | None]
    """Label -> hash; None of a stage whose output is not known yet."""
    output: str | None = None
    """What its output is; None where it has to run."""
    accepted: bool = False
    """Whether it is skipped because of --from, whatever changed."""

    def to_dict(self) -> dict[str, Any]:
        """The step as JSON, hashes in full."""
        return {
            "name": self.stage.name,
            "command": self.stage.command_name,
            "action": self.action,
            "why": self.why,
            "inputs": dict(self.inputs),
        }

    def row(self) -> tuple[str, ...]:
        """The step as a row of a table, hashes in twelve characters."""
        inputs = "\n".join(f"{short(value)} {label}" for label, value in self.inputs.items())
        return self.stage.name, self.stage.command_name, inputs, self.action, self.why


class Planner:
    """Decides stage after stage; ``outputs`` holds what the earlier ones have come to."""

    def __init__(self, pipeline: Pipeline, directory: Path, state: State, *, start: str | None = None) -> None:
        names = [stage.name for stage in pipeline.stages]
        if start is not None and start not in names:
            raise PipelineError(
                f"--from {start!r} is no stage of {pipeline.path}{suggestion(start, names)}; "
                f"its stages are {', '.join(names)}"
            )
        self.directory, self.state, self.start = directory, state, start
        self._before = set(names[: names.index(start)]) if start is not None else set()
        self.outputs: dict[str, str | None] = {}

    def step(self, stage: Stage) -> Step:
        """What to do about the next stage; raises PipelineError where --from left out one that it needs."""
        inputs: dict[str, str | None] = dict(known_inputs(stage, self.state.hashes))
        inputs |= {REFERENCE + name: self.outputs[name] for name in stage.uses}
        step = self._decide(stage, inputs)
        if stage.name not in self._before:
            for name in stage.uses:
                if name in self._before and self.outputs[name] is None:
                    raise PipelineError(
                        f"--from {self.start}: the stage '{stage.name}' uses '{name}', which is not complete; "
                        f"begin at '{name}', or leave --from out"
                    )
        self.outputs[stage.name] = step.output
        return step

    def fingerprint(self, stage: Stage) -> str | None:
        """What the output of a stage is now."""
        return output_fingerprint(self.directory / stage.name, self.state.hashes)

    def _decide(self, stage: Stage, inputs: Mapping[str, str | None]) -> Step:
        record = self.state.stages.get(stage.name)
        output = self.fingerprint(stage) if record is not None and record.status == "complete" else None
        if stage.name in self._before:
            why = f"before --from {self.start}"
            return Step(stage=stage, action="skip", why=why, inputs=inputs, output=output, accepted=True)
        if stage.name == self.start:
            return Step(stage=stage, action="run", why="--from begins here", inputs=inputs)
        if record is None:
            return Step(stage=stage, action="run", why="never run", inputs=inputs)
        if changed := _changes(record.inputs, inputs):
            return Step(stage=stage, action="run", why=changed, inputs=inputs)
        if record.status != "complete":
            return Step(stage=stage, action=self._again(stage), why=_ending(record), inputs=inputs)
        if output != record.output:
            why = "its output is gone" if output is None else "its output was changed"
            return Step(stage=stage, action="run", why=why, inputs=inputs)
        return Step(stage=stage, action="skip", why="nothing changed", inputs=inputs, output=output)

    def _again(self, stage: Stage) -> Action:
        """How to repeat a stage that did not end well."""
        output = self.directory / stage.name
        if stage.command.output is not Output.run:
            return "resume" if stage.command.continues and output.exists() else "run"
        try:
            existing_run(output)
        except RunError:
            return "run"
        return "resume"


def make_plan(pipeline: Pipeline, directory: Path, state: State, *, start: str | None = None) -> list[Step]:
    """The steps as they are foreseen: of a stage that runs, it is not known yet whether its output will change."""
    planner = Planner(pipeline, directory, state, start=start)
    return [planner.step(stage) for stage in pipeline.stages]


def _changes(before: Mapping[str, str], now: Mapping[str, str | None]) -> str:
    """What is different, in words; nothing where all is the same."""
    known = {label: value for label, value in now.items() if value is not None}
    changed = [label for label, value in known.items() if before.get(label) != value]
    changed += [label for label in before if label not in now]
    if changed:
        return ", ".join(map(_change, changed))
    pending = [label.removeprefix(REFERENCE) for label, value in now.items() if value is None]
    return f"after {' and '.join(pending)}" if pending else ""


def _change(label: str) -> str:
    words = {TABLE: "its table changed", VERSION: "the program has another version"}
    return words.get(label, f"{label.removeprefix(REFERENCE)} changed")


def _ending(record: Record) -> str:
    if record.status == "failed":
        return f"failed with status {record.exit_status}"
    return "was stopped" if record.status == "stopped" else "was interrupted"
