"""The Boolean task by clauses and neurons (paper, section 2.2.1): where a split gains, and what goes with the gain."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import nn

import fpe

from ..results import Results
from ..table import Table
from . import sweep
from .boolean import Choices, make_data
from .conditions import linear_of
from .dnf import clause_of
from .drawing import COLOURS, doubling, figure, line
from .intervals import interval
from .protocol import Data
from .stack import epochs_of, seeded, train_all
from .study import committed
from .sweep import Sweep

CLAUSES = (3, 6, 8, 10, 15, 20, 25, 32)
"""The counts of the paper's tables."""

NEURONS = (4, 8, 16, 32)


@dataclass(frozen=True)
class Settings(sweep.Settings):
    """Settings of this study, whose trials share their samples; the rest is as in :class:`.boolean.Choices`.

    Attributes:
        samples: Training samples.
    """

    epochs: int = 80
    samples: int = 20_000


@dataclass(frozen=True)
class Cell:
    """One configuration: how many clauses, how many neurons, and what happens at the split."""

    condition: str
    clauses: int = 8
    neurons: int = 8
    alpha: int = 2


def cells() -> list[Cell]:
    """Every number of clauses at every width."""
    conditions = ("dense-continued", "random", "clause")
    return [Cell(c, clauses, neurons) for clauses in CLAUSES for neurons in NEURONS for c in conditions]


def run_cell(cell: Cell, settings: Settings) -> list[dict[str, Any]]:
    """Trains all trials of a cell; a row for each.

    Up to half of all bits are active, at any number of clauses.
    """
    choices, data = _task(cell.clauses, settings)
    generators = [torch.Generator().manual_seed(settings.seed * 1009 + trial) for trial in range(settings.trials)]
    groups = clause_of(choices.clauses, choices.literals)
    options: dict[str, Any] = {"resparsify": "magnitude", "alpha": cell.alpha}
    if cell.condition == "clause":
        options.update(split="groups", groups=groups)
    models = _dense(cell.clauses, cell.neurons, settings)
    if cell.condition != "dense-continued":
        models = [
            fpe.expand(model, generator=generator, **options)
            for model, generator in zip(models, generators, strict=True)
        ]
    weights = [fpe.nonzeros(model) for model in models]
    batches = epochs_of(data, settings.epochs, choices.batch, torch.Generator().manual_seed(settings.seed + 1))
    stack = train_all(models, batches, choices.training, settings.device)
    accuracy = stack.accuracy(data.x_test, data.y_test)
    rows = []
    for trial, model in enumerate(stack.models()):
        first = linear_of(model, "0").weight.detach()
        rows.append(
            {
                **asdict(cell),
                "trial": trial,
                "test_accuracy": round(accuracy[trial], 4),
                "clause_capacity": float(fpe.metrics.feature_capacity(first, groups.to(first.device)).mean()),
                "cosine_similarity": float(fpe.metrics.mean_cosine_similarity(first)),
                "nonzeros": weights[trial],
            }
        )
    return rows


@lru_cache(maxsize=2)
def _task(clauses: int, settings: Settings) -> tuple[Choices, Data]:
    active = (4, 2 * clauses)
    choices = replace(Choices(), clauses=clauses, active=active, samples=settings.samples, epochs=settings.epochs)
    data = make_data(choices, torch.Generator().manual_seed(settings.seed * 1009 + clauses))
    return choices, data.to(settings.device)


@lru_cache(maxsize=2)
def _dense(clauses: int, neurons: int, settings: Settings) -> list[nn.Module]:
    choices, data = _task(clauses, settings)

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(clauses * choices.literals, neurons), nn.ReLU(), nn.Linear(neurons, 1))

    models = seeded(make, settings.trials, settings.seed)
    batches = epochs_of(data, settings.epochs, choices.batch, torch.Generator().manual_seed(settings.seed))
    return [model.cpu() for model in train_all(models, batches, choices.training, settings.device).models()]


