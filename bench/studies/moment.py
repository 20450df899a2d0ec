"""When to split: epochs before the split against epochs after it, the dense network that trains as long beside each."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import fpe

from ..results import Results
from ..table import Table
from .conditions import CONTINUED
from .drawing import COLOURS, figure, line
from .intervals import interval
from .study import committed
from .sweep import Sweep
from .trials import Settings, compact, generators, load_held_out, measured, train

SPLIT = "random magnitude"
"""The paper's expansion, as :mod:`.conditions` names it."""

BEFORE = (0, 2, 10, 25, 50)
AFTER = 25
"""Epochs after the split where those before it vary."""

TOTAL = 50
"""Epochs in all where the moment of the split varies."""


@dataclass(frozen=True)
class Cell:
    """One configuration (alpha = 2): the split or none, the width, and epochs before and after."""

    condition: str
    before: int
    after: int
    neurons: int = 8


def cells() -> list[Cell]:
    """As many epochs after every warm-up; and as many epochs in all."""
    made = [Cell(SPLIT, before, AFTER) for before in BEFORE]
    made += [Cell(SPLIT, before, TOTAL - before) for before in (0, 10, 40, 45)]
    return made + [Cell(CONTINUED, before, AFTER) for before in (0, AFTER)]


def run_cell(cell: Cell, settings: Settings) -> list[dict[str, Any]]:
    """Trains all trials of a cell; a row for each."""
    data = load_held_out(settings.data, settings.device)
    models = list(compact(data, cell.neurons, cell.before, settings))
    if cell.condition == SPLIT:
        each = zip(models, generators(settings, 2), strict=True)
        models = [fpe.expand(model, 2, resparsify="magnitude", generator=draw) for model, draw in each]
    stack = train(models, data, cell.after, settings, 1)
    return [{**asdict(cell), "trial": trial, **row} for trial, row in enumerate(measured(stack, data))]


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


def _over_now(among: pd.DataFrame, own: pd.DataFrame) -> tuple[str, str]:
    """Test accuracy of some rows, and their points over the split before the first epoch, trial by trial."""
    if not len(own):
        return "-", "-"
    now = among[among["before"] == 0].set_index("trial")["test_accuracy"]
    reached = own.set_index("trial")["test_accuracy"]
    at_once = (own["before"] == 0).all()
    return interval(reached), "-" if at_once or not len(now) else interval((reached - now).dropna(), 2, "+")


def warm_up(results: Results) -> Figure:
    """Test accuracy by the epochs before the split."""
    made, (axis,) = figure(5.6, 3.4)
    frame = results.frame
    split, dense = (frame[frame["condition"] == name] for name in (SPLIT, CONTINUED))
    total = split[split["before"] + split["after"] == TOTAL]
    fixed = split["after"] == AFTER
    line(axis, split[fixed], "before", COLOURS["random"], f"{AFTER} epochs after the split", "test_accuracy")
    line(axis, total, "before", COLOURS["clause"], f"{TOTAL} epochs in all", "test_accuracy")
    line(axis, dense, "before", COLOURS["dense"], f"dense, {AFTER} more", "test_accuracy")
    axis.set(xlabel="epochs before the split", ylabel="test accuracy, %", title="When to split")
    axis.set_xticks(np.arange(0, TOTAL + 1, 10))
    axis.legend(frameon=False, fontsize=8)
    return made


TEXT = "moment-wordnet100_minilm_384"
"""Committed rows."""

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
    tables={"moment": lambda: SWEEP.shown(TEXT)},
    figures={"moment": lambda: warm_up(committed(TEXT))},
)
STUDIES = (SWEEP,)
