"""How the figures look, and what several of them draw."""

import io
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .intervals import mean_and_half

COLOURS = {
    "dense": "#8a8f98",
    "dense-continued": "#4a4f57",
    "random": "#2a7de1",
    "clause": "#e8590c",
    "gram": "#2f9e44",
    "block 4x16": "#9c36b5",
}
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#adb5bd",
    "axes.labelcolor": "#343a40",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "xtick.color": "#495057",
    "ytick.color": "#495057",
    "svg.hashsalt": "fpe",
}


def figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, np.ndarray]:
    """A styled figure and its axes, row after row."""
    made = Figure(figsize=(width, height), layout="constrained")
    with matplotlib.rc_context(STYLE):
        axes = made.subplots(rows, columns, squeeze=False).flatten()
    return made, axes


def svg(made: Figure) -> str:
    """The figure as an ``<svg>`` element."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        made.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def save(made: Figure, path: Path) -> Path:
    """Writes a figure; the suffix decides the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        made.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def strip(axis: Axes, x: float, values: object, colour: str) -> None:
    """One column of a strip plot: a dot a trial, and the mean."""
    points = np.asarray(values, dtype=float)
    offsets = np.linspace(-0.12, 0.12, len(points)) if len(points) > 1 else np.zeros(1)
    axis.scatter(x + offsets, points, color=colour, s=26, alpha=0.75, zorder=3, linewidth=0)
    axis.plot([x - 0.22, x + 0.22], [points.mean()] * 2, color=colour, linewidth=3, solid_capstyle="round")
    axis.annotate(
        f"{points.mean():.1f}", (x, points.max()), (0, 7), textcoords="offset points", ha="center", color=colour
    )


def line(
    axis: Axes, rows: pd.DataFrame, by: str, colour: str, label: str, column: str = "relative", style: str = "-"
) -> None:
    """Mean of a column with its 95 % interval."""
    groups = [
        (x, *mean_and_half(group[column].dropna())) for x, group in rows.groupby(by) if group[column].notna().any()
    ]
    if groups:
        x, mean, half = np.array(groups).T
        axis.plot(x, mean, style, marker="o", color=colour, linewidth=2, markersize=5, label=label)
        axis.fill_between(x, mean - half, mean + half, color=colour, alpha=0.12, linewidth=0)


def doubling(axis: Axes) -> None:
    """An axis to the base of two, labelled with plain numbers."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
