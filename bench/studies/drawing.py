"""How the figures look, and what several of them draw."""

import html
import io
import re
from collections.abc import Iterable
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
    "random partition": "#2a7de1",
    "random magnitude": "#9c36b5",
    "fresh random partition": "#e8590c",
    "wide dense": "#2f9e44",
}
"""By condition."""

STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#adb5bd",
    "axes.labelcolor": "#343a40",
    "xtick.color": "#495057",
    "ytick.color": "#495057",
    "svg.hashsalt": "fpe",
    "svg.fonttype": "none",  # text stays text: it can be read aloud, found and copied
}
THEME: dict[str, tuple[str, str]] = {
    "#000000": ("#212529", "#e9ecef"),
    "#212529": ("#212529", "#e9ecef"),
    "#343a40": ("#343a40", "#dee2e6"),
    "#495057": ("#495057", "#ced4da"),
    "#4a4f57": ("#4a4f57", "#c4cad1"),
    "#868e96": ("#666e75", "#a4abb2"),
    "#8a8f98": ("#666b73", "#a8adb5"),
    "#adb5bd": ("#adb5bd", "#6c757d"),
    "#2a7de1": ("#1f6fd0", "#6aabf7"),
    "#e8590c": ("#c2410c", "#ff9a5c"),
    "#2f9e44": ("#237a34", "#69d17f"),
    "#9c36b5": ("#8a2aa3", "#d08be0"),
    "#0c8599": ("#0b7285", "#3bc9db"),
}
"""What a colour of the figures is on a light page and on a dark one: each is legible as text there."""
BARS = ("#1864ab", "#4dabf7", "#a5d8ff", "#ced4da")
"""Colours of bars that stand beside each other, on both pages: nothing is written in them or on them."""


def themed(text: str, name: str, title: str) -> str:
    """An ``<svg>`` element with a title for screen readers, ids of its own, and colours that follow the page's.

    Args:
        text: As matplotlib writes it.
        name: Begins every id, so that several figures can stand on one page.
        title: What it shows.
    """
    text = text[text.index("<svg") :]
    text = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    used = [colour for colour in THEME if colour in text]
    for colour in used:
        text = text.replace(colour, f"var(--ink-{colour[1:]}, {colour})")
    plain = f"#{name}-figure_1 {{ fill: var(--ink-000000); }}"  # text that has no fill of its own is black
    head = f"<title>{html.escape(title)}</title><style>{palette(used)} {plain}</style>"
    return re.sub(r"<svg ([^>]*)>", lambda found: f'<svg role="img" {found[1]}>{head}', text, count=1)


def palette(colours: Iterable[str] = THEME) -> str:
    """Style rules that give colours of :data:`THEME` their values, by what the reader's system prefers."""
    light, dark = (
        "".join(f"--ink-{c[1:]}: {THEME[c][i]}; " for c in {"#000000": 0, **dict.fromkeys(colours)}) for i in (0, 1)
    )
    return f":root {{ {light}}} @media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}"


def figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, np.ndarray]:
    """A styled figure and its axes, row after row."""
    made = Figure(figsize=(width, height), layout="constrained")
    with matplotlib.rc_context(STYLE):
        axes = made.subplots(rows, columns, squeeze=False).flatten()
    return made, axes


def svg(made: Figure, name: str, title: str) -> str:
    """The figure as an ``<svg>`` element: see :func:`themed`."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        made.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return themed(buffer.getvalue(), name, title)


def save(made: Figure, path: Path) -> Path:
    """Writes a figure; the suffix decides the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        path.write_text(f"{svg(made, path.stem, path.stem.replace('-', ' '))}\n")
        return path
    with matplotlib.rc_context(STYLE):
        made.savefig(path)
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


def below(made: Figure, columns: int) -> None:
    """One legend for all axes, the first one's, below them."""
    names = made.axes[0].get_legend_handles_labels()
    made.legend(*names, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
