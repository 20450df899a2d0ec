"""Tables of the sweeps, drawn from their rows."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import numpy as np
import pandas as pd

from fpe.kernels.structures import SEEDED

from ..results import Results
from ..table import Table
from . import published
from .conditions import CONTINUED, DENSE, SEEDED_HOLES
from .intervals import interval
from .mlp import Cell


def beside_control(results: Results, shape: list[str], column: str) -> pd.DataFrame:
    """The rows beside their control's, trial by trial.

    Columns added: ``control`` (of the dense network of the same shape that trained as long) and ``points`` (over it).

    Args:
        results: Rows of a sweep.
        shape: Columns that a network and its control share.
        column: What is compared.
    """
    frame, key = results.frame, [*shape, "trial"]
    control = frame[frame["condition"] == CONTINUED].set_index(key)[column].rename("control")
    joined = frame.join(control, on=key)
    return joined.assign(points=joined[column] - joined["control"])


def against_control(results: Results) -> pd.DataFrame:
    """The rows of perceptrons by :func:`beside_control`, and ``relative``: points in percent of the control."""
    joined = beside_control(results, ["neurons", "layers", "around"], "test_accuracy")
    return joined.assign(relative=joined["points"] / joined["control"] * 100)


def perceptrons(results: Results, cells: Sequence[Cell], title: str) -> Table:
    """A row for each cell of a study: accuracy, gain over the control, and which layer kept how many weights."""
    frame = against_control(results)
    rows = []
    for cell in dict.fromkeys(cells):
        own = frame[np.logical_and.reduce([frame[name] == value for name, value in asdict(cell).items()])]
        if not len(own):
            continue
        dense = cell.condition in (DENSE, CONTINUED)
        rows.append(
            (
                _label(cell),
                f"{cell.neurons}",
                "-" if dense else f"{cell.alpha}",
                interval(own["test_accuracy"]),
                "-" if dense or own["points"].isna().all() else interval(own["points"], 2, "+"),
                "-" if dense or own["points"].isna().all() else interval(own["relative"], 1, "+"),
                f"{own['cosine_similarity'].mean():+.3f}",
                f"{own['first_nonzeros'].mean():.0f} + {own['second_nonzeros'].mean():.0f}",
            )
        )
    columns = ("condition", "neurons", "alpha", "test %", "points", "relative %", "cosine", "non-zeros of the pair")
    return Table(f"{title} ({_about(results)}; ± is a 95 % interval)", columns, rows)


def _label(cell: Cell) -> str:
    parts = [cell.condition]
    if cell.layers != Cell.layers:
        parts.append(f"{cell.layers} layers")
    if cell.split != Cell.split:
        parts.append(f"split after {cell.split:.0%}")
    if cell.rewire:
        parts.append(f"rewired, {cell.rewire}")
    return ", ".join(parts)


def _about(results: Results) -> str:
    s = results.settings
    return f"{s['data']}, {s['epochs']} + {s['epochs']} epochs, {s['trials']} trials, chosen and reported on the test"


def two_four(results: Results) -> Table:
    """2:4 beside random masks, at 8 neurons (Table A5)."""
    frame = against_control(results)
    frame = frame[(frame["neurons"] == 8) & (frame["alpha"] == 2) & still_shallow(frame)]
    rows = []
    for condition, paper in published.TWO_FOUR.items():
        own = frame[frame["condition"] == condition]
        above = paper - published.TWO_FOUR[CONTINUED]
        control = condition == CONTINUED
        rows.append(
            (
                condition,
                f"{paper:.2f}",
                interval(own["test_accuracy"], 2),
                "-" if control else f"{above:+.2f}",
                "-" if control else interval(own["points"], 2, "+"),
            )
        )
    columns = ("condition", "paper %", "ours %", "paper's points", "our points")
    return Table(f"2:4 against random masks, 8 neurons ({_about(results)}; ± is a 95 % interval)", columns, rows)


def deep(results: Results) -> Table:
    """Relative improvement by depth and width beside the published (Table A3)."""
    rows = []
    for (layers, neurons), dense, ranked, default in _deep_groups(results):
        paper = published.DEEP.get(layers, {}).get(neurons)
        rows.append(
            (
                f"{layers}",
                f"{neurons}",
                interval(dense["test_accuracy"]),
                interval(ranked["test_accuracy"]),
                interval(ranked["relative"], 1, "+"),
                "-" if paper is None else f"{paper:+.1f}",
                interval(default["test_accuracy"]),
                interval(default["relative"], 1, "+"),
                _over(default, ranked),
            )
        )
    before = ("layers", "neurons", "dense %", "ranking %", "relative %", "paper's relative %", "auto %", "relative %")
    columns = (*before, "auto - ranking, points")
    return Table(f"Deep networks, every other layer expanded ({_about(results)}; ± is a 95 % interval)", columns, rows)


def many_classes(results: Results) -> Table:
    """Accuracy by width on a set of many classes beside the published of ImageNet (Table A4)."""
    rows = []
    for (_, neurons), dense, ranked, default in _deep_groups(results):
        before, after = published.IMAGENET[neurons]
        rows.append(
            (
                f"{neurons}",
                interval(dense["test_accuracy"]),
                interval(ranked["test_accuracy"]),
                interval(ranked["points"], 2, "+"),
                interval(default["test_accuracy"]),
                interval(default["points"], 2, "+"),
                _over(default, ranked),
                f"{before:.1f}",
                f"{after - before:+.1f}",
            )
        )
    ours = ("neurons", "dense %", "ranking %", "points", "auto %", "points", "auto - ranking")
    columns = (*ours, "paper's dense %", "paper's points")
    return Table(f"Five layers, every other one expanded ({_about(results)}; ± is a 95 % interval)", columns, rows)


def _over(ours: pd.DataFrame, theirs: pd.DataFrame) -> str:
    """Points of some rows over others, trial by trial."""
    ours, theirs = (rows.set_index("trial")["test_accuracy"] for rows in (ours, theirs))
    return interval((ours - theirs).dropna(), 2, "+")


Group = tuple[tuple[int, int], pd.DataFrame, pd.DataFrame, pd.DataFrame]


def _deep_groups(results: Results) -> Iterator[Group]:
    """Layers and neurons of the deep networks, and their rows: dense, by the paper's ranking, by the default."""
    frame = against_control(results)
    for (layers, neurons), group in frame[(frame["layers"] > 2) & (frame["around"] == 0)].groupby(
        ["layers", "neurons"]
    ):
        dense, ranked, default = (
            group[group["condition"] == name] for name in (CONTINUED, "random magnitude", "random auto")
        )
        yield (int(layers), int(neurons)), dense, ranked, default


