"""Small transformers trained until their validation loss stops falling: what does a split gain then?

The study :mod:`.transformer` trains for a number of steps. Here a round of training ends by itself. Once the validation
loss, its mean over a cell's trials, has not fallen by :data:`ENOUGH` in :data:`PATIENCE` looks, the step size is cut;
after the last cut the round is over, and every network keeps its best weights by its own validation loss.

Everything trains for two rounds, the second with a new optimizer and the whole step size: a compact model is split
between them or not, and what has new weights trains in its own form in both.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..results import Results
from ..table import Table
from . import conditions, transformer
from .conditions import CONTINUED, WIDE
from .drawing import COLOURS, below, figure
from .intervals import interval, mean_and_half
from .protocol import Training
from .stack import Batches, Stack, classification_loss, seeded
from .study import committed
from .sweep import Sweep
from .transformer import (
    BOTH,
    FRESH,
    NAMED,
    PARTITION,
    RANKING,
    SIZES,
    STEPS,
    Watch,
    measured,
    model_of,
    over,
    pairs,
    samples_of,
    sequences,
)
from .trials import generators

EVERY = 200
"""Steps between two looks."""

PATIENCE, ENOUGH = 6, 0.002
"""Looks without a fall of so many bits after which the step size is cut."""

FALLEN = 4
"""Looks at the beginning that figures leave out above their upper edge."""

CUT, CUTS = 4.0, 2
"""What it is divided by, and how often; then the round ends."""


GROUPS = (0, 1)
"""Of every cell."""


@dataclass(frozen=True)
class Settings(transformer.Settings):
    """Settings of this study, whose epochs are the hundreds of steps that a round may take at most.

    Attributes:
        trials: Networks to a group.
    """

    trials: int = 3
    epochs: int = 400


@dataclass(frozen=True)
class Cell:
    """One configuration (alpha = 2, both kinds of pairs).

    Attributes:
        condition: What trains.
        rounds: After how many of them it is looked at.
        group: Networks of one group share their step sizes and their end; those of another have other seeds.
        size: Of the model.
    """

    condition: str
    rounds: int = 2
    group: int = 0
    size: str = "narrow"


def cells() -> list[Cell]:
    """The compact model before and after its second round, both policies between them, new weights after either."""
    looks = [(CONTINUED, 1), (CONTINUED, 2), (PARTITION, 2), (RANKING, 2), (WIDE, 1), (WIDE, 2), (FRESH, 1), (FRESH, 2)]
    return [Cell(condition, rounds, group, size) for size in SIZES for group in GROUPS for condition, rounds in looks]


@dataclass
class Plateau(Watch):
    """A watch that also says how large steps are, and when to stop.

    Attributes:
        share: Of the step size.
        cuts: Times that it was cut.
        done: Whether training is over.
    """

    share: float = 1.0
    cuts: int = 0
    done: bool = False
    _lowest: float = torch.inf
    _without: int = 0

    @torch.no_grad()
    def __call__(self, step: int, stack: Stack, gradients: dict[str, Tensor]) -> None:
        """A look, where it is time for one. It moves no masks."""
        if step % self.every:
            return
        super().__call__(step, stack, gradients)
        mean = float(self.curve[-1].mean())
        fell = mean < self._lowest - ENOUGH
        self._lowest, self._without = (mean, 0) if fell else (self._lowest, self._without + 1)
        if self._without == PATIENCE:
            self.done = self.cuts == CUTS
            self.share, self.cuts, self._without = self.share / CUT, self.cuts + 1, 0

    def until(self, batches: Batches) -> Batches:
        """The batches up to the end."""
        for batch in batches:
            if self.done:
                return
            yield batch


def _round(stack: Stack, settings: Settings, number: int) -> Plateau:
    """Trains until the validation loss stops falling and leaves every network at its best; what was seen."""
    data, most = sequences(settings.data, settings.device), STEPS * settings.epochs
    batch = max(1, settings.tokens // data.x.shape[1])
    watch = Plateau(data, min(EVERY, most))
    stack.train(
        watch.until(samples_of(data, most, batch, generators(settings, number))),
        Training(settings.epochs, batch, settings.lr),
        classification_loss,
        own=True,
        move=watch,
        rate=lambda step: watch.share,
    )
    watch.restored(stack)
    return watch


def _stack(condition: str, dense: Sequence[nn.Module], settings: Settings) -> Stack:
    """A condition's networks from dense ones."""
    torch.manual_seed(settings.seed)  # fresh weights are drawn from PyTorch's own generator
    each = zip(dense, generators(settings, 2), strict=True)
    wanted = pairs(settings.depth, BOTH)
    models = [conditions.build(condition, model.cpu(), 2, draw, wanted) for model, draw in each]
    return Stack([model.to(settings.device) for model in models])


@lru_cache(maxsize=3)
def _first(condition: str, size: str, settings: Settings) -> tuple[Stack, Plateau]:
    """The first round of what begins with new weights: the networks, and what was seen."""
    dense: list[nn.Module] = seeded(lambda: model_of(settings, size), settings.trials, settings.seed)
    stack = _stack(condition, dense, settings)
    return stack, _round(stack, settings, 0)


