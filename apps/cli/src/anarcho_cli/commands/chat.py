"""`anarcho chat`: converse with a model, on a terminal or through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anarcho_cli.devices import Device
from anarcho_cli.models import Which
from anarcho_cli.sampling_options import (
    Checkpoint,
    KvBits,
    MaxNewTokens,
    MinP,
    Model,
    RunsOn,
    RunsWith,
    Seed,
    Temperature,
    TopK,
    TopP,
    chosen_place,
)

if TYPE_CHECKING:
    from anarcho_cli.chatting import Chat

HELP = """\
/help            this list
/retry           answer the last message again
/undo            forget the last message with its answer
/reset           forget the conversation; the system message stays
/history         show what was said
/system TEXT     set the system message; without a text, take it away
/set NAME VALUE  change temperature, top-k, top-p, min-p, max-new-tokens or seed; alone, show them
/save FILE       write the conversation as a line of JSON
/load FILE       go on with a conversation from a file
/exit            leave, as the end of the input does
A message that begins with a slash is written with two. Ctrl-C stops an answer."""


def chat(
    model: Model,
    system: Annotated[str, typer.Option("--system", "-s", help="Message that stands before the conversation.")] = "",
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    checkpoint: Checkpoint = Which.last,
    backend: RunsWith = None,
    device: RunsOn = Device.auto,
    kv_bits: KvBits = None,
) -> None:
    """Converse with a model that was fine-tuned on conversations; a line is a message, /help lists what else there is."""
    from anarcho_model.generate.sampling import SamplingConfig

    from anarcho_cli.models import find_model

    config = SamplingConfig(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    )
    directory = find_model(model, which=checkpoint)

    from anarcho_cli.chatting import Chat
    from anarcho_cli.writing import Writer

    conversation = Chat(
        Writer.load(directory, **chosen_place(backend, device), kv_bits=kv_bits), config=config, system=system
    )
    for line in _lines():
        if line == "/exit":
            break
        if line.startswith("/") and not line.startswith("//"):
            _obey(conversation, line)
        elif line:
            _answer(conversation, line[1:] if line.startswith("//") else line)


def _lines() -> Iterator[str]:
    """The lines of standard input, with a prompt and line editing where somebody is typing."""
    if not sys.stdin.isatty():
        for number, raw in enumerate(typer.get_binary_stream("stdin"), start=1):
            try:
                yield raw.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number} of standard input is not UTF-8 text; convert it") from error
        return
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # importing it gives `input` its line editing

    typer.echo("/help lists the commands, /exit leaves.", err=True)
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo("\n/exit leaves.", err=True)


def _answer(conversation: Chat, question: str) -> None:
    """Print the answer as it is written, up to its end or an interrupt."""
    from anarcho_cli.chatting import ChatError
    from anarcho_cli.output import note, printable

    safe = printable if sys.stdout.isatty() else str
    omitted = conversation.omitted_turns
    try:
        with closing(conversation.answer(question)) as pieces:
            for piece in pieces:
                typer.echo(safe(piece).encode("utf-8"), nl=False)
    except KeyboardInterrupt:
        typer.echo()
        note("stopped")
        return
    except ChatError as error:
        note(str(error))
        return
    typer.echo()
    if conversation.omitted_turns > omitted:
        note(f"the model no longer reads the first {conversation.omitted_turns} turns, which do not fit its context")


def _obey(conversation: Chat, line: str) -> None:
    """Run a line that begins with a slash; what goes wrong is said, and the conversation goes on."""
    from anarcho_cli.errors import explain
    from anarcho_cli.output import note

    command, _, value = line.partition(" ")
    value = value.strip()
    try:
        match command:
            case "/help":
                note(HELP)
            case "/retry":
                _answer(conversation, conversation.undo())
            case "/undo":
                note(f"forgot {_quoted(conversation.undo())}")
            case "/reset":
                conversation.reset()
            case "/history":
                _show_history(conversation)
            case "/set":
                _set(conversation, value)
            case "/system":
                conversation.system = value
            case "/save" | "/load" if not value:
                note(f"{command} needs the name of a file")
            case "/save":
                conversation.save(Path(value).expanduser())
                note(f"saved {_turns(conversation)} to {value}")
            case "/load":
                conversation.load(Path(value).expanduser())
                note(f"loaded {_turns(conversation)} from {value}")
            case _:
                note(f"there is no command {command}; /help lists them, and // begins a message with a slash")
    except (OSError, ValueError) as error:
        note(explain(error)[0])


def _set(conversation: Chat, value: str) -> None:
    """Change an option, or show all where none is named."""
    from anarcho_cli.chatting import OPTIONS
    from anarcho_cli.output import note

    name, _, new = value.replace("=", " ", 1).partition(" ")
    if new.strip():
        conversation.set_option(name, new.strip())
    elif name:
        note(f"/set {name} needs a value")
    else:
        note(", ".join(f"{option} {getattr(conversation.config, option)}" for option in OPTIONS))


def _show_history(conversation: Chat) -> None:
    """All messages on standard error, those that the model no longer reads included."""
    from anarcho_cli.output import printable

    if conversation.system:
        typer.echo(f"system: {printable(conversation.system)}", err=True)
    for message in conversation.messages:
        typer.echo(f"{message.role}: {printable(message.content)}", err=True)


def _turns(conversation: Chat) -> str:
    count = len(conversation.messages) // 2
    return f"{count} {'turn' if count == 1 else 'turns'}"


def _quoted(text: str) -> str:
    """A message on one line, cut where it is long."""
    from anarcho_cli.output import printable

    line = " ".join(printable(text).split())
    return repr(line if len(line) <= 60 else f"{line[:57]}...")