def rewiring(results: Results) -> Table:
    """Moving masks over masks that stay and over the dense network, trial by trial."""
    frame = against_control(results)
    frame = frame[(frame["layers"] == 2) & (frame["around"] == 0) & (frame["split"] == Cell.split)]
    key = ["condition", "neurons", "alpha", "trial"]
    still = frame[frame["rewire"] == ""].set_index(key)["test_accuracy"].rename("still")
    moving = frame[frame["rewire"] != ""].join(still, on=key)
    rows = []
    order = {name: i for i, name in enumerate(["random", "gradient", *frame["condition"].unique()])}
    groups = moving.groupby(["condition", "rewire", "neurons"])
    for (condition, regrow, neurons), own in sorted(groups, key=lambda g: [order.get(name, name) for name in g[0]]):
        as_published = (condition, regrow) == ("random magnitude", "random")
        paper, over_dense = (
            known.get(int(neurons)) if as_published else None
            for known in (published.REWIRING, published.REWIRING_RELATIVE)
        )
        rows.append(
            (
                condition,
                f"{neurons}",
                regrow,
                interval(own["still"]),
                interval(own["test_accuracy"]),
                interval(own["test_accuracy"] - own["still"], 2, "+"),
                "-" if paper is None else f"{paper:+.1f}",
                interval(own["relative"], 1, "+"),
                "-" if over_dense is None else f"{over_dense:+.0f}",
            )
        )
    before = ("condition", "neurons", "regrowth", "masks stay %", "masks move %", "points", "paper's points")
    columns = (*before, "over dense, relative %", "paper's relative %")
    return Table(f"Masks that move ({_about(results)}; ± is a 95 % interval)", columns, rows)


def still_shallow(frame: pd.DataFrame) -> pd.Series:
    """Which rows are of one hidden layer that is split half-way, with masks that stay."""
    still = (frame["rewire"] == "") & (frame["split"] == Cell.split)
    return still & (frame["layers"] == Cell.layers) & (frame["around"] == Cell.around)


CHOICES = [
    Cell(condition, neurons, alpha)
    for alpha, conditions in (
        (2, ("random magnitude", "random input", "2:4 input", "4x16 input", "16x64 input")),
        (4, ("random magnitude", "random input", "4x16 input")),
    )
    for condition in conditions
    for neurons in (4, 8, 16, 32, 64)
]
"""What a user of a classifier chooses between."""


