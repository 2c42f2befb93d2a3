"""Rows of measurements as people read them: tables on a terminal, and the Markdown that a Mac's owner hands in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anarcho_cli.benching.cases import Kind
from anarcho_cli.benching.memory_table import markdown
from anarcho_cli.benching.shares import place
from anarcho_cli.benching.updating import ADAMW, MUON
from anarcho_cli.output import bytes_text, duration_text, print_table

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]

PEAK_SOURCE = "the maker's published figure, for an Apple chip that of float32 on all its GPU cores"


def utilisation(row: Row, ceiling: str) -> float | None:
    """Share of a ceiling in FLOP/s that the model's own operations take; None where the ceiling is not known."""
    return None if row[ceiling] is None else row["flops_per_token"] * row["tokens_per_second"] / row[ceiling]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def _bytes(value: float | None) -> str:
    return "" if value is None else bytes_text(value)


def _seconds(value: float) -> str:
    return f"{value * 1e3:.0f} ms" if value < 1 else duration_text(value)


def _milliseconds(value: float) -> str:
    return f"{value * 1e3:,.{1 if value < 0.1 else 0}f} ms"


def _peer(row: Row, name: str) -> str:
    """A framework's own optimizer, with how many times as long the run's own takes."""
    peer = row["peers"].get(name)
    return "" if peer is None else f"{_milliseconds(peer['update_seconds'])} ({peer['ratio']:.2f} x)"


