"""Figures of the sweeps: each a function from raw rows to a matplotlib figure."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from ..results import Results
from ..studies import boolean_sweep
from ..studies.conditions import CONTINUED, DROPCONNECT
from ..studies.mlp import Cell
from ..studies.tables import against_control, mean_and_half, still_shallow
from .figures import COLOURS, figure

ALPHAS = {2: "#2a7de1", 4: "#e8590c", 8: "#2f9e44"}


def boolean_sweep_lines(results: Results) -> Figure:
    """Relative improvement by clauses at 8 neurons, and by neurons at 8 clauses."""
    made, (left, right) = figure(9.2, 3.6, 2)
    gained = boolean_sweep.gains(results)
    for condition in ("random", "clause"):
        kind = gained[gained["condition"] == condition]
        colour = COLOURS[condition]
        _line(left, kind[kind["neurons"] == 8], "clauses", colour, f"{condition} split")
        _line(right, kind[kind["clauses"] == 8], "neurons", colour, f"{condition} split")
    left.set(xlabel="clauses", ylabel="improvement over dense, %", title="8 neurons")
    right.set(xlabel="neurons", title="8 clauses")
    _doubling(right)
    for axis in (left, right):
        axis.axhline(0, color="#adb5bd", linewidth=1)
        axis.legend(frameon=False, fontsize=8)
    return made


def boolean_heatmap(results: Results) -> Figure:
    """Mean relative improvement of every number of clauses and neurons, a panel for each split."""
    made, axes = figure(9.2, 3.4, 2)
    gained = boolean_sweep.gains(results)
    by_split = {c: rows.pivot_table("relative", "neurons", "clauses") for c, rows in gained.groupby("condition")}
    limit = max(float(np.nanmax(np.abs(grid.to_numpy()))) for grid in by_split.values())
    for axis, condition in zip(axes, ("random", "clause"), strict=True):
        grid = by_split[condition]
        axis.imshow(grid, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
        for (y, x), value in np.ndenumerate(grid.to_numpy()):
            shade = "white" if abs(value) > 0.6 * limit else "#212529"
            if not np.isnan(value):
                axis.text(x, y, f"{value:+.0f}", ha="center", va="center", fontsize=8, color=shade)
        axis.set_xticks(range(len(grid.columns)), [f"{c}" for c in grid.columns])
        axis.set_yticks(range(len(grid.index)), [f"{n}" for n in grid.index])
        axis.set(xlabel="clauses", title=f"{condition} split, improvement over dense, %")
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel("neurons")
    return made


def boolean_features(results: Results) -> Figure:
    """Capacity and cosine by clauses at 8 neurons, and the gain of every network against the change of both."""
    made, axes = figure(9.2, 6.4, 2, 2)
    gained = boolean_sweep.gains(results)
    for condition, rows in gained.groupby("condition"):
        colour, eight = COLOURS[str(condition)], rows[rows["neurons"] == 8]
        _line(axes[0], eight, "clauses", colour, f"{condition} split", "capacity_ratio")
        _line(axes[1], eight, "clauses", colour, f"{condition} split", "cosine_similarity")
        for axis, column in ((axes[2], "capacity_ratio"), (axes[3], "cosine_change")):
            line = stats.linregress(rows[column], rows["relative"])
            ends = np.array([rows[column].min(), rows[column].max()])
            axis.scatter(rows[column], rows["relative"], s=7, color=colour, alpha=0.5, linewidth=0)
            label = f"{condition}: R² = {line.rvalue**2:.2f}"
            axis.plot(ends, line.intercept + line.slope * ends, color=colour, linewidth=2, label=label)
    dense = gained[(gained["condition"] == "random") & (gained["neurons"] == 8)]
    _line(axes[1], dense, "clauses", COLOURS["dense"], "dense", "cosine_similarity_control")
    axes[0].set(xlabel="clauses", ylabel="capacity of a clause, times dense", title="8 neurons")
    axes[1].set(xlabel="clauses", ylabel="mean cosine of two neurons", title="8 neurons")
    axes[2].set(xlabel="capacity of a clause, times dense", ylabel="improvement over dense, %")
    axes[3].set(xlabel="fall of the mean cosine", ylabel="improvement over dense, %")
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
    return made


def widths(results: Sequence[Results]) -> Figure:
    """Relative improvement by width and alpha, random and Gram split, a panel for each data set."""
    made, axes = figure(4.6 * len(results), 3.6, len(results))
    for axis, one in zip(axes, results, strict=True):
        frame = against_control(one)
        frame = frame[still_shallow(frame)]
        for split, style in (("random", "-"), ("gram", ":")):
            for alpha, rows in frame[frame["condition"] == f"{split} magnitude"].groupby("alpha"):
                _line(axis, rows, "neurons", ALPHAS[int(alpha)], f"alpha = {alpha}, {split}", style=style)
        axis.axhline(0, color="#adb5bd", linewidth=1)
        _doubling(axis)
        axis.set(xlabel="neurons before the split", title=str(one.settings["data"]))
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("improvement over dense, %")
    return made


def vision(results: Results) -> Figure:
    """The paper's Fig. 6: dense weights a split is worth, when to split, cosine, and the expansion factor."""
    made, axes = figure(9.2, 6.6, 2, 2)
    frame = against_control(results)
    shallow = frame[(frame["layers"] == Cell.layers) & (frame["around"] == 0) & (frame["rewire"] == "")]
    half = shallow[shallow["split"] == Cell.split]
    dense, wide = half[half["condition"] == CONTINUED], half[half["condition"] == "random magnitude"]

    _line(axes[0], dense, "nonzeros", COLOURS["dense"], "dense", "test_accuracy")
    for alpha, rows in wide.groupby("alpha"):
        _line(axes[0], rows, "nonzeros", ALPHAS[int(alpha)], f"alpha = {alpha}", "test_accuracy")
        _line(axes[2], rows, "neurons", ALPHAS[int(alpha)], f"alpha = {alpha}", "cosine_similarity")
    _line(axes[2], dense, "neurons", COLOURS["dense"], "dense", "cosine_similarity")
    when = shallow[(shallow["condition"] == "random magnitude") & (shallow["alpha"] == 2) & (shallow["neurons"] == 8)]
    _line(axes[1], when, "split", ALPHAS[2], "8 neurons, alpha = 2", "points")
    for shade, (neurons, rows) in enumerate(wide.groupby("neurons")):
        _line(axes[3], rows, "alpha", f"C{shade}", f"{neurons} neurons", "points")

    axes[0].set(xlabel="non-zero weights", ylabel="test accuracy, %", title="a. Equal weights")
    axes[1].set(xlabel="share of the epochs before the split", ylabel="points over dense", title="b. When to split")
    axes[2].set(xlabel="neurons before the split", ylabel="mean cosine of two neurons", title="c. Cosine")
    axes[3].set(xlabel="alpha", ylabel="points over dense", title="d. Expansion factor")
    for axis in (axes[0], axes[2], axes[3]):
        _doubling(axis)
    for axis in axes:
        axis.legend(frameon=False, fontsize=8, ncols=2 if axis is axes[3] else 1)
    axes[3].margins(y=0.25)
    return made


