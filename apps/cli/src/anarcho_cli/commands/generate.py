"""`anarcho generate`: let a model continue a text, or many at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
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
    from anarcho_cli.writing import Completion


def generate(
    model: Model,
    prompt: Annotated[
        list[str] | None,
        typer.Argument(help="Texts to continue; left out or `-`, standard input as a whole.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help="More texts: a file of one a line, or *.jsonl with `prompt`; `-`, lines of input."
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    checkpoint: Checkpoint = Which.last,
    backend: RunsWith = None,
    device: RunsOn = Device.auto,
    kv_bits: KvBits = None,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Most texts to write at once.")] = 16,
    json: Annotated[
        bool, typer.Option("--json", help="Print an object with text, tokens and time; of several texts, one a line.")
    ] = False,
) -> None:
    """Continue a text with a trained model, as it is written, or several texts, which are written together."""
    from anarcho_model.generate.sampling import SamplingConfig

    from anarcho_cli.models import find_model

    config = SamplingConfig(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    )
    directory = find_model(model, which=checkpoint)
    texts = _read_prompts(prompt or [], prompts)

    from anarcho_cli.writing import Writer

    writer = Writer.load(directory, **chosen_place(backend, device), kv_bits=kv_bits)
    if prompts is not None or len(texts) > 1:
        _print_all(texts, writer.complete_all(texts, config=config, slots=slots), model=directory, json=json)
    elif json:
        from anarcho_cli.output import print_json

        completion = writer.complete(texts[0], config=config)
        print_json({"model": str(directory), "prompt": texts[0], **completion.to_dict()})
    else:
        _print_stream(writer.stream(texts[0], config=config))


def _read_prompts(arguments: list[str], file: Path | None) -> list[str]:
    """The arguments and then the file's texts; standard input, which is read once, where they say so or there are none."""
    if [*arguments, str(file)].count("-") > 1:
        raise ValueError("standard input (`-`) is asked for more than once; name it once")
    texts = [_read_input() if argument == "-" else argument for argument in arguments]
    if file is not None:
        raw = typer.get_binary_stream("stdin").read() if str(file) == "-" else file.read_bytes()
        texts += _texts_of(_decoded(raw, name=str(file)), name=str(file), rows=file.suffix in (".jsonl", ".json"))
        if not texts:
            raise ValueError(f"{file} holds no prompt; expected one a line")
    elif not texts:
        # A terminal is not waited for.
        texts = ["" if sys.stdin.isatty() else _read_input()]
    return texts


def _read_input() -> str:
    """Standard input as one text, without the line end that `echo` adds, as in a shell's own $(...)."""
    return _decoded(typer.get_binary_stream("stdin").read(), name="the prompt on standard input").removesuffix("\n")


def _decoded(raw: bytes, *, name: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start}); convert it") from error


def _texts_of(content: str, *, name: str, rows: bool) -> list[str]:
    """The text of each line that is not blank; of JSON rows it is `prompt`, or `text`."""
    # Lines end at line feeds alone: JSON strings may hold other characters that str.splitlines parts at.
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(content.split("\n"), start=1)]
    filled = [(number, line) for number, line in lines if line.strip()]
    return [_text_of_row(line, place=f"{name}:{number}") if rows else line for number, line in filled]


def _text_of_row(line: str, *, place: str) -> str:
    from json import JSONDecodeError, loads

    try:
        row = loads(line)
    except JSONDecodeError as error:
        raise ValueError(f"{place} is no JSON ({error.msg}); expected an object with `prompt`") from error
    text = row.get("prompt", row.get("text")) if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise ValueError(f"{place} has no text; expected an object with `prompt` or `text`, or a string")
    return text


def _print_all(texts: list[str], completions: Iterator[Completion], *, model: Path, json: bool) -> None:
    """Each text as soon as those before it are there: a line of JSON, or the prompt with its continuation."""
    from json import dumps

    from anarcho_cli.output import printable

    safe = printable if sys.stdout.isatty() else str
    for number, (text, completion) in enumerate(zip(texts, completions, strict=True), start=1):
        if json:
            line = dumps({"model": str(model), "prompt": text, **completion.to_dict()}, ensure_ascii=False)
        else:
            line = f"--- {number} of {len(texts)}\n{text}{completion.text}"
        typer.echo(safe(line).encode("utf-8"))


def _print_stream(pieces: Iterator[str]) -> None:
    """Each piece at once; on a terminal without the control characters that a model may emit."""
    from anarcho_cli.output import printable

    safe = printable if sys.stdout.isatty() else str
    for piece in pieces:
        typer.echo(safe(piece).encode("utf-8"), nl=False)
    typer.echo()
