"""The figures: each a function from raw rows or arrays to a matplotlib figure."""

import io
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fpe.kernels.model import bytes_by_format, relative

from ..results import Results
from ..studies import published
from ..studies.boolean import CONDITIONS, BooleanStudy

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


def boolean_figures(study: BooleanStudy) -> dict[str, Figure]:
    """All figures of the case study, by name."""
    return {
        "curves": curves(study.curves),
        "accuracy": boolean_accuracy(study.results),
        "gram": gram_matrices(study),
        "weights": weight_maps(study),
    }


def curves(results: Results) -> Figure:
    """Test accuracy by epoch: mean and range over trials, the split marked."""
    made, (axis,) = figure(7.2, 3.6)
    split = results.settings["epochs"]
    for condition, rows in results.frame.groupby("condition", sort=False):
        by_epoch = rows.groupby("epoch")["test_accuracy"]
        middle = by_epoch.mean()
        colour = COLOURS[str(condition)]
        axis.fill_between(middle.index, by_epoch.min(), by_epoch.max(), color=colour, alpha=0.15, linewidth=0)
        axis.plot(middle.index, middle, color=colour, linewidth=2)
        axis.annotate(
            str(condition),
            (middle.index[-1], middle.iloc[-1]),
            (6, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontweight="bold",
        )
    axis.axvline(split, color="#adb5bd", linestyle=":", linewidth=1.2)
    axis.annotate("split", (split, axis.get_ylim()[0]), (4, 4), textcoords="offset points", color="#868e96")
    axis.set(xlabel="epoch", ylabel="test accuracy, %", title="The same weights, more neurons")
    axis.margins(x=0)
    axis.set_xlim(right=2 * split * 1.16)
    return made


def boolean_accuracy(results: Results) -> Figure:
    """Every trial's accuracy beside the published mean."""
    made, (axis,) = figure(5.2, 3.2)
    frame = results.frame
    for x, condition in enumerate(CONDITIONS):
        values = frame[frame["condition"] == condition]["test_accuracy"]
        _strip(axis, x, values, COLOURS[condition])
        if condition in published.BOOLEAN:
            axis.plot(
                [x - 0.32, x + 0.32], [published.BOOLEAN[condition]] * 2, color="#212529", linewidth=1.5, linestyle="--"
            )
    axis.plot([], [], color="#212529", linestyle="--", linewidth=1.5, label="published")
    axis.set_xticks(range(len(CONDITIONS)), CONDITIONS)
    axis.margins(y=0.12)  # room for the labels above the dots
    axis.set(ylabel="test accuracy, %", title="Beside the paper")
    axis.legend(frameon=False, loc="lower right")
    return made


def gram_matrices(study: BooleanStudy) -> Figure:
    """Gram matrices of the first layer: blocks on the diagonal are clauses."""
    shown = [name for name in ("dense-continued", "random", "clause") if name in study.weights]
    made, axes = figure(3.1 * len(shown), 3.4, len(shown))
    grams = {name: study.weights[name].T @ study.weights[name] for name in shown}
    scale = max(float(np.quantile(np.abs(g), 0.995)) for g in grams.values()) or 1.0
    literals = study.results.settings["literals"]
    for axis, name in zip(axes, shown, strict=True):
        image = axis.imshow(grams[name], cmap="RdBu_r", vmin=-scale, vmax=scale, interpolation="nearest")
        features = len(grams[name])
        for edge in range(literals, features, literals):
            axis.axhline(edge - 0.5, color="white", linewidth=0.4)
            axis.axvline(edge - 0.5, color="white", linewidth=0.4)
        axis.set(title=name, xticks=[], yticks=[], xlabel="input, clause by clause")
    made.colorbar(image, ax=list(axes), shrink=0.8, label=r"$W_1^\top W_1$")
    return made


def weight_maps(study: BooleanStudy) -> Figure:
    """First-layer weights, neuron by input: white is no edge."""
    shown = [name for name in ("dense-continued", "random", "clause") if name in study.weights]
    made, axes = figure(3.1 * len(shown), 2.6, len(shown))
    scale = max(float(np.quantile(np.abs(study.weights[name]), 0.995)) for name in shown) or 1.0
    literals = study.results.settings["literals"]
    for axis, name in zip(axes, shown, strict=True):
        weights = np.where(study.weights[name] == 0, np.nan, study.weights[name])
        image = axis.imshow(weights, cmap="RdBu_r", vmin=-scale, vmax=scale, aspect="auto", interpolation="nearest")
        for edge in range(literals, weights.shape[1], literals):
            axis.axvline(edge - 0.5, color="#dee2e6", linewidth=0.5)
        axis.set(title=name, xticks=[], yticks=[], xlabel="input, clause by clause", ylabel="neuron")
    made.colorbar(image, ax=list(axes), shrink=0.8, label="weight")
    return made


def vision_accuracy(results: Results) -> Figure:
    """Every trial's accuracy on real data."""
    frame = results.frame
    conditions = list(dict.fromkeys(frame["condition"]))
    made, (axis,) = figure(6.4, 3.2)
    control = frame[frame["condition"] == "dense-continued"]["test_accuracy"].mean()
    axis.axhline(control, color="#adb5bd", linestyle=":", linewidth=1.2)
    for x, condition in enumerate(conditions):
        _strip(axis, x, frame[frame["condition"] == condition]["test_accuracy"], COLOURS[condition])
    axis.set_xticks(range(len(conditions)), conditions)
    axis.margins(y=0.12)
    axis.set(ylabel="test accuracy, %", title=f"Real data: {Path(results.settings['data']).stem}")
    return made


def ledger_bars(ledgers: Mapping[str, list[dict]]) -> Figure:
    """Non-zero weights of each layer, before and after: the bars are of one length."""
    made, (axis,) = figure(6.4, 0.55 * len(ledgers) + 1.2)
    colours = ("#2a7de1", "#74b3f2", "#b8d8fa", "#dcebfb")
    for y, rows in enumerate(reversed(list(ledgers.values()))):
        left = 0
        for i, row in enumerate(rows):
            axis.barh(y, row["nonzeros"], left=left, color=colours[i % 4], edgecolor="white")
            share = f"{row['out']}x{row['in']}"
            axis.text(left + row["nonzeros"] / 2, y, share, ha="center", va="center", fontsize=8, clip_on=True)
            left += row["nonzeros"]
    axis.set_yticks(range(len(ledgers)), list(ledgers)[::-1])
    axis.set(xlabel="non-zero weights, layer by layer", title="Nothing was added")
    return made


def format_bars(n: int, k: int, alphas: tuple[int, ...] = (2, 4, 8)) -> Figure:
    """Bytes of one layer by storage format, over the dense parent."""
    made, (axis,) = figure(6.8, 3.6)
    table = {alpha: relative(bytes_by_format(n, k, alpha)) for alpha in alphas}
    names = [name for name in table[alphas[0]] if name != "parent (dense)"]
    height = 0.8 / len(alphas)
    for i, (alpha, colour) in enumerate(zip(alphas, ("#a5d8ff", "#4dabf7", "#1864ab"), strict=True)):
        for y, name in enumerate(reversed(names)):
            if name not in table[alpha]:
                continue
            place = y + 0.4 - (i + 0.5) * height
            axis.barh(place, table[alpha][name], height * 0.92, color=colour, label=f"alpha = {alpha}" * (y == 0))
            axis.text(table[alpha][name] + 0.06, place, f"{table[alpha][name]:.2f}", va="center", fontsize=7.5)
    axis.axvline(1, color="#212529", linewidth=1, linestyle="--")
    axis.set_yticks(range(len(names)), list(reversed(names)))
    axis.set(xlabel="bytes over the dense parent's, 16-bit weights", title=f"A {n} x {k} layer, stored")
    axis.legend(frameon=False, loc="center right")
    return made


def traffic_lines(results: Results, n: int, k: int) -> Figure:
    """Simulated DRAM bytes of one block layer by batch size, over the least that its dense parent must move."""
    made, (axis,) = figure(6.8, 3.6)
    frame = results.frame
    frame = frame[(frame["N"] == n) & (frame["K"] == k) & (frame["alpha"] > 1) & (frame["block"] != "none")]
    colours = {"forward": "#2a7de1", "dX": "#e8590c", "dW": "#2f9e44"}
    for op, rows in frame.groupby("op", sort=False):
        shown = rows.sort_values("M")
        places = range(len(shown))
        axis.plot(places, shown["dram"] / shown["parent"], "o-", color=colours[str(op)], linewidth=2, label=str(op))
        if op == "forward":
            axis.plot(places, shown["wide"] / shown["parent"], ":", color="#868e96", label="wide dense, forward, least")
            axis.set_xticks(places, [str(m) for m in shown["M"]])
    axis.axhline(1, color="#212529", linewidth=1, linestyle="--")
    axis.set(xlabel="rows of activations M", ylabel="DRAM bytes over the parent's least", title=f"{n} x {k}, alpha = 2")
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(frameon=False)
    return made


def _strip(axis: Axes, x: float, values: object, colour: str) -> None:
    """One column of a strip plot: a dot a trial, and the mean."""
    points = np.asarray(values, dtype=float)
    offsets = np.linspace(-0.12, 0.12, len(points)) if len(points) > 1 else np.zeros(1)
    axis.scatter(x + offsets, points, color=colour, s=26, alpha=0.75, zorder=3, linewidth=0)
    axis.plot([x - 0.22, x + 0.22], [points.mean()] * 2, color=colour, linewidth=3, solid_capstyle="round")
    axis.annotate(
        f"{points.mean():.1f}", (x, points.max()), (0, 7), textcoords="offset points", ha="center", color=colour
    )
