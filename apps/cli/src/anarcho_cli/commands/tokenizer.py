"""`anarcho tokenizer`: train a tokenizer on a text, or look into one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anarcho_cli.commands.config import FileOption, JsonOption, SetOption

if TYPE_CHECKING:
    from anarcho_tokenize import TokenizerReport

app = typer.Typer(help="Train a tokenizer, or look into one.", no_args_is_help=True)


@app.command()
def train(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write; it must not be there yet.")],
    source: Annotated[
        str, typer.Argument(metavar="SPEC", help="Text: a file, glob, directory, or `embedded`.")
    ] = "embedded",
    vocab_size: Annotated[
        int | None, typer.Option("--vocab-size", help="Number of tokens; sets tokenizer.vocab_size.")
    ] = None,
    file: FileOption = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Train a tokenizer on a text; prints its directory."""
    from anarcho_cli.config import resolve
    from anarcho_cli.layers import Layer
    from anarcho_cli.output import note, print_json
    from anarcho_cli.places import refuse_existing

    refuse_existing(out, option="--out")
    options = [Layer(origin="SPEC", sections={"data": {"source": source}})]
    if vocab_size is not None:
        options.append(Layer(origin="--vocab-size", sections={"tokenizer": {"vocab_size": vocab_size}}))
    config = resolve(preset=None, file=file, overrides=overrides or [], options=options)

    from anarcho_tokenize import read_documents, train_tokenizer

    tokenizer = train_tokenizer(
        read_documents(
            config.data.source,
            text_field=config.data.text_field,
            document_separator=config.data.document_separator,
        ),
        config=config.tokenizer,
    )
    tokenizer.save(out)
    note(f"{tokenizer.vocab_size} tokens, sha256 {tokenizer.sha256}")
    if json:
        print_json({"directory": str(out), "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256})
    else:
        print(out)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A tokenizer or model directory, or a tokenizer.model.")],
    source: Annotated[
        str | None, typer.Option("--source", metavar="SPEC", help="Count how it writes this text, `embedded` or files.")
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="Show how this text is cut.")] = None,
    json: JsonOption = False,
) -> None:
    """Show a tokenizer's size and special tokens, and how it writes a text."""
    from anarcho_tokenize import Tokenizer, inspect_tokenizer, read_documents

    from anarcho_cli.output import print_json, print_table

    tokenizer = Tokenizer.load(path)
    report = inspect_tokenizer(tokenizer, [] if source is None else read_documents(source))
    pieces = [] if text is None else [(token, tokenizer.token_bytes(token)) for token in tokenizer.encode(text)]
    if json:
        print_json(dataclasses.asdict(report) | {"text_tokens": [token for token, _ in pieces]})
        return
    print_table(["", ""], _facts(report))
    if pieces:
        print_table(["#id", "piece"], [(token, _shown(piece)) for token, piece in pieces])


def _facts(report: TokenizerReport) -> list[tuple[str, object]]:
    facts: list[tuple[str, object]] = [
        ("vocabulary", report.vocab_size),
        ("sha256", report.sha256),
        ("special tokens", ", ".join(f"{name} = {token}" for name, token in report.special_tokens.items())),
        ("longest pieces", " ".join(repr(piece) for piece in report.longest_pieces[:8])),
    ]
    if report.documents:
        facts += [
            ("text", f"{report.documents} documents, {report.bytes} bytes, {report.tokens} tokens"),
            ("bytes per token", f"{report.bytes_per_token:.3f}"),
            ("byte tokens", f"{report.byte_token_share:.2%}"),
            ("unused pieces", report.unused_pieces),
        ]
    return facts


def _shown(piece: bytes) -> str:
    """A token's bytes as text where they are printable text, else as an escaped bytes literal."""
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return repr(piece)
    return repr(text)
