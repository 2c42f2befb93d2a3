"""Rows of measurements as people read them: tables on a terminal, and the Markdown that a Mac's owner hands in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from anarcho_cli.benching.cases import Kind
from anarcho_cli.benching.memory_table import markdown
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


def _where(row: Row) -> str:
    return f"{row['backend']} {row['device']}"


def _arithmetic(row: Row) -> str:
    return f"{row['precision']}, compiled" if row.get("compiled") else row["precision"]


def _tokens(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


TRAINING: tuple[Column, ...] = (
    ("preset", lambda row: row["preset"]),
    ("on", _where),
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
    ("on", _where),
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
TABLES: tuple[tuple[Kind, str, tuple[Column, ...]], ...] = (
    (Kind.training, "training", TRAINING),
    (Kind.generation, "generation, one text", GENERATION),
    (Kind.tokenizer, "tokenizer, one process, embedded corpus", TOKENIZER),
)


def print_report(rows: Sequence[Row], machine: Row) -> None:
    """The tables of all kinds that were measured, and what failed or was left out."""
    print(machine_line(machine))
    for kind, title, columns in TABLES:
        measured = [row for row in rows if row["kind"] == kind and "error" not in row]
        if measured:
            print_table([name for name, _ in columns], _cells(measured, columns), title=title)
    for remark in remarks(rows):
        print(remark)


def mac_report(rows: Sequence[Row], machine: Row, *, steps: int) -> str:
    """The figures as Markdown, to be sent to the project by somebody who has a Mac."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    parts = [f"### {machine_line(machine)}", f"Python {machine['python']}, {versions}; medians of {steps} steps."]
    if not machine["mac"]:
        parts.append("**This is no Mac with an Apple chip:** the report was made for trying it out and fills no table.")
    for kind, title, columns in TABLES:
        measured = [row for row in rows if row["kind"] == kind and "error" not in row]
        if measured:
            header = [name.lstrip("#") for name, _ in columns]
            parts.append(f"{title.capitalize()}:\n\n{markdown([header, *_cells(measured, columns)])}".rstrip())
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


def _cells(rows: Sequence[Row], columns: Sequence[Column]) -> list[list[str]]:
    return [[cell(row) for _, cell in columns] for row in rows]


def _name(row: Row) -> str:
    where = f" on {_where(row)}" if "backend" in row else ""
    return f"{row['kind']} of {row['preset']}{where}"