def _shares_by_place(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{where} {_share(value)}" for where, value in shares.items())


def _data_parts(rows: Sequence[Row]) -> Iterator[Row]:
    for row in rows:
        yield {**row, **row["preparing"], "what": "preparing", "shares_of_step": {}}
        yield {**row, **row["reading"], "what": "reading"}


def _imports(rows: Sequence[Row]) -> Iterable[Row]:
    """Each package once, though what loads no framework was measured beside each of them."""
    found: dict[str, Row] = {}
    for item in (item for row in rows for item in row["imports"]):
        found.setdefault(item["package"], item)
    return found.values()


def _arithmetic(row: Row) -> str:
    return f"{row['precision']}, compiled" if row.get("compiled") else row["precision"]


def _tokens(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


TRAINING: tuple[Column, ...] = (
    ("preset", lambda row: row["preset"]),
    ("on", place),
    ("#sequences x tokens", lambda row: f"{row['micro_batch']} x {row['context']}"),
    ("arithmetic", _arithmetic),
    ("#tokens/s", lambda row: _tokens(row["tokens_per_second"])),
    ("#step", lambda row: _seconds(row["step_seconds"])),
    ("#of matmul", lambda row: _share(utilisation(row, "ceiling_flops"))),
    ("#of peak", lambda row: _share(utilisation(row, "peak_flops"))),
    ("#memory", lambda row: _bytes(row["peak_bytes"])),
    ("#forecast", lambda row: _bytes(row["forecast_bytes"])),
)
GENERATION: tuple[Column, ...] = (
    ("preset", lambda row: row["preset"]),
    ("on", place),
    ("arithmetic", _arithmetic),
    ("#tokens/s", lambda row: _tokens(row["tokens_per_second"])),
    ("#first token", lambda row: _seconds(row["first_token_seconds"])),
)
TOKENIZER: tuple[Column, ...] = (
    ("preset", lambda row: row["preset"]),
    ("#vocabulary", lambda row: str(row["vocab_size"])),
    ("#encoding", lambda row: f"{row['bytes_per_second'] / 1e6:.2f} MB/s"),
    ("#learning", lambda row: f"{row['learning_bytes_per_second'] / 1e6:.2f} MB/s"),
    ("#bytes a token", lambda row: f"{row['bytes_per_token']:.2f}"),
)
OPTIMIZER: tuple[Column, ...] = (
    ("preset", lambda row: row["preset"]),
    ("on", place),
    ("#MuonAdamW", lambda row: _milliseconds(row["update_seconds"])),
    ("#framework's AdamW", lambda row: _peer(row, ADAMW)),
    ("#framework's Muon + AdamW", lambda row: _peer(row, MUON)),
    ("#of a step", lambda row: _share(row["share_of_step"])),
)
DATA: tuple[Column, ...] = (
    ("preset", lambda row: row["preset"]),
    ("source", lambda row: row["source"]),
    ("", lambda row: row["what"]),
    ("#documents/s", lambda row: _tokens(row["documents_per_second"])),
    ("#text", lambda row: f"{row['bytes_per_second'] / 1e6:,.1f} MB/s"),
    ("#tokens/s", lambda row: _tokens(row["tokens_per_second"])),
    ("of a step", lambda row: _shares_by_place(row["shares_of_step"])),
)
START_UP: tuple[Column, ...] = (
    ("preset", lambda row: row["preset"]),
    ("on", place),
    ("#to the first step", lambda row: _seconds(row["first_step_seconds"])),
    ("#the first time", lambda row: _seconds(row["first_run_seconds"])),
)
IMPORTS: tuple[Column, ...] = (
    ("package", lambda row: row["package"]),
    ("after", lambda row: row["after"]),
    ("#import", lambda row: _milliseconds(row["seconds"])),
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """How the rows of a kind are told."""

    kind: Kind
    """What was measured."""
    title: str
    """What stands above."""
    columns: tuple[Column, ...]
    """Their names and cells."""
    lines: Callable[[Sequence[Row]], Iterable[Row]] = lambda rows: rows
    """What there is a line for, of the rows that were measured."""

    def cells(self, rows: Sequence[Row]) -> list[list[str]]:
        """The lines of what was measured."""
        measured = [row for row in rows if row["kind"] == self.kind and "error" not in row]
        return [[cell(line) for _, cell in self.columns] for line in self.lines(measured)]


TABLES: tuple[Table, ...] = (
    Table(kind=Kind.training, title="training", columns=TRAINING),
    Table(
        kind=Kind.optimizer, title="optimizer, one update; in brackets, MuonAdamW's time over that", columns=OPTIMIZER
    ),
    Table(kind=Kind.generation, title="generation, one text", columns=GENERATION),
    Table(kind=Kind.tokenizer, title="tokenizer, one process, embedded corpus", columns=TOKENIZER),
    Table(kind=Kind.data, title="data, packed to the sequence length", columns=DATA, lines=_data_parts),
    Table(kind=Kind.start_up, title="start-up, tokenizer and shards prepared", columns=START_UP),
    Table(kind=Kind.start_up, title="imports", columns=IMPORTS, lines=_imports),
)


def print_report(rows: Sequence[Row], machine: Row) -> None:
    """The tables of all kinds that were measured, and what failed or was left out."""
    print(machine_line(machine))
    for table in TABLES:
        if cells := table.cells(rows):
            print_table([name for name, _ in table.columns], cells, title=table.title)
    for remark in remarks(rows):
        print(remark)


def mac_report(rows: Sequence[Row], machine: Row, *, steps: int) -> str:
    """The figures as Markdown, to be sent to the project by somebody who has a Mac."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    parts = [f"### {machine_line(machine)}", f"Python {machine['python']}, {versions}; medians of {steps} steps."]
    if not machine["mac"]:
        parts.append("**This is no Mac with an Apple chip:** the report was made for trying it out and fills no table.")
    for table in TABLES:
        if cells := table.cells(rows):
            header = [name.lstrip("#") for name, _ in table.columns]
            parts.append(f"{table.title.capitalize()}:\n\n{markdown([header, *cells])}".rstrip())
    if failures := remarks(rows):
        parts.append("\n".join(f"* {remark}" for remark in failures))
    parts.append(
        "*of matmul*: share of what square matrix products alone reached on this machine, in the same type. "
        f"*of peak*: share of {PEAK_SOURCE}; empty where there is none. "
        "*memory*: the most that the process held, on CUDA the device."
    )
    if machine["mac"]:
        parts.append(
            "To have these figures added to docs/apple-silicon.md, open an issue of the AnarchoBot project with this whole text as "
            "its body, and say whether the Mac ran on mains power and what else it was doing."
        )
    return "\n\n".join(parts)


def remarks(rows: Sequence[Row]) -> list[str]:
    """A line for each row that has no figures, or whose figures are of a computation that went wrong."""
    lines = [f"{_name(row)}: {row['error']}" for row in rows if "error" in row]
    wrong = "the loss was not finite, so the device may compute wrong; try `anarcho doctor`"
    return lines + [f"{_name(row)}: {wrong}" for row in rows if row.get("finite") is False]


def machine_line(machine: Row) -> str:
    """The machine in one line."""
    cores = f", {machine['gpu_cores']} GPU cores" if machine["gpu_cores"] else ""
    model = f" ({machine['model']})" if machine["model"] else ""
    return f"{machine['chip']}{model}{cores}, {bytes_text(machine['memory_bytes'])}, {machine['system']}"


def _name(row: Row) -> str:
    where = f" on {place(row)}" if "backend" in row else ""
    return f"{row['kind']} of {row['preset']}{where}"
