"""`anarcho data`: turn text into token shards, or look into shards."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anarcho_cli.commands.config import FileOption, JsonOption, SetOption

if TYPE_CHECKING:
    from anarcho_tokenize import AnyTokenizer, PreparationReport, ShardsReport, ShareStatus

app = typer.Typer(help="Turn text into token shards, or look into shards.", no_args_is_help=True)


@app.command()
def prepare(
    tokenizer: Annotated[Path, typer.Option("--tokenizer", help="A tokenizer or model directory.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Directory to write; what was interrupted there is continued.")
    ],
    source: Annotated[
        str | None,
        typer.Argument(metavar="[SPEC]", help="Text: a file, glob, directory, `hf://name` or `embedded`."),
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", help="What a row is: text, chat or preference; sets data.kind.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="Do the part of one of several that share --out, from 0.")
    ] = None,
    world: Annotated[
        int | None, typer.Option("--world", help="How many share it; `data merge` is the last step.")
    ] = None,
    file: FileOption = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Tokenize a text into training and validation shards; prints their directory.

    Interrupted, the same command goes on where it was. Rows that cannot be used are listed in quarantine.jsonl.
    With --rank and --world it does one part of many, which may run anywhere at any time and need but --out in common.
    """
    if (rank is None) != (world is None):
        given, absent = ("--rank", "--world") if world is None else ("--world", "--rank")
        raise ValueError(
            f"{given} is given without {absent}; give both, or neither to prepare everything in one process"
        )
    from anarcho_cli.config import resolve
    from anarcho_cli.layers import Layer
    from anarcho_cli.output import note, print_json
    from anarcho_cli.preparation_progress import PreparationProgress

    given = {"source": source, "kind": kind}
    layer = Layer(
        origin="the command line",
        sections={"data": {key: value for key, value in given.items() if value is not None}},
    )
    settings = resolve(preset=None, file=file, overrides=overrides or [], options=[layer]).data

    from anarcho_tokenize import load_tokenizer, prepare_shards, prepare_share, share_statuses

    with PreparationProgress() as progress:
        tell = {"on_progress": progress.show, "notify": note}
        if rank is None or world is None:
            report = prepare_shards(settings, load_tokenizer(tokenizer), out, **tell)
        else:
            report = prepare_share(settings, load_tokenizer(tokenizer), out, rank=rank, world=world, **tell)
    for line in progress.summary(report):
        note(line)
    if rank is None:
        _conclude(out, report, json=json)
        return
    _tell_ranks(out, rank, report)
    if json:
        ranks = [dataclasses.asdict(status) for status in share_statuses(out)]
        print_json({"directory": str(out), "rank": rank, "world": world, **dataclasses.asdict(report), "ranks": ranks})
    else:
        print(out)


