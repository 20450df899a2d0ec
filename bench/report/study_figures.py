"""Figures of the sweeps: each a function from raw rows to a matplotlib figure."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from ..results import Results
from ..studies import boolean_sweep
from ..studies.conditions import DROPCONNECT
from ..studies.tables import against_control, still_shallow
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
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter("{x:g}")
    for axis in (left, right):
        axis.axhline(0, color="#adb5bd", linewidth=1)
        axis.legend(frameon=False, fontsize=8)
    return made


def widths(results: Sequence[Results]) -> Figure:
    """Relative improvement by width and alpha, a panel for each data set."""
    made, axes = figure(4.6 * len(results), 3.6, len(results))
    for axis, one in zip(axes, results, strict=True):
        frame = against_control(one)
        frame = frame[still_shallow(frame) & (frame["condition"] == "random magnitude")]
        for alpha, rows in frame.groupby("alpha"):
            _line(axis, rows, "neurons", ALPHAS[int(alpha)], f"alpha = {alpha}")
        axis.axhline(0, color="#adb5bd", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(xlabel="neurons before the split", title=str(one.settings["data"]))
        axis.legend(frameon=False)
    axes[0].set_ylabel("improvement over dense, %")
    return made


def budget(results: Results) -> Figure:
    """Gain of every structure and policy at 8 neurons and alpha = 2; DropConnect's loss would hide the differences."""
    frame = against_control(results)
    frame = frame[frame["condition"] != DROPCONNECT]
    return _strips(
        frame[still_shallow(frame) & (frame["neurons"] == 8) & (frame["alpha"] == 2)], "8 neurons, alpha = 2"
    )


def hidden(results: Results) -> Figure:
    """Gain of every structure and policy where the pair's output is as wide as its input."""
    frame = against_control(results)
    frame = frame[frame["around"] > 0]
    frame = frame[frame["neurons"] == frame["neurons"].min()]
    around, neurons = frame["around"].iloc[0], frame["neurons"].iloc[0]
    return _strips(frame, f"{around} inputs, {neurons} neurons, {around} outputs, alpha = 2")


def _strips(frame: pd.DataFrame, title: str) -> Figure:
    """Points over the control, condition by condition: a dot a trial, a bar the 95 % interval of the mean."""
    groups = {str(name): rows["points"] for name, rows in frame.groupby("condition", sort=False)}
    groups = {name: points for name, points in groups.items() if not name.startswith("dense")}
    made, (axis,) = figure(6.8, 0.24 * len(groups) + 1.2)
    for y, points in enumerate(reversed(groups.values())):
        mean, half = _interval(points)
        axis.plot([mean - half, mean + half], [y, y], color="#2a7de1", linewidth=6, alpha=0.3, solid_capstyle="butt")
        axis.scatter(points, np.full(len(points), y), color="#1864ab", s=12, zorder=3, linewidth=0)
    axis.axvline(0, color="#212529", linewidth=1, linestyle="--")
    axis.set_yticks(range(len(groups)), list(groups)[::-1], fontsize=8)
    axis.set(xlabel="points of test accuracy over the dense network that trained as long", title=title)
    return made


def _line(axis: Axes, rows: pd.DataFrame, by: str, colour: str, label: str) -> None:
    """Mean relative improvement with its 95 % interval."""
    groups = [
        (x, *_interval(group["relative"].dropna())) for x, group in rows.groupby(by) if group["relative"].notna().any()
    ]
    if groups:
        x, mean, half = np.array(groups).T
        axis.plot(x, mean, "o-", color=colour, linewidth=2, markersize=5, label=label)
        axis.fill_between(x, mean - half, mean + half, color=colour, alpha=0.12, linewidth=0)


def _interval(values: object) -> tuple[float, float]:
    array = np.asarray(values, dtype=float)
    if len(array) < 2:
        return float(array.mean()), 0.0
    return float(array.mean()), float(stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / len(array) ** 0.5)
