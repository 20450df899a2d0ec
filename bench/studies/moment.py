"""When to split: epochs before the split against epochs after it, the dense network that trains as long beside each.

Two signs of the dense network could say when: its training loss hardly falls any more, or its weights' magnitudes keep
their ranks from one epoch to the next. Both are looked at after every epoch of a dense run; a criterion is one of them
with a threshold.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

import fpe

from ..results import Results
from ..table import Table
from .conditions import CONTINUED
from .drawing import COLOURS, below, figure, line
from .intervals import interval
from .protocol import Data
from .stack import Stack
from .study import committed
from .sweep import Sweep
from .transformer import measured as bits_of
from .trials import Settings, compact, generators, load_held_out, measured, train

SPLIT = "random magnitude"
"""The paper's expansion, as :mod:`.conditions` names it."""

BEFORE = (0, 2, 10, 25, 50)
AFTER = 25
"""Epochs after the split where those before it vary."""

TOTAL = 50
"""Epochs in all where the moment of the split varies."""

MOMENTS = (0, 2, 5, 10, 15, 25, 40, 45)
"""Epochs before the split then."""

LOSS, RANKS = "loss falls by less than", "ranks correlate by more than"
THRESHOLDS = {LOSS: (0.9, 0.75, 0.5, 0.25), RANKS: (0.9, 0.99, 0.998, 0.9995)}
"""Criteria: an epoch's relative fall of the training loss, as a share of the steepest so far; Spearman's correlation of
the first layer's magnitudes with those of an epoch before."""


@dataclass(frozen=True)
class Cell:
    """One configuration (alpha = 2): the split or none, the width, and epochs before and after."""

    condition: str
    before: int
    after: int
    neurons: int = 8


def cells() -> list[Cell]:
    """As many epochs after every warm-up; as many epochs in all; and the dense run that criteria look at."""
    made = [Cell(SPLIT, before, TOTAL - before) for before in MOMENTS]
    made += [Cell(condition, before, AFTER) for before in BEFORE for condition in (SPLIT, CONTINUED)]
    return [*made, Cell(CONTINUED, 0, TOTAL)]


@dataclass
class Signs:
    """What can be seen of dense networks after every epoch.

    Attributes:
        data: What they learn.
        steps: To an epoch.
        loss: Bits of every network over the training samples, after each epoch.
        ranks: Correlation of the first layer's ranked magnitudes with those of an epoch before, from the second on.
    """

    data: Data
    steps: int
    loss: list[list[float]] = field(default_factory=list)
    ranks: list[list[float]] = field(default_factory=list)
    _last: Tensor | None = None

    @torch.no_grad()
    def __call__(self, step: int, stack: Stack, gradients: dict[str, Tensor]) -> None:
        """A look, at the end of an epoch. It moves no masks."""
        if step % self.steps:
            return
        self.loss.append(bits_of(stack, self.data.x, self.data.y)[0])
        first = next(iter(stack.weights.values()))
        ranks = first.abs().flatten(1).argsort(1).argsort(1).double()
        ranks = ranks - ranks.mean(1, keepdim=True)
        if self._last is not None:
            self.ranks.append(((ranks * self._last).sum(1) / ranks.square().sum(1)).tolist())
        self._last = ranks


def run_cell(cell: Cell, settings: Settings) -> list[dict[str, Any]]:
    """Trains all trials of a cell; a row for each."""
    data = load_held_out(settings.data, settings.device)
    models = list(compact(data, cell.neurons, cell.before, settings))
    if cell.condition == SPLIT:
        each = zip(models, generators(settings, 2), strict=True)
        models = [fpe.expand(model, 2, resparsify="magnitude", generator=draw) for model, draw in each]
    looks = cell.condition == CONTINUED and not cell.before
    signs = Signs(data, math.ceil(len(data.x) / settings.batch)) if looks else None
    stack = train(models, data, cell.after, settings, 1, signs)
    rows = [{**asdict(cell), "trial": trial, **row} for trial, row in enumerate(measured(stack, data))]
    if signs:
        for trial, row in enumerate(rows):
            row["loss"] = [round(bits[trial], 5) for bits in signs.loss]
            row["ranks"] = [round(alike[trial], 5) for alike in signs.ranks]
    return rows


def table(results: Results, shown: Sequence[Cell]) -> Table:
    """Accuracy by the epochs before the split, with as many after it and with as many in all.

    The last row is what a criterion could win at most where the epochs in all are fixed: of each trial the moment that
    does best on its validation samples, over a split before the first epoch.
    """
    frame = results.frame
    split, dense = (frame[frame["condition"] == name] for name in (SPLIT, CONTINUED))
    fixed, in_all = split[split["after"] == AFTER], split[split["before"] + split["after"] == TOTAL]
    rows = []
    for before in sorted(set(split["before"])):
        beside = dense[(dense["before"] == before) & (dense["after"] == AFTER)]
        cells = (text for kind in (fixed, in_all) for text in _over_now(kind, kind[kind["before"] == before]))
        rows.append((f"{before}", interval(beside["test_accuracy"]), *cells))
    if len(in_all):
        best = in_all.loc[in_all.groupby("trial")["validation_accuracy"].idxmax()]
        rows.append(("best by validation", "-", "-", "-", *_over_now(in_all, best)))
    s = results.settings
    title = f"When to split ({s['data']}, 8 neurons, alpha = 2, {s['trials']} trials, test; ± is a 95 % interval)"
    after, total = (f"{AFTER} more epochs", f"{TOTAL} epochs in all")
    columns = ("epochs before", f"dense % with {after}", f"split % with {after}", "over now, points")
    return Table(title, (*columns, f"split % with {total}", "over now, points"), rows)