def by_width(results: Results, cells: Sequence[Cell]) -> Table:
    """Points over the dense control, a row for each condition among the cells and a column for each width.

    Args:
        results: Rows of perceptrons.
        cells: Which conditions, and which widths.
    """
    frame = against_control(results)
    kinds = list(dict.fromkeys(replace(cell, neurons=0) for cell in cells if cell.condition not in (DENSE, CONTINUED)))
    own = [frame[np.logical_and.reduce([frame[n] == v for n, v in asdict(k).items() if n != "neurons"])] for k in kinds]
    widths = sorted({c.neurons for c in cells} & {int(n) for rows in own for n in rows["neurons"]})
    around = {kind.around for kind in kinds}
    dense = frame[(frame["condition"] == CONTINUED) & (frame["layers"] == Cell.layers) & frame["around"].isin(around)]
    reached = {int(n): interval(group["test_accuracy"]) for n, group in dense.groupby("neurons")}
    table = [("dense-continued, %", *(reached.get(n, "-") for n in widths))]
    for kind, rows in zip(kinds, own, strict=True):
        by = {int(n): interval(group["points"], 1, "+") for n, group in rows.groupby("neurons")}
        table.append((f"{_label(kind)}, alpha = {kind.alpha}", *(by.get(n, "-") for n in widths)))
    columns = ("masks and policy", *(f"{n} neurons" for n in widths))
    title = f"Points of test accuracy over the dense network ({_about(results)}; ± is a 95 % interval)"
    return Table(title, columns, table)


PAIRED = (
    ("random input", "random magnitude"),
    ("2:4 input", "random input"),
    ("4x16 input", "random input"),
    ("16x64 input", "random input"),
    ("shared magnitude", "random magnitude"),
    ("overlapping", "random magnitude"),
    ("fresh weights", "random magnitude"),
)
"""What is compared with what, trial by trial."""


OF_A_SEED = (
    *((f"{SEEDED} {policy}", f"random {policy}") for policy in ("partition", "input", "magnitude")),
    (f"{SEEDED} input{SEEDED_HOLES}", f"{SEEDED} input"),
)
"""What labels of a seed, and holes of one, are compared with."""


def differences(results: Results, ours: str, theirs: str) -> pd.Series:
    """Points between two conditions, trial by trial, by alpha, neurons and trial."""
    frame = results.frame
    frame = frame[still_shallow(frame)]
    accuracy = frame.set_index(["condition", "alpha", "neurons", "trial"])["test_accuracy"]
    return (accuracy.loc[ours] - accuracy.loc[theirs]).dropna()


def paired(results: Results, pairs: Sequence[tuple[str, str]] = PAIRED, together: bool = False) -> Table:
    """Differences between two conditions in points, trial by trial, by width and alpha.

    Args:
        results: Of perceptrons.
        pairs: What is compared with what.
        together: Whether a column has the mean over the widths, of each trial.
    """
    frame = results.frame
    widths = sorted(set(frame[still_shallow(frame) & (frame["condition"] == "random input")]["neurons"]))
    rows = []
    for ours, theirs in pairs:
        for alpha, group in differences(results, ours, theirs).groupby("alpha"):
            by = {neurons: interval(points, 2, "+") for neurons, points in group.groupby("neurons")}
            mean = (interval(group.groupby("trial").mean(), 2, "+"),) if together else ()
            cells = (by.get(neurons, "-") for neurons in widths)
            rows.append((f"{ours} - {theirs}, alpha = {alpha}", *cells, *mean))
    columns = ("comparison", *(f"{neurons} neurons" for neurons in widths), *(("their mean",) if together else ()))
    return Table(f"Differences in points, trial by trial ({_about(results)}; ± is a 95 % interval)", columns, rows)


def equivalent(results: Results) -> Table:
    """How many neurons a dense network needs to do as well, and so how many times the weights (Fig. 6a).

    Between the widths that were trained, accuracy is taken to be a straight line over the logarithm of the width.
    """
    frame = results.frame
    frame = frame[still_shallow(frame)]
    dense = frame[frame["condition"] == CONTINUED].groupby("neurons")["test_accuracy"].mean()
    rows = []
    for (alpha, neurons), own in frame[frame["condition"] == "random magnitude"].groupby(["alpha", "neurons"]):
        reached = own["test_accuracy"].mean()
        if dense.min() <= reached <= dense.max():
            needed = np.exp2(np.interp(reached, dense.to_numpy(), np.log2(dense.index.to_numpy(float))))
            rows.append((f"{neurons}", f"{alpha}", f"{reached:.1f}", f"{needed:.1f}", f"{needed / neurons:.2f}"))
    columns = ("neurons", "alpha", "test %", "neurons of a dense network as good", "times the weights")
    return Table(f"What a split is worth in dense weights ({_about(results)})", columns, rows)
