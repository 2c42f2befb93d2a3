"""`anarcho export`: hand a model on to transformers, mlx-lm or llama.cpp."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from anarcho_cli.commands.config import JsonOption
from anarcho_cli.models import Which


class Form(StrEnum):
    """What a model is written as."""

    hf = "hf"
    mlx = "mlx"
    gguf = "gguf"


_TYPES = {
    Form.hf: ("float32", "bfloat16", "float16"),
    Form.mlx: ("float32", "bfloat16", "float16"),
}


class ExportError(ValueError):
    """An export that is not possible; the message is one sentence for the user."""


def export(
    model: Annotated[Path, typer.Argument(metavar="RUN", help="A run, a checkpoint or a model directory.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="What to write; it must not be there yet.")],
    to: Annotated[Form, typer.Option("--to", help="A directory for transformers or mlx-lm, or a file for llama.cpp.")],
    element_type: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="float32, bfloat16 or float16, by default as it is; for GGUF f32, f16 (the default), bf16, q8_0, q5_1, "
            "q5_0, q4_1 or q4_0.",
        ),
    ] = None,
    licence: Annotated[str | None, typer.Option("--license", help="Licence to name, such as `mit`.")] = None,
    checkpoint: Annotated[Which, typer.Option("--checkpoint", help="Which checkpoint of a run.")] = Which.last,
    json: JsonOption = False,
) -> None:
    """Write a model for other programs, with its tokenizer and chat template; prints what was written."""
    from anarcho_cli.models import find_model
    from anarcho_cli.output import note, print_json
    from anarcho_cli.places import refuse_existing

    if to is Form.gguf:
        from anarcho_model.gguf.writing import check_element_type

        check_element_type(element_type or "f16")
    elif element_type is not None and element_type not in _TYPES[to]:
        raise ExportError(f"--type is {element_type!r}; expected one of {', '.join(_TYPES[to])} for --to {to.value}")
    refuse_existing(out, option="--out")
    directory = find_model(model, which=checkpoint)

    from anarcho_cli.exporting import export_directory, export_gguf

    notes: list[str] = []
    if to is Form.gguf:
        _, notes = export_gguf(directory, out, source=model, element_type=element_type or "f16", licence=licence)
    else:
        export_directory(directory, out, source=model, dtype=element_type, licence=licence)
    if json:
        print_json({"model": str(directory), "to": to.value, "out": str(out), "notes": notes})
        return
    for sentence in notes:
        note(sentence)
    print(out)