def run_cell(cell: Cell, settings: Settings) -> list[dict[str, Any]]:
    """Trains a group of a cell; a row for each network."""
    settings = replace(settings, seed=settings.seed + cell.group)
    data = sequences(settings.data, settings.device)
    split = cell.condition in (PARTITION, RANKING)
    stack, watch = _first(CONTINUED if split else cell.condition, cell.size, settings)
    if cell.rounds == 2:
        stack = _stack(cell.condition, stack.models(), settings) if split else copy.deepcopy(stack)
        watch = _round(stack, settings, 1)
    loss, right = measured(stack, data.x_test, data.y_test)
    return [
        {
            **asdict(cell),
            "trial": settings.trials * cell.group + trial,
            "validation_bits": round(float(watch.least[trial]), 5),
            "best_step": int(watch.at[trial]),
            "steps": watch.every * len(watch.curve),
            "stopped": watch.done,
            "test_bits": round(loss[trial], 5),
            "test_accuracy": round(right[trial], 4),
            "nonzeros": stack.nonzeros[trial],
            "curve": [round(float(bits[trial]), 4) for bits in watch.curve],
        }
        for trial in range(settings.trials)
    ]


def beside(results: Results) -> pd.DataFrame:
    """The rows beside the dense model after two rounds, trial by trial; ``bits`` and ``points`` over it."""
    frame = results.frame
    return over(frame, frame[(frame["condition"] == CONTINUED) & (frame["rounds"] == 2)], ["size", "trial"])


def table(results: Results, shown: Sequence[Cell]) -> Table:
    """A row for each cell, beside the dense model of its size that trains for two rounds."""
    frame = beside(results)
    rows = []
    for cell in dict.fromkeys(replace(cell, group=0) for cell in shown):
        wanted = pd.Series({"size": cell.size, "condition": cell.condition, "rounds": cell.rounds})
        own = frame[(frame[list(wanted.index)] == wanted).all(axis=1)]
        if not len(own):
            continue
        control = cell.condition == CONTINUED and cell.rounds == 2
        steps = dict.fromkeys(f"{count}" for count in own["steps"])
        rows.append(
            (
                cell.size,
                _named(cell),
                f"{own['nonzeros'].iloc[0]}",
                f"{own['trial'].nunique()}",
                " and ".join(steps) + ("" if own["stopped"].all() else ", cut off"),
                interval(own["validation_bits"], 3),
                interval(own["test_bits"], 3),
                "-" if control else interval(own["bits"].dropna(), 4, "+"),
                interval(own["test_accuracy"], 2),
                "-" if control else interval(own["points"].dropna(), 2, "+"),
            )
        )
    s = results.settings
    about = f"width {s['width']}, {s['data']}, alpha = 2, MLPs and attention"
    title = f"Transformers trained until validation stops improving ({about}, test; ± is a 95 % interval)"
    columns = (
        "size",
        "model",
        "weights",
        "trials",
        "steps of the round",
        "validation bits",
        "test bits",
        "change (less is better)",
    )
    return Table(title, (*columns, "test accuracy %", "points"), rows)


def _named(cell: Cell) -> str:
    if cell.condition == CONTINUED:
        return "dense" if cell.rounds == 1 else CONTINUED
    name = NAMED[cell.condition]
    if not conditions.from_scratch(cell.condition):
        return name
    return f"{name}{', continued' if cell.rounds == 2 else ''}"


def curves(several: Sequence[Results]) -> Figure:
    """Validation loss by the steps of both rounds, of the first group: a row of panels for each data set."""
    made, axes = figure(8.4, 3.3 * len(several), len(SIZES), len(several))
    panels = [(results, size) for results in several for size in SIZES]
    for axis, (results, size) in zip(axes, panels, strict=True):
        frame = results.frame
        frame = frame[(frame["group"] == 0) & (frame["size"] == size)]
        highest = 0.0
        for (condition, rounds), own in frame.groupby(["condition", "rounds"], sort=False):
            begun = condition if conditions.from_scratch(str(condition)) else CONTINUED
            earlier = frame[(frame["condition"] == begun) & (frame["rounds"] == 1)]
            before = int(earlier["steps"].iloc[0]) if rounds == 2 else 0
            bits = [mean_and_half(look)[0] for look in zip(*own["curve"], strict=True)]
            steps = before + int(own["steps"].iloc[0]) / len(bits) * np.arange(1, len(bits) + 1)
            highest = max(highest, *bits[min(FALLEN, len(bits) - 1) if rounds == 1 else 0 :])
            label = _named(Cell(str(condition), int(rounds))) if rounds == 2 or condition == CONTINUED else None
            style = "--" if rounds == 1 else "-"
            axis.plot(steps, bits, style, color=COLOURS[str(condition)], linewidth=1.4, label=label)
        axis.set_ylim(top=1.02 * highest)
        axis.set(xlabel="steps", title=f"{results.settings['data']}, {size}")
    for axis in axes[:: len(SIZES)]:
        axis.set_ylabel("validation loss, bits")
    below(made, 3)
    return made


FILES = ("converged-text", "converged-fashion-mnist")
"""Committed rows."""

SWEEP: Sweep = Sweep(
    "converged",
    "Train small transformers until their validation loss stops falling, split or wide or neither.",
    "converged",
    Settings,
    cells,
    run_cell,
    table,
    [Cell(CONTINUED, 1), Cell(PARTITION), Cell(CONTINUED)],
    {"trials": 2, "epochs": 1, "tokens": 64, "data": "digits"},
    epochs_help="Epochs of training: hundreds of steps, which a round takes at most.",
    tables={name: lambda name=name: SWEEP.shown(name) for name in FILES},  # type: ignore[misc]
    figures={"converged": lambda: curves([committed(name) for name in FILES])},
)
STUDIES = (SWEEP,)
