"""`anarcho generate`: let a model continue a text."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from anarcho_cli.devices import Device
from anarcho_cli.models import Which


def generate(
    model: Annotated[Path, typer.Argument(metavar="RUN", help="A run, a checkpoint or a model directory.")],
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; left out or `-`, standard input.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens to add.")] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="0 always takes the likeliest token.")
    ] = 0.8,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Draw among the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Draw among the likeliest that hold this share.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option("--min-p", help="Least probability, relative to the likeliest.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the draws, to repeat a text.")] = None,
    checkpoint: Annotated[Which, typer.Option("--checkpoint", help="Which checkpoint of a run.")] = Which.last,
    device: Annotated[Device, typer.Option("--device", help="Where the model runs.")] = Device.auto,
    json: Annotated[bool, typer.Option("--json", help="Print one object with text, tokens and time.")] = False,
) -> None:
    """Continue a text with a trained model, as it is written."""
    from anarcho_model.generate.sampling import SamplingConfig

    from anarcho_cli.models import find_model

    config = SamplingConfig(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    )
    directory = find_model(model, which=checkpoint)
    text = _read_prompt(prompt)

    from anarcho_cli.devices import resolve_device
    from anarcho_cli.output import print_json
    from anarcho_cli.writing import Writer

    writer = Writer.load(directory, device=resolve_device(device).device)
    if json:
        print_json({"model": str(directory), "prompt": text, **writer.complete(text, config=config).to_dict()})
        return
    _print_stream(writer.stream(text, config=config))


def _read_prompt(prompt: str | None) -> str:
    """The prompt argument, or standard input where there is none; a terminal is not waited for."""
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        return ""
    raw = typer.get_binary_stream("stdin").read()
    try:
        # Without the line end that `echo` adds, as in a shell's own $(...).
        return raw.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt on standard input is not UTF-8 text (byte {error.start}); convert it") from error


def _print_stream(pieces: Iterator[str]) -> None:
    """Each piece at once; on a terminal without the control characters that a model may emit."""
    from anarcho_cli.output import printable

    safe = printable if sys.stdout.isatty() else str
    for piece in pieces:
        typer.echo(safe(piece).encode("utf-8"), nl=False)
    typer.echo()
