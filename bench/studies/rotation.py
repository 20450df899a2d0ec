"""Where does a split that looks at the weights beat a random one? Gram against random by the inputs' rotation.

The Gram split keeps inputs together that the network uses together. That can help where an input means something by
itself. A rotation of the inputs changes nothing that a dense first layer could learn, and takes that meaning away.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

import fpe

from ..results import Results
from ..table import Table
from .boolean import Choices, make_data
from .conditions import CONTINUED
from .dnf import clause_of
from .drawing import figure, line
from .intervals import interval
from .protocol import Data
from .study import committed
from .sweep import ImpossibleError, Sweep
from .trials import VALIDATION, Settings, compact, generators, load_held_out, measured, train
from .vision import default_choices

SHARES = (0.0, 1.0, 0.25, 0.5, 0.1)
"""How far inputs are rotated on the way to a random rotation."""

RANDOM, GRAM, CLAUSE = "random", "gram", "clause"


@dataclass(frozen=True)
class Cell:
    """One configuration: what happens at the split (alpha = 2), and how far the inputs are rotated."""

    condition: str
    rotation: float = 0.0


def cells() -> list[Cell]:
    """Every rotation; the clause split, which knows the task, on inputs as they are."""
    every = [Cell(condition, share) for share in SHARES for condition in (CONTINUED, RANDOM, GRAM)]
    return [Cell(CLAUSE), *every]


@dataclass(frozen=True)
class RotationSettings(Settings):
    """Settings of this study; those that are 0 are chosen by the data, for the Boolean task as in its case study.

    Attributes:
        neurons: Width before the split.
    """

    trials: int = 10
    epochs: int = 0
    batch: int = 0
    lr: float = 0.0
    neurons: int = 0

    def __post_init__(self) -> None:
        if self.data == "boolean":
            task = Choices()
            given = {"epochs": 80, "batch": task.batch, "lr": task.lr, "neurons": task.neurons}
            given |= {"l1": task.l1, "l2": task.l2}
        else:
            usual = default_choices(self.data)
            given = {"epochs": usual.epochs, "batch": usual.batch, "lr": usual.lr, "neurons": usual.neurons}
        for name, value in given.items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)


def rotation(size: int, share: float, seed: int = 0) -> Tensor:
    """A rotation of so many dimensions that is a share of the way from none to a random one, ``[size, size]``.

    The random one is uniform among all rotations; its angles, between 0 and 180 degrees, are multiplied by the share.
    """
    random = np.random.default_rng(seed).standard_normal((size, size))
    q, r = np.linalg.qr(random)
    q *= np.sign(np.diag(r))
    if np.linalg.det(q) < 0:
        q[:, 0] *= -1
    values, vectors = np.linalg.eig(q)
    turned = vectors @ np.diag(np.exp(1j * share * np.angle(values))) @ np.linalg.inv(vectors)
    return torch.from_numpy(turned.real.astype(np.float32))


@lru_cache(maxsize=1)
def rotated(name: str, share: float, settings: RotationSettings) -> Data:
    """A data set with its inputs centred, scaled by one number and rotated; ``"boolean"`` is the paper's task."""
    if name == "boolean":
        drawn = make_data(Choices(), torch.Generator().manual_seed(settings.seed * 1009 + 500))
        data = drawn.held_out(VALIDATION).to(settings.device)
    else:
        data = load_held_out(name, settings.device)
    middle, scale = data.x.mean(0), data.x.std(0).pow(2).mean().sqrt()
    turn = rotation(data.x.shape[1], share, settings.seed).to(settings.device)

    def turned(x: Tensor) -> Tensor:
        return (x - middle) / scale @ turn.T

    targets = data.y, data.y_test, data.y_validation
    y, y_test, y_validation = (target.long() for target in targets)
    return Data(turned(data.x), y, turned(data.x_test), y_test, turned(data.x_validation), y_validation)