def gains(results: Results) -> pd.DataFrame:
    """The expanded networks beside their controls, trial by trial.

    Columns added: ``relative`` (gain in percent of the control), ``capacity_ratio`` (capacity of a clause over the
    control's) and ``cosine_change`` (the control's mean cosine less the network's own).
    """
    frame = results.frame
    shape = ["clauses", "neurons", "trial"]
    control = frame[frame["condition"] == "dense-continued"].set_index(shape).add_suffix("_control")
    joined = frame[frame["condition"] != "dense-continued"].join(control, on=shape)
    control_accuracy = joined["test_accuracy_control"]
    joined["relative"] = (joined["test_accuracy"] - control_accuracy) / control_accuracy * 100
    joined["capacity_ratio"] = joined["clause_capacity"] / joined["clause_capacity_control"]
    joined["cosine_change"] = joined["cosine_similarity_control"] - joined["cosine_similarity"]
    return joined


def table(results: Results, shown: Sequence[Cell]) -> Table:
    """A row for each number of clauses and neurons."""
    frame, gained = results.frame, gains(results)
    rows = []
    for clauses, neurons in dict.fromkeys((cell.clauses, cell.neurons) for cell in shown):
        own = frame[(frame["clauses"] == clauses) & (frame["neurons"] == neurons)]
        split = gained[(gained["clauses"] == clauses) & (gained["neurons"] == neurons)]
        cells_of = [f"{clauses}", f"{neurons}", interval(own[own["condition"] == "dense-continued"]["test_accuracy"])]
        for condition in ("random", "clause"):
            kind = split[split["condition"] == condition]
            cells_of += [interval(kind["test_accuracy"]), interval(kind["relative"], 1, "+")]
            cells_of.append(f"{kind['capacity_ratio'].mean():.2f}")
        rows.append(tuple(cells_of))
    split_columns = ("relative %", "capacity ratio")
    columns = ("clauses", "neurons", "dense %", "random %", *split_columns, "clause split %", *split_columns)
    s = results.settings
    title = f"Boolean task by clauses and neurons, {s['epochs']} + {s['epochs']} epochs, {s['trials']} trials"
    return Table(f"{title}, test; ± is a 95 % interval", columns, rows)


def regressions(results: Results) -> Table:
    """How much of the gain goes with capacity and with cosine: straight lines through networks, and through means.

    The paper's cut is through the means of the sizes at 8 clauses; beside it all means, and all networks.
    """
    gained = gains(results)
    shape = ["condition", "clauses", "neurons"]
    means = gained.groupby(shape)[["relative", "capacity_ratio", "cosine_change"]].mean().reset_index()
    points = {"means at 8 clauses": means[means["clauses"] == 8], "all means": means, "all networks": gained}
    rows = []
    for condition in ("random", "clause"):
        for name, column in (("capacity ratio", "capacity_ratio"), ("fall in cosine", "cosine_change")):
            cells_of = []
            for frame in points.values():
                own = frame[frame["condition"] == condition]
                fit = stats.linregress(own[column], own["relative"])
                cells_of.append(f"{fit.slope:+.1f}, {fit.rvalue**2:.2f} ({len(own)})")
            own = means[means["condition"] == condition]
            unchanged = 1 if column == "capacity_ratio" else 0
            cells_of.append(f"{(own[column] > unchanged).sum()} of {len(own)}")
            rows.append((f"{condition}: {name}", *cells_of))
    columns = ("split: on", *(f"{name}: slope, R² (points)" for name in points), "sizes in which it is so")
    return Table("Relative improvement in percent, regressed on what the split changes (test)", columns, rows)


def lines(results: Results) -> Figure:
    """Relative improvement by clauses at 8 neurons, and by neurons at 8 clauses."""
    made, (left, right) = figure(8.4, 3.6, 2)
    gained = gains(results)
    for condition in ("random", "clause"):
        kind = gained[gained["condition"] == condition]
        colour = COLOURS[condition]
        line(left, kind[kind["neurons"] == 8], "clauses", colour, f"{condition} split")
        line(right, kind[kind["clauses"] == 8], "neurons", colour, f"{condition} split")
    left.set(xlabel="clauses", ylabel="improvement over dense, %", title="8 neurons")
    right.set(xlabel="neurons", title="8 clauses")
    doubling(right)
    for axis in (left, right):
        axis.axhline(0, color="#adb5bd", linewidth=1)
        axis.legend(frameon=False, fontsize=8)
    return made


