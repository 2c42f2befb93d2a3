"""Draws a run's learning curves, as in the README: training and validation loss, and validation bits per byte, over tokens.

    uv run python benchmarks/plot_run.py runs/<name> docs/<name>.svg

The background is transparent and all ink is of middle brightness, so that the picture reads on light and on dark pages.
An SVG of the same run is the same file, byte for byte.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib as mpl
from anarcho_monitor import Point, read_curve

mpl.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

# Each has a contrast of at least 3 : 1 against both white and GitHub's dark page (#0d1117).
INK = "#7d8590"
BLUE = "#3b82f6"
ORANGE = "#e8710a"
STYLE = {
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


def draw(run: Path, picture: Path) -> None:
    """Writes `picture` (.svg or .png) from `run`/metrics.jsonl; raises ValueError where there is nothing to draw."""
    metrics = run / "metrics.jsonl"
    training = read_curve(metrics, "train", "loss")
    validation = read_curve(metrics, "validation", "loss")
    bits = read_curve(metrics, "validation", "bits_per_byte")
    if not training:
        raise ValueError(f"{metrics} holds no training loss: give the directory of a run that has trained.")
    with mpl.rc_context(STYLE):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        _curve(left, training, color=BLUE, label="training", linewidth=1.2)
        _curve(left, validation, color=ORANGE, label="validation", linewidth=1.8, marker="o", markersize=3)
        _curve(right, bits, color=ORANGE, label="validation", linewidth=1.8, marker="o", markersize=3)
        _finish(left, "loss (nats per token)")
        _finish(right, "bits per byte")
        if bits:
            right.margins(y=0.12)  # Room for the number below the last point.
            _name_last(right, bits[-1])
        left.legend()
        picture.parent.mkdir(parents=True, exist_ok=True)
        # Without a date, the file changes only when the run does.
        metadata = {"Date": None} if picture.suffix == ".svg" else None
        figure.savefig(picture, transparent=True, dpi=200, metadata=metadata)
        pyplot.close(figure)


def _curve(axes: Axes, points: list[Point], **style: object) -> None:
    axes.plot([point.tokens for point in points], [point.value for point in points], **style)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(visible=True)


def _name_last(axes: Axes, last: Point) -> None:
    axes.annotate(
        f"{last.value:.3f}",
        (last.tokens, last.value),
        xytext=(-6, -10),
        textcoords="offset points",
        horizontalalignment="right",
        color=ORANGE,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="directory of a run, holding metrics.jsonl")
    parser.add_argument(
        "picture", type=Path, nargs="?", help="where to write, .svg or .png (docs/<name of the run>.svg)"
    )
    arguments = parser.parse_args()
    picture = arguments.picture or Path("docs") / f"{arguments.run.resolve().name}.svg"
    try:
        draw(arguments.run, picture)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(picture)


if __name__ == "__main__":
    main()