def run_cell(cell: Cell, settings: RotationSettings) -> list[dict[str, Any]]:
    """Trains all trials of a cell; a row for each.

    Raises:
        ImpossibleError: The clause split of data without clauses.
    """
    if cell.condition == CLAUSE and settings.data != "boolean":
        raise ImpossibleError("only the Boolean task has clauses")
    data = rotated(settings.data, cell.rotation, settings)
    dense = compact(data, settings.neurons, settings.epochs, settings)
    options: dict[str, Any] = {"resparsify": "magnitude"}
    if cell.condition == GRAM:
        options["split"] = "gram"
    elif cell.condition == CLAUSE:
        options.update(split="groups", groups=clause_of(Choices().clauses, Choices().literals))
    models = list(dense)
    if cell.condition != CONTINUED:
        each = zip(dense, generators(settings, 2), strict=True)
        models = [fpe.expand(model, 2, generator=draw, **options) for model, draw in each]
    stack = train(models, data, settings.epochs, settings, 1)
    return [{**asdict(cell), "trial": trial, **row} for trial, row in enumerate(measured(stack, data))]


def gains(results: Results) -> pd.DataFrame:
    """Every split beside the random one and the dense network of the same rotation, trial by trial.

    Columns added: ``over_random`` and ``over_dense``, in points of test accuracy.
    """
    frame, key = results.frame, ["rotation", "trial"]
    for name, condition in (("over_random", RANDOM), ("over_dense", CONTINUED)):
        own = frame[frame["condition"] == condition].set_index(key)["test_accuracy"].rename(name)
        frame = frame.join(own, on=key)
        frame[name] = frame["test_accuracy"] - frame[name]
    return frame


def table(results: Results, shown: Sequence[Cell]) -> Table:
    """A row for each rotation."""
    return beside([results])


def beside(several: Sequence[Results]) -> Table:
    """A row for each data set and rotation."""
    rows = []
    for results in several:
        frame = gains(results)
        for share, group in frame.groupby("rotation"):
            by = dict(tuple(group.groupby("condition")))
            rows.append(
                (
                    str(results.settings["data"]),
                    f"{results.settings['neurons']}",
                    f"{90 * share:.0f}",
                    interval(by[CONTINUED]["test_accuracy"]),
                    interval(by[RANDOM]["over_dense"], 1, "+"),
                    interval(by[GRAM]["over_dense"], 1, "+"),
                    interval(by[GRAM]["over_random"], 1, "+"),
                    interval(by[CLAUSE]["over_random"], 1, "+") if CLAUSE in by else "-",
                )
            )
    counts = sorted({int(results.settings["trials"]) for results in several})
    title = f"Gram against random by rotation, {' or '.join(map(str, counts))} trials, nothing chosen on the test"
    columns = ("data", "neurons", "mean angle, degrees", "dense %", "random, points", "gram, points")
    return Table(f"{title}; ± is a 95 % interval", (*columns, "gram - random", "clause - random"), rows)


def angles(several: Sequence[Results]) -> Figure:
    """Gain of the Gram split over the random one by the mean angle of rotation, a line for each data set."""
    made, (axis,) = figure(5.6, 3.6)
    for results, colour in zip(several, COLOURS_OF[: len(several)], strict=True):
        frame = gains(results)
        gram = frame[frame["condition"] == GRAM]
        label = f"{results.settings['data']}, {results.settings['neurons']} neurons"
        line(axis, gram.assign(angle=90 * gram["rotation"]), "angle", colour, label, "over_random")
    axis.axhline(0, color="#212529", linewidth=1, linestyle="--")
    axis.set(xlabel="mean angle of the inputs' rotation, degrees", ylabel="points, Gram over random split")
    axis.legend(frameon=False, fontsize=8)
    return made


FILES = (
    "rotation-boolean",
    "rotation-digits",
    "rotation-breast-cancer",
    "rotation-wordnet100_minilm_384",
    "rotation-fashion-mnist",
)
"""Committed rows."""

COLOURS_OF = ("#e8590c", "#2a7de1", "#2f9e44", "#9c36b5", "#8a8f98")

SWEEP: Sweep = Sweep(
    "rotation",
    "Rotate the inputs step by step: where does the Gram split beat a random one? (--data boolean: the paper's task)",
    "rotation",
    RotationSettings,
    cells,
    run_cell,
    table,
    [Cell(condition, 0.5) for condition in (CONTINUED, RANDOM, GRAM)],
    {"trials": 2, "epochs": 1, "batch": 128, "data": "digits"},
    tables={"rotation": lambda: beside([committed(name) for name in FILES])},
    figures={"rotation": lambda: angles([committed(name) for name in FILES])},
)
STUDIES = (SWEEP,)