@app.command()
def merge(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What the ranks of `data prepare` share.")],
    max_bad_share: Annotated[
        float | None, typer.Option("--max-bad-share", help="In place of the ranks' data.max_bad_share.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Put together what the ranks of `data prepare --rank I --world N` have done; prints the directory.

    It then holds the very files that one process would have written. Interrupted, the same command goes on where it was.
    """
    from anarcho_tokenize import merge_shares

    from anarcho_cli.output import note
    from anarcho_cli.preparation_progress import PreparationProgress

    with PreparationProgress() as progress:
        report = merge_shares(directory, max_bad_share=max_bad_share, on_progress=progress.show, notify=note)
    for line in progress.summary(report):
        note(line)
    _conclude(directory, report, json=json)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A directory of shards, or a run.")],
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Tokenizer that decodes; of a run, its own when left out.")
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=0, help="Show so many packed sequences, with a tokenizer.")
    ] = 2,
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens of these sequences.")] = 256,
    packing: Annotated[
        str | None, typer.Option("--packing", help="How they are packed: concat, or best-fit as for conversations.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Which sequences are shown.")] = 0,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every shard with its recorded sha256.")] = False,
    json: JsonOption = False,
) -> None:
    """Show how much text a directory of shards holds, and what packed sequences of it look like.

    In a sequence, documents are set apart, and tokens that do not count as targets are dim.
    """
    from anarcho_tokenize import share_statuses

    from anarcho_cli.output import print_json, print_table

    root = path / "data" if (path / "data").is_dir() else path
    if statuses := share_statuses(root):
        _show_ranks(statuses, json=json)
        return
    decoder = _tokenizer(path, tokenizer)
    reports = _reports(root, tokenizer=decoder, verify=verify)
    if json:
        print_json({name: dataclasses.asdict(report) for name, report in reports.items()})
        return
    columns = ["split", "kind", "#documents", "#tokens", "#bytes", "#bytes/token", "#median length", "fingerprint"]
    rows = []
    for name, report in reports.items():
        counts = (report.documents, report.tokens, report.bytes, f"{report.bytes_per_token:.2f}")
        median = report.length_quantiles.get(0.5, "-")
        kind = report.kind if report.complete else f"{report.kind}, not complete"
        rows.append((name, kind, *counts, median, report.fingerprint[:12]))
    print_table(columns, rows)
    for source in dict.fromkeys(report.source for report in reports.values()):
        print(f"source: {source}")
    if decoder is not None and samples:
        _show_samples(root, decoder, count=samples, length=length, packing=packing, seed=seed)


def _conclude(out: Path, report: PreparationReport, *, json: bool) -> None:
    """Say what prepared data holds."""
    from anarcho_cli.output import note, print_json

    if report.quarantined:
        note(f"{out / 'quarantine.jsonl'} says why {report.quarantined} rows cannot be used")
    if json:
        splits = {name: dataclasses.asdict(split) for name, split in _reports(out).items()}
        print_json({"directory": str(out), **dataclasses.asdict(report), "splits": splits})
    else:
        print(out)


def _tell_ranks(out: Path, rank: int, report: PreparationReport) -> None:
    """Say what is left to do once a rank is done."""
    from anarcho_tokenize import missing_ranks, share_statuses

    from anarcho_cli.output import note

    if report.quarantined:
        note(f"{report.quarantined} of {report.rows} rows of this rank cannot be used; the merge lists them")
    if missing := missing_ranks(out):
        note(f"rank {rank} is done; {missing}")
    elif statuses := share_statuses(out):
        note(f"all {len(statuses)} ranks are done; `anarcho data merge {out}` puts them together")
    else:
        note(f"{out} is merged already")


def _show_ranks(statuses: list[ShareStatus], *, json: bool) -> None:
    """How far each rank of a directory is that is not merged yet."""
    from anarcho_cli.output import print_json, print_table

    if json:
        print_json({"ranks": [dataclasses.asdict(status) for status in statuses]})
        return
    rows: list[tuple[object, ...]] = []
    for one in statuses:
        state = "done" if one.is_done else "not done" if one.has_begun else "not begun"
        rows.append((one.rank, state, "-" if one.share is None else f"{one.share:.0%}"))
    print_table(["#rank", "state", "#read"], rows)


def _tokenizer(path: Path, given: Path | None) -> AnyTokenizer | None:
    from anarcho_tokenize import load_tokenizer

    own = path / "tokenizer"
    directory = given or (own if own.is_dir() else None)
    return None if directory is None else load_tokenizer(directory)


def _show_samples(
    root: Path, tokenizer: AnyTokenizer, *, count: int, length: int, packing: str | None, seed: int
) -> None:
    from anarcho_tokenize import TokenShards

    from anarcho_cli.sample_view import print_samples

    for folder in _folders(root)[:1]:
        shards = TokenShards.open(folder)
        print_samples(shards, tokenizer, count=count, length=length, packing=packing, seed=seed)


def _folders(root: Path) -> list[Path]:
    """The parts of prepared data, or the directory itself where it is one."""
    return [root / name for name in ("train", "validation") if (root / name).is_dir()] or [root]


def _reports(root: Path, *, tokenizer: AnyTokenizer | None = None, verify: bool = False) -> dict[str, ShardsReport]:
    """Name of a split -> what its shards hold."""
    from anarcho_tokenize import TokenShards, inspect_shards

    reports: dict[str, ShardsReport] = {}
    for folder in _folders(root):
        shards = TokenShards.open(folder, growing=True)
        if verify:
            shards.verify()
        reports[folder.name] = inspect_shards(shards, tokenizer)
    return reports
