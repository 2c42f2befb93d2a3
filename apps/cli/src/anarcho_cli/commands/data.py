"""`anarcho data`: turn text into token shards, or look into shards."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anarcho_cli.commands.config import FileOption, JsonOption, SetOption

if TYPE_CHECKING:
    from anarcho_tokenize import ShardsReport

app = typer.Typer(help="Turn text into token shards, or look into shards.", no_args_is_help=True)


@app.command()
def prepare(
    tokenizer: Annotated[Path, typer.Option("--tokenizer", help="A tokenizer or model directory.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write; it must not be there yet.")],
    source: Annotated[
        str, typer.Argument(metavar="SPEC", help="Text: a file, glob, directory, or `embedded`.")
    ] = "embedded",
    file: FileOption = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Tokenize a text into training and validation shards; prints their directory."""
    from anarcho_cli.config import resolve
    from anarcho_cli.layers import Layer
    from anarcho_cli.output import print_json
    from anarcho_cli.places import refuse_existing

    refuse_existing(out, option="--out")
    layer = Layer(origin="SPEC", sections={"data": {"source": source}})
    settings = resolve(preset=None, file=file, overrides=overrides or [], options=[layer]).data

    from anarcho_tokenize import Tokenizer, prepare_shards, read_documents

    prepare_shards(
        read_documents(settings.source, text_field=settings.text_field, document_separator=settings.document_separator),
        Tokenizer.load(tokenizer),
        out,
        validation_fraction=settings.validation_fraction,
        shard_tokens=settings.shard_tokens,
        source=settings.source,
        num_threads=settings.num_threads,
    )
    if json:
        splits = {name: dataclasses.asdict(report) for name, report in _reports(out).items()}
        print_json({"directory": str(out), "splits": splits})
    else:
        print(out)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A directory of shards, or a run.")],
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Show the beginning of the first document with this tokenizer.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every shard with its recorded sha256.")] = False,
    json: JsonOption = False,
) -> None:
    """Show how much text a directory of shards holds."""
    from anarcho_cli.output import print_json, print_table, printable

    reports = _reports(path, tokenizer=tokenizer, verify=verify)
    if json:
        print_json({name: dataclasses.asdict(report) for name, report in reports.items()})
        return
    columns = ["split", "#documents", "#tokens", "#bytes", "#bytes/token", "#median length", "fingerprint", "source"]
    rows = []
    for name, report in reports.items():
        counts = (report.documents, report.tokens, report.bytes, f"{report.bytes_per_token:.2f}")
        median = report.length_quantiles.get(0.5, "-")
        rows.append((name, *counts, median, report.fingerprint[:12], report.source))
    print_table(columns, rows)
    for name, report in reports.items():
        if report.first_document is not None:
            print(f"{name} begins:\n\n{printable(report.first_document)}\n")


def _reports(path: Path, *, tokenizer: Path | None = None, verify: bool = False) -> dict[str, ShardsReport]:
    """Name of a split -> what its shards hold; a run's shards lie in its `data` folder."""
    from anarcho_tokenize import Tokenizer, TokenShards, inspect_shards

    root = path / "data" if (path / "data").is_dir() else path
    folders = [root / name for name in ("train", "validation") if (root / name).is_dir()]
    decoder = None if tokenizer is None else Tokenizer.load(tokenizer)
    reports: dict[str, ShardsReport] = {}
    for folder in folders or [root]:
        shards = TokenShards.open(folder)
        if verify:
            shards.verify()
        reports[folder.name] = inspect_shards(shards, decoder)
    return reports