def fired(row: pd.Series, criterion: str, threshold: float) -> int:
    """Epochs of a dense run after which a criterion holds for the first time; :data:`TOTAL` if it never does."""
    holds = np.array(row["ranks"]) > threshold
    if criterion == LOSS:
        loss = np.array(row["loss"])
        fall = -np.diff(loss) / loss[:-1]
        holds = fall < threshold * np.maximum.accumulate(fall)
    return int(holds.argmax()) + 2 if holds.any() else TOTAL


def criteria(several: Sequence[Results]) -> Table:
    """What a criterion would have won over a split before the first epoch, and over one half-way.

    A network is split at the first moment that was tried after its criterion holds, or at the last one.
    """
    rows = []
    for results in several:
        frame = results.frame
        dense = frame[(frame["condition"] == CONTINUED) & (frame["after"] == TOTAL)].set_index("trial")
        split = frame[(frame["condition"] == SPLIT) & (frame["before"] + frame["after"] == TOTAL)]
        tried = sorted({int(before) for before in split["before"]})
        by = split.set_index(["before", "trial"])[["validation_accuracy", "test_accuracy"]]
        for criterion, thresholds in THRESHOLDS.items():
            for threshold in thresholds:
                moments = [(fired(row, criterion, threshold), trial) for trial, row in dense.iterrows()]
                taken = [(next((m for m in tried if m >= at), tried[-1]), trial) for at, trial in moments]
                own = by.loc[taken].reset_index("before")
                over = [own["test_accuracy"] - by.loc[moment]["test_accuracy"] for moment in (0, AFTER)]
                rows.append(
                    (
                        str(results.settings["data"]),
                        f"{criterion} {f'{threshold:.0%} of its steepest' if criterion == LOSS else threshold}",
                        interval(own["before"]),
                        interval(own["validation_accuracy"]),
                        interval(own["test_accuracy"]),
                        *(interval(points, 2, "+") for points in over),
                    )
                )
    counts = sorted({int(results.settings["trials"]) for results in several})
    columns = (
        "data",
        "criterion",
        "epochs before",
        "validation %",
        "test %",
        "over now, points",
        "over half-way, points",
    )
    title = (
        f"Criteria for the split, {TOTAL} epochs in all, 8 neurons, alpha = 2, {' or '.join(map(str, counts))} trials"
    )
    return Table(f"{title}, all thresholds that were tried, test; ± is a 95 % interval", columns, rows)


def _over_now(among: pd.DataFrame, own: pd.DataFrame) -> tuple[str, str]:
    """Test accuracy of some rows, and their points over the split before the first epoch, trial by trial."""
    if not len(own):
        return "-", "-"
    now = among[among["before"] == 0].set_index("trial")["test_accuracy"]
    reached = own.set_index("trial")["test_accuracy"]
    at_once = (own["before"] == 0).all()
    return interval(reached), "-" if at_once or not len(now) else interval((reached - now).dropna(), 2, "+")


def warm_up(several: Sequence[Results]) -> Figure:
    """Test accuracy by the epochs before the split, a panel for each data set."""
    made, axes = figure(4.2 * len(several), 3.6, len(several))
    for axis, results in zip(axes, several, strict=True):
        frame = results.frame
        split, dense = (frame[frame["condition"] == name] for name in (SPLIT, CONTINUED))
        total = split[split["before"] + split["after"] == TOTAL]
        fixed = [kind[kind["after"] == AFTER] for kind in (split, dense)]
        line(axis, fixed[0], "before", COLOURS["random"], f"{AFTER} epochs after the split", "test_accuracy")
        line(axis, total, "before", COLOURS["clause"], f"{TOTAL} epochs in all", "test_accuracy")
        line(axis, fixed[1], "before", COLOURS["dense"], f"dense, {AFTER} more", "test_accuracy")
        axis.set(xlabel="epochs before the split", ylabel="test accuracy, %", title=results.settings["data"])
        axis.set_xticks(np.arange(0, TOTAL + 1, 10))
    below(made, 3)
    return made


FILES = {"moment": "moment-wordnet100_minilm_384", "moment-cifar100": "moment-cifar100quarter_lite2_512"}
"""Committed rows, by the table that is drawn from them."""

SWEEP: Sweep = Sweep(
    "moment",
    "When to split: vary the epochs before it at fixed epochs after it, and at fixed epochs in all.",
    "moment",
    Settings,
    cells,
    run_cell,
    table,
    [Cell(SPLIT, 0, AFTER, 4), Cell(SPLIT, 1, AFTER, 4), Cell(CONTINUED, 1, AFTER, 4)],
    {"trials": 2, "batch": 512, "data": "digits"},
    tables={
        **{table: lambda rows=rows: SWEEP.shown(rows) for table, rows in FILES.items()},  # type: ignore[misc]
        "moment-criteria": lambda: criteria([committed(rows) for rows in FILES.values()]),
    },
    figures={"moment": lambda: warm_up([committed(rows) for rows in FILES.values()])},
)
STUDIES = (SWEEP,)
