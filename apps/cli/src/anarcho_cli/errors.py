"""The error boundary: what a user did wrong becomes one sentence and exit status 2, never a traceback.

The packages raise ValueError (or an OSError) whose message is a sentence for the user. A ValueError from inside a
library says nothing to a user and is treated as a defect: exit status 1, and a hint at ``--debug``.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

BAD_INPUT = 2
DEFECT = 1
RANK_LOST = 75
"""EX_TEMPFAIL of sysexits.h: started again, the run goes on."""
INTERRUPTED = 130

at_end: list[Callable[[], None]] = []
"""What a command leaves to be done when it has said all that there is to say."""

_LESS_MEMORY = (
    "a run takes less with a smaller train.micro_batch (or 'auto'), train.gradient_checkpointing = true or a shorter "
    "train.sequence_length, which `--dry-run` shows; other commands with a shorter context"
)
_LESS_MEMORY_READING = (
    "this takes less with a smaller --slots, --context or --batch-tokens, where the command has it, or with a smaller "
    "max_position_embeddings in the model's config.json"
)
_READING = ("chat", "eval", "generate", "serve")
"""Commands that read a model and train none."""


class CommandGroup(TyperGroup):
    """The root of the command line, with the boundary around whatever command runs."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise typer.Exit(INTERRUPTED) from error
        except Exception as error:
            # `format_message` marks Typer's own usage errors, which it reports itself with exit status 2.
            if isinstance(error, typer.Exit | typer.Abort | BrokenPipeError) or hasattr(error, "format_message"):
                raise
            if ctx.params.get("debug"):
                traceback.print_exception(error)
            message, code = explain(error, command=ctx.invoked_subcommand)
            print(f"anarcho: error: {_place()}{message}", file=sys.stderr)
            raise typer.Exit(code) from error
        finally:
            while at_end:
                at_end.pop()()


def _place() -> str:
    """Which of several processes it is that says something, unless it is the first."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    rank = os.environ.get("MLX_RANK") or ("0" if alone else os.environ.get("RANK", "0"))
    return "" if rank == "0" else f"rank {rank}: "


def explain(error: Exception, *, command: str | None = None) -> tuple[str, int]:
    """One sentence and the exit status for an exception, within this command."""
    if type(error).__name__ == "RankLost":
        return str(error), RANK_LOST
    if isinstance(error, OSError):
        return _file_sentence(error), BAD_INPUT
    if isinstance(error, ValueError) and _raised_by_us(error):
        return " ".join(str(error).split()), BAD_INPUT
    if isinstance(error, ImportError) and _missing_extra(error):
        return _missing_extra(error), BAD_INPUT
    if _out_of_memory(error):
        return (
            f"out of memory ({_summary(error)}); {_LESS_MEMORY_READING if command in _READING else _LESS_MEMORY}",
            BAD_INPUT,
        )
    return (
        f"unexpected {type(error).__name__}: {_summary(error)}; run again with `anarcho --debug ...` for details",
        DEFECT,
    )


def _summary(error: Exception) -> str:
    return " ".join(str(error).split())


def _out_of_memory(error: Exception) -> bool:
    """Whether a framework found no memory; loads what knows their words only now."""
    from anarcho_train.out_of_memory import is_out_of_memory

    return is_out_of_memory(error)


def _file_sentence(error: OSError) -> str:
    """The message of an OSError, without the errno of those that the operating system raised."""
    if error.strerror is None:
        return " ".join(str(error).split())
    reason = error.strerror[:1].lower() + error.strerror[1:]
    return f"{error.filename}: {reason}" if error.filename is not None else reason


def _raised_by_us(error: Exception) -> bool:
    """Whether the code that raised the exception belongs to this project."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").split(".")[0].startswith("anarcho_")


def _missing_extra(error: ImportError) -> str:
    """How to install a back-end that is not there, or nothing where the import failed for another reason."""
    name = "mlx" if error.name == "mlx.core" else error.name
    if isinstance(error, ModuleNotFoundError) and name in ("torch", "mlx"):
        return f"this command needs {name}, which is not installed; run `pip install 'anarcho-cli[{name}]'`"
    return ""
