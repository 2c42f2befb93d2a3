"""The ``anarcho`` command: its tree of commands and global options.

Nothing heavy is imported here or at the top of a command module, so that ``anarcho --help`` answers at once; a command
imports what it needs when it runs. Help is plain text, because rich alone would double the time it takes.
"""

from __future__ import annotations

from typing import Annotated

import typer

from anarcho_cli.commands import (
    bench,
    chat,
    checkpoint,
    config,
    data,
    doctor,
    evaluate,
    export,
    generate,
    import_,
    launch,
    pipeline,
    plan,
    pretrain,
    report,
    serve,
    tokenizer,
    tune,
    watch,
)
from anarcho_cli.errors import CommandGroup

app = typer.Typer(
    name="anarcho",
    cls=CommandGroup,
    help="Train a small language model from raw text, and use it.",
    epilog="Start with `anarcho pretrain`; `anarcho COMMAND --help` explains a command.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("plan")(plan.plan)
app.command("pretrain")(pretrain.pretrain)
app.command("sft")(tune.sft)
app.command("preference")(tune.preference)
app.command("launch", context_settings=launch.CONTEXT)(launch.launch)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("eval")(evaluate.evaluate)
app.command("report")(report.report)
app.command("watch")(watch.watch)
app.command("import")(import_.import_)
app.command("export")(export.export)
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(data.app, name="data")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(config.app, name="config")
app.add_typer(pipeline.app, name="pipeline")
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"anarcho {version('anarcho-cli')}")
        raise typer.Exit


@app.callback()
def _global_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the command; `errors.CommandGroup` reads `debug` from the context."""


def run() -> None:
    """Entry point of the `anarcho` script."""
    app()
