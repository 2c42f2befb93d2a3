"""Packed sequences as a person reads them: where documents meet, and which tokens count as targets."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from anarcho_tokenize import AnyTokenizer, Batch, PackedBatches, TokenShards
from rich.console import Console
from rich.text import Text

from anarcho_cli.layers import ConfigError
from anarcho_cli.output import printable

_DOCUMENT_STYLES = ("green", "cyan")


@dataclass(frozen=True)
class Run:
    """Neighbouring targets of one document that all count or all do not."""

    segment: int
    counts: bool
    ids: list[int]


def runs_of(batch: Batch, row: int, *, pad_id: int) -> Iterator[Run]:
    """The targets of a row in runs, its padding left out."""
    assert batch.segments is not None
    columns = zip(batch.targets[row].tolist(), batch.weights[row].tolist(), batch.segments[row].tolist(), strict=True)
    kept = ((token, weight, segment) for token, weight, segment in columns if weight or token != pad_id)
    for (segment, counts), group in groupby(kept, key=lambda column: (column[2], column[1] > 0)):
        yield Run(segment, counts, [token for token, _, _ in group])


def print_samples(
    shards: TokenShards, tokenizer: AnyTokenizer, *, count: int, length: int, packing: str | None, seed: int
) -> None:
    """Print sequences in the order of training; on a terminal in colours, elsewhere with marks of its own."""
    chosen = packing or ("concat" if shards.kind == "text" else "best-fit")
    if chosen not in ("concat", "best-fit"):
        raise ConfigError(f"--packing is {chosen!r}; expected concat or best-fit")
    batches = PackedBatches(
        shards, length=length, seed=seed, packing="concat" if chosen == "concat" else "best-fit", isolate_documents=True
    )
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    batch = batches.batch(0, count)
    for row in range(count):
        used = int((batch.targets[row] != shards.pad_id).sum())
        console.rule(f"sequence {row}: {used} of {length} tokens, {int(batch.weights[row].sum())} count", align="left")
        for text in _texts(batch, row, tokenizer, colours=console.is_terminal):
            console.print(text, end="")
        console.print()


def _texts(batch: Batch, row: int, tokenizer: AnyTokenizer, *, colours: bool) -> Iterator[Text]:
    last = 0
    for run in runs_of(batch, row, pad_id=tokenizer.pad_id):
        if run.segment != last:
            yield Text("\n" + "╌" * 8 + f" document {run.segment} of the sequence\n", style="dim")
            last = run.segment
        content = printable(tokenizer.decode(run.ids, skip_special_tokens=False))
        if colours:
            yield Text(content, style=_DOCUMENT_STYLES[run.segment % 2] if run.counts else "dim")
        else:
            yield Text(content if run.counts else f"⟦{content}⟧")
