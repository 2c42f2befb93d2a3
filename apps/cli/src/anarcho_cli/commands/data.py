"""`anarcho data`: turn text into token shards, or look into shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from anarcho_cli.commands.config import FileOption, JsonOption, SetOption

app = typer.Typer(help="Turn text into token shards, or look into shards.", no_args_is_help=True)


@app.command()
def prepare(
    tokenizer: Annotated[Path, typer.Option("--tokenizer", help="A tokenizer or model directory.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write; it must not be there yet.")],
    source: Annotated[
        str, typer.Argument(metavar="[SPEC]", help="Text: a file, glob, directory, or `embedded`.")
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
        read_documents(settings.source, text_field=settings.text_field),
        Tokenizer.load(tokenizer),
        out,
        validation_fraction=settings.validation_fraction,
        shard_tokens=settings.shard_tokens,
        source=settings.source,
    )
    if json:
        print_json({"directory": str(out), "splits": _splits(out)})
    else:
        print(out)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A directory of shards, or a run.")],
    verify: Annotated[bool, typer.Option("--verify", help="Compare every shard with its recorded sha256.")] = False,
    json: JsonOption = False,
) -> None:
    """Show how much text a directory of shards holds."""
    from anarcho_cli.output import print_json, print_table

    splits = _splits(path, verify=verify)
    if json:
        print_json(splits)
        return
    columns = ["split", "#documents", "#tokens", "#bytes", "#bytes/token", "#vocabulary", "fingerprint"]
    rows = []
    for name, facts in splits.items():
        ratio = f"{facts['bytes'] / facts['tokens']:.2f}" if facts["tokens"] else "-"
        counts = (facts["documents"], facts["tokens"], facts["bytes"], ratio, facts["vocab_size"])
        rows.append((name, *counts, facts["fingerprint"][:16]))
    print_table(columns, rows)


def _splits(path: Path, *, verify: bool = False) -> dict[str, dict[str, Any]]:
    """Name of a split -> what its shards hold; a run's shards lie in its `data` folder."""
    from anarcho_tokenize import TokenShards

    root = path / "data" if (path / "data").is_dir() else path
    folders = [root / name for name in ("train", "validation") if (root / name).is_dir()]
    facts: dict[str, dict[str, Any]] = {}
    for folder in folders or [root]:
        shards = TokenShards.open(folder)
        if verify:
            shards.verify()
        facts[folder.name] = {
            "documents": shards.num_documents,
            "tokens": shards.num_tokens,
            "bytes": shards.num_bytes,
            "vocab_size": shards.vocab_size,
            "tokenizer_sha256": shards.tokenizer_sha256,
            "fingerprint": shards.fingerprint,
        }
    return facts
