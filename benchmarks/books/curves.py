"""What jobs have learned: a table, and a picture of bits per byte over tokens and over seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

INK = "#7d8590"
"""A contrast of at least 3 : 1 against both white and GitHub's dark page."""
COLOURS = ("#3b82f6", "#e8710a", "#2f9e6e", "#c0399f", "#8b6ff0", "#b58900", "#dc4446", "#0f98a8")
STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "font.size": 10,
    "grid.alpha": 0.25,
    "grid.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.hashsalt": "anarchobot",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}

Record = dict[str, Any]


def read_records(files: list[Path]) -> list[Record]:
    """All records of some results, in order."""
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def table(records: list[Record]) -> str:
    """A Markdown table of the last evaluations, on the whole validation text, the best first."""
    rows = [
        "| job | bits per byte | averaged | steps | seconds | tokens/s | peak memory of the process |",
        "|---|---|---|---|---|---|---|",
    ]
    ends, shared = [r for r in records if r["kind"] == "end"], _shared(records)
    for end in sorted(ends, key=lambda r: r["bits_per_byte"]):
        averaged = ", ".join(f"{power}: {bits:.4f}" for power, bits in end["averaged"].items())
        speed = f"{end['seconds']:.1f} | {end['tokens'] / max(end['seconds'], 1e-9):,.0f}"
        rows.append(
            f"| {end['job']} | {end['bits_per_byte']:.4f} | {averaged} | {end['steps']:,} "
            f"| {' | ' if end['job'] in shared else speed} | {end['peak_bytes'] / 2**30:.1f} GiB |"
        )
    return "\n".join(rows)


def _shared(records: list[Record]) -> set[str]:
    """The jobs beside which others used the device, so that their seconds say nothing."""
    return {r["job"] for r in records if r["kind"] == "job" and r.get("device_shared")}


def draw(records: list[Record], picture: Path, *, labels: dict[str, str], top: float | None = None) -> None:
    """Writes the curves of the jobs in ``labels`` (all where it is empty) up to ``top`` bits per byte; the last point is of the whole text.

    A job that shared its device has no curve over seconds. Raises ValueError for a job that has no evaluation.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    shown, shared = labels or {r["job"]: r["job"] for r in records if r["kind"] == "end"}, _shared(records)
    with mpl.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
        for number, (job, label) in enumerate(shown.items()):
            points = [r for r in records if r["job"] == job and r["kind"] in ("evaluation", "end")]
            if not points:
                raise ValueError(
                    f"there is no evaluation of the job {job}; expected one of {sorted({r['job'] for r in records})}"
                )
            bits = [point["bits_per_byte"] for point in points]
            colour = COLOURS[number % len(COLOURS)]
            for panel, key in zip(panels, ("tokens",) if job in shared else ("tokens", "seconds"), strict=False):
                panel.plot(
                    [p[key] for p in points], bits, color=colour, linewidth=1.5, label=f"{label}: {bits[-1]:.3f}"
                )
                panel.plot(points[-1][key], bits[-1], color=colour, marker="o", markersize=4)
        for panel, title in zip(panels, ("tokens", "seconds of training"), strict=True):
            panel.set_xlabel(title)
            panel.grid(visible=True)
        panels[0].xaxis.set_major_formatter(EngFormatter(sep=""))
        panels[0].set_title("bits per byte", loc="left")
        if top is not None:
            panels[0].set_ylim(top=top)
        panels[1].legend(handles=panels[0].get_legend_handles_labels()[0])
        picture.parent.mkdir(parents=True, exist_ok=True)
        # Without a date, the file changes only when the results do.
        metadata = {"Date": None} if picture.suffix == ".svg" else None
        figure.savefig(picture, transparent=True, dpi=200, metadata=metadata)
        pyplot.close(figure)