def heatmap(results: Results) -> Figure:
    """Mean relative improvement of every number of clauses and neurons, a panel for each split."""
    made, axes = figure(8.4, 3.4, 2)
    gained = gains(results)
    by_split = {c: rows.pivot_table("relative", "neurons", "clauses") for c, rows in gained.groupby("condition")}
    limit = max(float(np.nanmax(np.abs(grid.to_numpy()))) for grid in by_split.values())
    for axis, condition in zip(axes, ("random", "clause"), strict=True):
        grid = by_split[condition]
        axis.imshow(grid, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
        for (y, x), value in np.ndenumerate(grid.to_numpy()):
            shade = "white" if abs(value) > 0.6 * limit else "#111111"  # whatever the page's colours are
            if not np.isnan(value):
                shown = f"{round(value):+d}" if round(value) else "0"
                axis.text(x, y, shown, ha="center", va="center", fontsize=8, color=shade)
        axis.set_xticks(range(len(grid.columns)), [f"{c}" for c in grid.columns])
        axis.set_yticks(range(len(grid.index)), [f"{n}" for n in grid.index])
        axis.set(xlabel="clauses", title=f"{condition} split, improvement over dense, %")
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel("neurons")
    return made


def features(results: Results) -> Figure:
    """Capacity and cosine by clauses at 8 neurons, and the gain of every network against the change of both."""
    made, axes = figure(8.4, 6.4, 2, 2)
    gained = gains(results)
    for condition, rows in gained.groupby("condition"):
        colour, eight = COLOURS[str(condition)], rows[rows["neurons"] == 8]
        line(axes[0], eight, "clauses", colour, f"{condition} split", "capacity_ratio")
        line(axes[1], eight, "clauses", colour, f"{condition} split", "cosine_similarity")
        for axis, column in ((axes[2], "capacity_ratio"), (axes[3], "cosine_change")):
            fit = stats.linregress(rows[column], rows["relative"])
            ends = np.array([rows[column].min(), rows[column].max()])
            axis.scatter(rows[column], rows["relative"], s=7, color=colour, alpha=0.5, linewidth=0)
            label = f"{condition}: R² = {fit.rvalue**2:.2f}"
            axis.plot(ends, fit.intercept + fit.slope * ends, color=colour, linewidth=2, label=label)
    dense = gained[(gained["condition"] == "random") & (gained["neurons"] == 8)]
    line(axes[1], dense, "clauses", COLOURS["dense"], "dense", "cosine_similarity_control")
    axes[0].set(xlabel="clauses", ylabel="capacity of a clause, times dense", title="8 neurons")
    axes[1].set(xlabel="clauses", ylabel="mean cosine of two neurons", title="8 neurons")
    axes[2].set(xlabel="capacity of a clause, times dense", ylabel="improvement over dense, %")
    axes[3].set(xlabel="fall of the mean cosine", ylabel="improvement over dense, %")
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
    return made


SWEEP: Sweep = Sweep(
    "boolean-sweep",
    "Learn formulas of 3 to 32 clauses with 4 to 32 neurons: dense, random split, clause split.",
    "boolean-sweep",
    Settings,
    cells,
    run_cell,
    table,
    [Cell(condition, clauses=3) for condition in ("dense-continued", "random", "clause")],
    {"trials": 2, "epochs": 1, "samples": 2000},
    tables={
        "boolean-sweep": lambda: SWEEP.shown("boolean-sweep"),
        "boolean-regressions": lambda: regressions(committed("boolean-sweep")),
    },
    figures={
        "boolean-sweep": lambda: lines(committed("boolean-sweep")),
        "boolean-heatmap": lambda: heatmap(committed("boolean-sweep")),
        "boolean-features": lambda: features(committed("boolean-sweep")),
    },
)
STUDIES = (SWEEP,)
