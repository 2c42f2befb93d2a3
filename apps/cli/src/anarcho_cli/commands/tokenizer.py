"""`anarcho tokenizer`: train a tokenizer on a text, take one over from elsewhere, or look into some side by side."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anarcho_cli.commands.config import FileOption, JsonOption, SetOption

if TYPE_CHECKING:
    from anarcho_tokenize import AnyTokenizer, TokenizerReport

app = typer.Typer(help="Train a tokenizer, take one over, or look into some.", no_args_is_help=True)

OutOption = Annotated[Path, typer.Option("--out", "-o", help="Directory to write; it must not be there yet.")]


@app.command()
def train(
    out: OutOption,
    source: Annotated[
        str | None,
        typer.Argument(metavar="[SPEC]", help="Text: a file, glob, directory, `hf://name` or `embedded`."),
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", help="What a row is: text, chat or preference; sets data.kind.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option("--vocab-size", help="Number of tokens; sets tokenizer.vocab_size.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", help="Threads that learn; sets tokenizer.num_threads.")
    ] = None,
    file: FileOption = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Train a tokenizer on a text; prints its directory.

    What is read and learned is in the sections [data] and [tokenizer] of the configuration; conversations are text, too.
    """
    from anarcho_cli.config import resolve
    from anarcho_cli.layers import Layer
    from anarcho_cli.output import note
    from anarcho_cli.places import refuse_existing

    refuse_existing(out, option="--out")
    given = {
        "data": {"source": source, "kind": kind},
        "tokenizer": {"vocab_size": vocab_size, "num_threads": threads},
    }
    sections = {name: {key: value for key, value in keys.items() if value is not None} for name, keys in given.items()}
    layer = Layer(origin="the command line", sections=sections)
    config = resolve(preset=None, file=file, overrides=overrides or [], options=[layer])

    from anarcho_tokenize import read_texts, train_tokenizer

    _write(train_tokenizer(read_texts(config.data, notify=note), config=config.tokenizer), out, json=json)


@app.command("import")
def import_(
    model: Annotated[Path, typer.Argument(help="A SentencePiece .model file, or the directory that holds one.")],
    out: OutOption,
    json: JsonOption = False,
) -> None:
    """Take over a SentencePiece model, appending the special tokens that it lacks; prints the new directory."""
    from anarcho_tokenize import import_tokenizer

    from anarcho_cli.places import refuse_existing

    refuse_existing(out, option="--out")
    _write(import_tokenizer(model), out, json=json)


@app.command()
def inspect(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Tokenizer or model directories, or .model files.")
    ],
    source: Annotated[
        str | None,
        typer.Option(
            "--source", metavar="SPEC", help="Count how they write this text: files, `hf://name`, `embedded`."
        ),
    ] = None,
    source_bytes: Annotated[
        int, typer.Option("--source-bytes", min=1, help="Look at about the first so many bytes of it.")
    ] = 2**24,
    text: Annotated[str | None, typer.Option("--text", help="Show how this text is cut.")] = None,
    json: JsonOption = False,
) -> None:
    """Show size and special tokens of tokenizers side by side, and how they write a text.

    Tokens for each word are counted by script. Pieces that never occur in the text are of no use for it.
    """
    from anarcho_tokenize import DataConfig, load_tokenizer, read_texts
    from anarcho_tokenize.inspect import compare_tokenizers

    from anarcho_cli.output import note, print_json, print_table

    tokenizers = {str(path): load_tokenizer(path) for path in paths}
    documents = [] if source is None else read_texts(DataConfig(source=source), notify=note)
    reports = compare_tokenizers(tokenizers, _first_bytes(documents, source_bytes))
    if json:
        found = [
            {"path": path, **dataclasses.asdict(report), "text_tokens": tokenizers[path].encode(text or "")}
            for path, report in reports.items()
        ]
        print_json({"tokenizers": found})
        return
    print_table(["", *reports] if len(reports) > 1 else ["", ""], _side_by_side(reports.values()))
    if source is not None:
        print_table(["tokens per word, bytes per token", *(f"#{path}" for path in reports)], _scripts(reports))
    for path, tokenizer in tokenizers.items() if text is not None else ():
        pieces = [(token, _shown(tokenizer.token_bytes(token))) for token in tokenizer.encode(text or "")]
        print_table(["#id", "piece"], pieces, title=f"{path}: {len(pieces)} tokens")


def _write(tokenizer: AnyTokenizer, out: Path, *, json: bool) -> None:
    """Save a tokenizer so that its directory appears with all its files or not at all."""
    from anarcho_cli.output import note, print_json

    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        tokenizer.save(staging)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    note(f"{tokenizer.vocab_size} tokens, sha256 {tokenizer.sha256}")
    if json:
        print_json({"directory": str(out), "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256})
    else:
        print(out)


def _first_bytes(documents: Iterable[str], limit: int) -> Iterator[str]:
    """Documents until they are as many bytes; the one that reaches the limit is the last."""
    seen = 0
    for document in documents:
        yield document
        seen += len(document.encode())
        if seen >= limit:
            return


def _side_by_side(reports: Iterable[TokenizerReport]) -> list[Sequence[object]]:
    """Rows of facts, a column for each tokenizer."""
    facts = [_facts(report) for report in reports]
    return [(name, *(column[name] for column in facts)) for name in facts[0]]


def _facts(report: TokenizerReport) -> dict[str, object]:
    facts: dict[str, object] = {
        "vocabulary": f"{report.vocab_size} ({report.algorithm})",
        "normalisation": report.normalization,
        "sha256": report.sha256,
        "special tokens": ", ".join(f"{name} = {token}" for name, token in report.special_tokens.items()),
        "longest pieces": " ".join(map(repr, report.longest_pieces[:8])),
    }
    if report.documents:
        facts |= {
            "text": f"{report.documents} documents, {report.bytes} bytes, {report.words} words",
            "tokens": report.tokens,
            "bytes per token": f"{report.bytes_per_token:.3f}",
            "tokens per word": f"{report.tokens_per_word:.3f}",
            "byte tokens": f"{report.byte_token_share:.2%}",
            "unknown tokens": f"{report.unknown_token_share:.2%}",
            "unused pieces": f"{report.unused_pieces}: {' '.join(map(repr, report.unused_examples[:8]))}",
        }
    return facts


def _scripts(reports: Mapping[str, TokenizerReport]) -> Iterator[Sequence[object]]:
    """A row for each script that any of the tokenizers met, in the order of the first that met it."""
    found = [{script.script: script for script in report.scripts} for report in reports.values()]
    for name in dict.fromkeys(name for scripts in found for name in scripts):
        yield name, *(_ratios(scripts.get(name)) for scripts in found)


def _ratios(script: Any) -> str:
    return "" if script is None else f"{script.tokens_per_word:.2f}, {script.bytes_per_token:.2f}"


def _shown(piece: bytes) -> str:
    """A token's bytes as text where they are printable text, else as an escaped bytes literal."""
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return repr(piece)
    return repr(text)
