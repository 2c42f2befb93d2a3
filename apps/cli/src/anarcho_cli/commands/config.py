"""`anarcho config`: look at the configuration, its schema and the presets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Look at the configuration.", no_args_is_help=True)

PresetOption = Annotated[str, typer.Option("--preset", help="Preset under the file; `config presets` lists them.")]
FileOption = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file with settings.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: --set train.steps=100.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def show(
    preset: PresetOption = "quickstart",
    file: FileOption = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Print the configuration that these options come to, as TOML."""
    from anarcho_cli.config import dumps, resolve, to_dict
    from anarcho_cli.output import print_json

    config = resolve(preset=preset, file=file, overrides=overrides or ())
    if json:
        print_json(to_dict(config))
    else:
        print(dumps(config), end="")


@app.command()
def schema() -> None:
    """Print the JSON Schema of the configuration file, for editors that check and complete TOML."""
    from anarcho_cli.config import json_schema
    from anarcho_cli.output import print_json

    print_json(json_schema())


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="Print this preset's file instead of the list.")] = None,
    json: JsonOption = False,
) -> None:
    """List the presets, or print one of them."""
    from anarcho_cli.config import preset_names, preset_text, resolve
    from anarcho_cli.output import count_text, print_json, print_table

    if name is not None:
        print(preset_text(name), end="")
        return
    rows = []
    for preset in preset_names():
        config = resolve(preset=preset)
        parameters, purpose = config.model.num_parameters, _purpose(preset_text(preset))
        tokens = None if config.train.epochs else config.total_tokens  # else it depends on the text
        rows.append({"name": preset, "parameters": parameters, "tokens": tokens, "purpose": purpose})
    rows.sort(key=lambda row: row["parameters"])
    if json:
        print_json(rows)
        return
    texts = ["all" if row["tokens"] is None else count_text(row["tokens"]) for row in rows]
    cells = [
        (row["name"], count_text(row["parameters"]), tokens, row["purpose"])
        for row, tokens in zip(rows, texts, strict=True)
    ]
    print_table(["preset", "#parameters", "#tokens", "purpose"], cells)


def _purpose(text: str) -> str:
    """The leading comment of a preset."""
    lines = text.splitlines()
    comment = lines[: next((index for index, line in enumerate(lines) if not line.startswith("#")), len(lines))]
    return " ".join(line.lstrip("# ") for line in comment)
