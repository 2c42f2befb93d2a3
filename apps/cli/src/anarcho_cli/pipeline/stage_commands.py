"""The commands that a stage of a pipeline can be: what each takes from an earlier stage, and where its output lies."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from anarcho_cli.layers import CONTINUED_PRESET, DEFAULT_PRESET

RUNS = ("pretrain", "sft", "preference")
"""Commands whose output is a run."""
MODELS = (*RUNS, "export")
"""Commands whose output holds a model and its tokenizer."""
REPORT_FILE = "report.json"
"""Where the answer of a command stands that only prints one."""
RUN_TOKENIZER = "tokenizer"


class Output(StrEnum):
    """What a command leaves behind."""

    run = "run"
    """A run directory, which can be resumed."""
    directory = "directory"
    """A directory that the command is told with --out."""
    report = "report"
    """A JSON object on standard output."""


@dataclass(frozen=True, kw_only=True)
class StageCommand:
    """One command as a stage."""

    words: tuple[str, ...]
    """The command on the command line."""
    output: Output
    """What it leaves behind."""
    base_option: str | None = None
    """Option that names what it is `from`; None where that is its argument."""
    model_option: str | None = None
    """The option in its place where that has a model, if it is another."""
    accepts: tuple[str, ...] = MODELS
    """The commands that stage may have; none where it is from nothing."""
    needs_base: bool = True
    """Whether it cannot do without."""
    many: bool = False
    """Whether it takes several."""
    continues: bool = False
    """Whether the same command goes on where it was interrupted; runs do so in any case."""
    preset: str | None = None
    """The preset with which it begins, if it has any."""
    preset_with_model: str | None = None
    """The same where it goes on with a model."""
    configured: bool = True
    """Whether it reads the configuration of runs, so that the keys of `set` are known."""

    @property
    def resumable(self) -> bool:
        """Whether an interrupted output is of use."""
        return self.continues or self.output is Output.run


COMMANDS: dict[str, StageCommand] = {
    "tokenizer": StageCommand(words=("tokenizer", "train"), output=Output.directory, accepts=(), needs_base=False),
    "prepare": StageCommand(
        words=("data", "prepare"),
        output=Output.directory,
        base_option="tokenizer",
        accepts=("tokenizer", *MODELS),
        continues=True,
    ),
    "pretrain": StageCommand(
        words=("pretrain",),
        output=Output.run,
        base_option="tokenizer",
        model_option="from",
        accepts=("tokenizer", *MODELS),
        needs_base=False,
        preset=DEFAULT_PRESET,
        preset_with_model=CONTINUED_PRESET,
    ),
    "sft": StageCommand(words=("sft",), output=Output.run, base_option="from", preset_with_model="sft"),
    "preference": StageCommand(
        words=("preference",), output=Output.run, base_option="from", preset_with_model="preference"
    ),
    "eval": StageCommand(words=("eval",), output=Output.report, many=True, configured=False),
    "export": StageCommand(words=("export",), output=Output.directory, accepts=RUNS, configured=False),
}


def tokenizer_of(command: str, output: Path) -> Path:
    """Where the tokenizer lies in the output of a command."""
    return output / RUN_TOKENIZER if command in RUNS else output
