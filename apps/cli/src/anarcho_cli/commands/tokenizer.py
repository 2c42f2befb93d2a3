"""`anarcho tokenizer`: train a tokenizer on a text, or look into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anarcho_cli.commands.config import FileOption, JsonOption, SetOption

app = typer.Typer(help="Train a tokenizer, or look into one.", no_args_is_help=True)


@app.command()
def train(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write; it must not be there yet.")],
    source: Annotated[
        str, typer.Argument(metavar="[SPEC]", help="Text: a file, glob, directory, or `embedded`.", show_default=True)
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

    documents = read_documents(config.data.source, text_field=config.data.text_field)
    tokenizer = train_tokenizer(documents, config=config.tokenizer)
    tokenizer.save(out)
    note(f"{tokenizer.vocab_size} tokens, sha256 {tokenizer.sha256}")
    if json:
        print_json({"directory": str(out), "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256})
    else:
        print(out)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A tokenizer or model directory, or a tokenizer.model.")],
    text: Annotated[str | None, typer.Option("--text", help="Show how this text is cut.")] = None,
    json: JsonOption = False,
) -> None:
    """Show a tokenizer's size and special tokens, and how it cuts a text."""
    from anarcho_tokenize import Tokenizer

    from anarcho_cli.output import print_json, print_table

    tokenizer = Tokenizer.load(path)
    facts: dict[str, object] = {
        "vocab_size": tokenizer.vocab_size,
        "sha256": tokenizer.sha256,
        "special_tokens": tokenizer.special_tokens,
    }
    pieces = []
    if text is not None:
        pieces = [(token, tokenizer.token_bytes(token)) for token in tokenizer.encode(text)]
        facts |= {"tokens": [token for token, _ in pieces], "bytes": len(text.encode("utf-8"))}
    if json:
        print_json(facts)
        return
    specials = ", ".join(f"{name} = {token}" for name, token in tokenizer.special_tokens.items())
    print_table(
        ["", ""], [("vocabulary", tokenizer.vocab_size), ("sha256", tokenizer.sha256), ("special tokens", specials)]
    )
    if text is not None:
        print_table(["#id", "bytes"], [(token, _shown(piece)) for token, piece in pieces])


def _shown(piece: bytes) -> str:
    """A token's bytes as text where they are printable text, else as an escaped bytes literal."""
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return repr(piece)
    return repr(text)
