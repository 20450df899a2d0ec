"""Figures of the perceptrons: each a function from raw rows to a matplotlib figure."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..results import Results
from .conditions import CONTINUED, DROPCONNECT
from .drawing import COLOURS, doubling, figure, line
from .intervals import mean_and_half
from .mlp import Cell
from .tables import OF_A_SEED, against_control, differences, still_shallow

ALPHAS = {2: "#2a7de1", 4: "#e8590c", 8: "#2f9e44"}
MANY = ("#2a7de1", "#e8590c", "#2f9e44", "#9c36b5", "#0c8599", "#868e96")
"""Colours of lines in an order."""


def widths(results: Sequence[Results]) -> Figure:
    """Relative improvement by width and alpha, random and Gram split, a panel for each data set."""
    made, axes = figure(4.2 * len(results), 3.6, len(results))
    for axis, one in zip(axes, results, strict=True):
        frame = against_control(one)
        frame = frame[still_shallow(frame)]
        for split, style in (("random", "-"), ("gram", ":")):
            for alpha, rows in frame[frame["condition"] == f"{split} magnitude"].groupby("alpha"):
                line(axis, rows, "neurons", ALPHAS[int(alpha)], f"alpha = {alpha}, {split}", style=style)
        axis.axhline(0, color="#adb5bd", linewidth=1)
        doubling(axis)
        axis.set(xlabel="neurons before the split", title=str(one.settings["data"]))
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("improvement over dense, %")
    return made


def vision(results: Results) -> Figure:
    """The paper's Fig. 6: dense weights a split is worth, when to split, cosine, and the expansion factor."""
    made, axes = figure(8.4, 6.6, 2, 2)
    frame = against_control(results)
    shallow = frame[(frame["layers"] == Cell.layers) & (frame["around"] == 0) & (frame["rewire"] == "")]
    half = shallow[shallow["split"] == Cell.split]
    dense, wide = half[half["condition"] == CONTINUED], half[half["condition"] == "random magnitude"]

    line(axes[0], dense, "nonzeros", COLOURS["dense"], "dense", "test_accuracy")
    for alpha, rows in wide.groupby("alpha"):
        line(axes[0], rows, "nonzeros", ALPHAS[int(alpha)], f"alpha = {alpha}", "test_accuracy")
        line(axes[2], rows, "neurons", ALPHAS[int(alpha)], f"alpha = {alpha}", "cosine_similarity")
    line(axes[2], dense, "neurons", COLOURS["dense"], "dense", "cosine_similarity")
    when = shallow[(shallow["condition"] == "random magnitude") & (shallow["alpha"] == 2) & (shallow["neurons"] == 8)]
    line(axes[1], when, "split", ALPHAS[2], "8 neurons, alpha = 2", "points")
    for colour, (neurons, rows) in zip(MANY, wide.groupby("neurons"), strict=True):
        line(axes[3], rows, "alpha", colour, f"{neurons} neurons", "points")

    axes[0].set(xlabel="non-zero weights", ylabel="test accuracy, %", title="a. Equal weights")
    axes[1].set(xlabel="share of the epochs before the split", ylabel="points over dense", title="b. When to split")
    axes[2].set(xlabel="neurons before the split", ylabel="mean cosine of two neurons", title="c. Cosine")
    axes[3].set(xlabel="alpha", ylabel="points over dense", title="d. Expansion factor")
    for axis in (axes[0], axes[2], axes[3]):
        doubling(axis)
    for axis in axes[:3]:
        axis.legend(frameon=False, fontsize=8)
    axes[3].set_ylim(top=1.4 * axes[3].get_ylim()[1])  # room for the names of six lines
    axes[3].legend(frameon=False, fontsize=8, ncols=3, loc="upper center")
    return made


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


def of_a_seed(results: Sequence[Results]) -> Figure:
    """What labels and holes of a seed change, trial by trial: a column of panels for each data set."""
    made, axes = figure(3.8 * len(results), 2.2 * len(OF_A_SEED), len(results), len(OF_A_SEED))
    for row, (ours, theirs) in zip(axes.reshape(-1, len(results)), OF_A_SEED, strict=True):
        for axis, one in zip(row, results, strict=True):
            points = differences(one, ours, theirs).rename("points").reset_index()
            for alpha, rows in points.groupby("alpha"):
                line(axis, rows, "neurons", ALPHAS[int(alpha)], f"alpha = {alpha}", "points")
            axis.axhline(0, color="#212529", linewidth=1, linestyle="--")
            doubling(axis)
            axis.set_title(f"{ours} - {theirs}", fontsize=9)
        row[0].set_ylabel("points")
    for axis, one in zip(axes[-len(results) :], results, strict=True):
        axis.set_xlabel(f"neurons before the split, {one.settings['data']}")
    axes[0].legend(frameon=False, fontsize=8)
    return made


def _strips(frame: pd.DataFrame, title: str) -> Figure:
    """Points over the control, condition by condition: a dot a trial, a bar the 95 % interval of the mean."""
    groups = {str(name): rows["points"] for name, rows in frame.groupby("condition", sort=False)}
    groups = {name: points for name, points in groups.items() if not name.startswith("dense")}
    made, (axis,) = figure(6.8, 0.24 * len(groups) + 1.2)
    for y, points in enumerate(reversed(groups.values())):
        mean, half = mean_and_half(points)
        axis.plot([mean - half, mean + half], [y, y], color="#2a7de1", linewidth=6, alpha=0.3, solid_capstyle="butt")
        axis.scatter(points, np.full(len(points), y), color="#2a7de1", s=12, zorder=3, linewidth=0)
    axis.axvline(0, color="#212529", linewidth=1, linestyle="--")
    axis.set_yticks(range(len(groups)), list(groups)[::-1], fontsize=8)
    axis.set(xlabel="points of test accuracy over the dense network that trained as long", title=title)
    return made
