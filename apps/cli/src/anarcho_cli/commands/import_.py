"""`anarcho import`: take over a model that was made elsewhere."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from anarcho_cli.commands.config import JsonOption


class ElementType(StrEnum):
    """How weights are stored in a directory."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def import_(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A Hugging Face directory, or a GGUF file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write; it must not be there yet.")],
    dtype: Annotated[
        ElementType | None,
        typer.Option("--dtype", help="Type of the weights; left out, a directory's own, and float32 for GGUF."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Take over a Llama or Qwen3 with its tokenizer, to generate from, tune and export; prints the new directory."""
    from anarcho_cli.importing import import_model
    from anarcho_cli.models import ModelNotFoundError
    from anarcho_cli.output import note, print_json
    from anarcho_cli.places import refuse_existing

    if not model.exists():
        raise ModelNotFoundError(f"{model} is not there; expected a Hugging Face directory or a GGUF file")
    refuse_existing(out, option="--out")
    facts = import_model(model, out, dtype=dtype)
    if json:
        print_json(facts)
        return
    note(f"a {facts['architecture']} of {facts['parameters']:,} parameters, stored as {facts['stored_as']}")
    print(out)