def _doubling(axis: Axes) -> None:
    """An axis to the base of two, labelled with plain numbers."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")


def budget(results: Results) -> Figure:
    """Gain of every structure and policy at 8 neurons and alpha = 2; DropConnect's loss would hide the differences."""
    frame = against_control(results)
    frame = frame[~frame["condition"].str.startswith(DROPCONNECT)]
    return _strips(
        frame[still_shallow(frame) & (frame["neurons"] == 8) & (frame["alpha"] == 2)], "8 neurons, alpha = 2"
    )


def hidden(results: Results) -> Figure:
    """Gain of every structure and policy where the pair's output is as wide as its input."""
    frame = against_control(results)
    frame = frame[(frame["around"] > 0) & (frame["alpha"] == 2)]
    frame = frame[frame["neurons"] == frame["neurons"].min()]
    around, neurons = frame["around"].iloc[0], frame["neurons"].iloc[0]
    return _strips(frame, f"{around} inputs, {neurons} neurons, {around} outputs, alpha = 2")


def _strips(frame: pd.DataFrame, title: str) -> Figure:
    """Points over the control, condition by condition: a dot a trial, a bar the 95 % interval of the mean."""
    groups = {str(name): rows["points"] for name, rows in frame.groupby("condition", sort=False)}
    groups = {name: points for name, points in groups.items() if not name.startswith("dense")}
    made, (axis,) = figure(6.8, 0.24 * len(groups) + 1.2)
    for y, points in enumerate(reversed(groups.values())):
        mean, half = mean_and_half(points)
        axis.plot([mean - half, mean + half], [y, y], color="#2a7de1", linewidth=6, alpha=0.3, solid_capstyle="butt")
        axis.scatter(points, np.full(len(points), y), color="#1864ab", s=12, zorder=3, linewidth=0)
    axis.axvline(0, color="#212529", linewidth=1, linestyle="--")
    axis.set_yticks(range(len(groups)), list(groups)[::-1], fontsize=8)
    axis.set(xlabel="points of test accuracy over the dense network that trained as long", title=title)
    return made


def _line(
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
