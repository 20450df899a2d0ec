"""FPE beside what else could be done with as many weights: sparse training, pruning, low rank.

Every network ends with the weights of a dense one of ``neurons``; *wide dense*, the ceiling, has ``width`` times as
many. Those that begin from new weights take all their epochs from the start. FPE, and the dense network that trains on,
begin from a compact network that is trained already; their epochs are those after it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fpe
from fpe.layers import ExpandedLinear
from fpe.rewiring import next_mask

from ..results import Results
from ..table import Table
from .conditions import CONTINUED, WIDE
from .drawing import doubling, figure, line
from .intervals import interval
from .mlp import perceptron
from .stack import Move, Stack, seeded
from .study import committed
from .sweep import ImpossibleError, Sweep
from .trials import Settings, compact, generators, load_held_out, measured, sizes, train

EVERY = 100
"""Steps between moves of the masks, as RigL's."""

FRACTION = 0.3
"""Share of the edges that move at first; it falls along a cosine."""

MOVING = 0.75
"""Share of the steps after which masks stay, in RigL and in gradual pruning."""

TOTAL = 50
"""Epochs in all at which sizes are compared, those of the compact network included."""

FPE, FPE_MOVING = "FPE", "FPE, moving masks"
STATIC, STATIC_EVEN = "static sparse", "static sparse, even"
SET, RIGL, RIGL_EVEN = "SET", "RigL", "RigL, even"
GRADUAL, ONE_SHOT = "gradual pruning", "one-shot pruning"
LOW_RANK = "low rank"
AFTER_COMPACT = (CONTINUED, FPE, FPE_MOVING)
"""What begins from a trained compact network."""

PAIRED = ((RIGL, RIGL_EVEN), (STATIC, STATIC_EVEN), (RIGL, SET), (ONE_SHOT, RIGL), (WIDE, RIGL))
"""Methods that are compared with one another, trial by trial."""

NAMES = (*AFTER_COMPACT, RIGL, GRADUAL, STATIC, WIDE, ONE_SHOT, LOW_RANK, SET, RIGL_EVEN, STATIC_EVEN)


@dataclass(frozen=True)
class Cell:
    """One configuration.

    Attributes:
        condition: One of the names above.
        neurons: Hidden neurons of the dense network whose weights are the budget.
        width: Times as many hidden neurons.
        epochs: Epochs of training: after the compact network, or in all.
    """

    condition: str
    neurons: int = 8
    width: int = 2
    epochs: int = 50


def cells() -> list[Cell]:
    """All methods at 8 neurons and twice the width, the most telling ones by epochs; all of them at other sizes."""
    half = dict.fromkeys(AFTER_COMPACT, 25)
    made = [Cell(name, epochs=half.get(name, TOTAL)) for name in NAMES]
    several = (CONTINUED, FPE, FPE_MOVING, STATIC, RIGL, GRADUAL, WIDE)
    made += [Cell(name, epochs=epochs) for epochs in (25, 5) for name in several]
    made += [Cell(name, epochs=50) for name in AFTER_COMPACT]
    made += [Cell(name, epochs=100) for name in (FPE, RIGL, CONTINUED, FPE_MOVING, WIDE)]
    for neurons, width in ((16, 2), (8, 4), (4, 2), (32, 2), (4, 4)):
        made += [Cell(name, neurons, width, half.get(name, TOTAL)) for name in NAMES]
    return made


def run_cell(cell: Cell, settings: Settings) -> list[dict[str, Any]]:
    """Trains all trials of a cell; a row for each.

    Raises:
        ImpossibleError: The budget does not admit such networks.
    """
    data = load_held_out(settings.data, settings.device)
    steps = cell.epochs * math.ceil(len(data.x) / settings.batch)
    models, move = _begin(cell, settings, steps)
    stack = train(models, data, cell.epochs, settings, 1, move)
    after = cell.condition in AFTER_COMPACT
    return [
        {
            **asdict(cell),
            "before": settings.epochs if after else 0,
            "trial": trial,
            **row,
        }
        for trial, row in enumerate(measured(stack, data))
    ]


def _begin(cell: Cell, settings: Settings, steps: int) -> tuple[list[nn.Module], Move | None]:
    """The networks that training begins with, and what moves their masks."""
    data = load_held_out(settings.data, settings.device)
    inputs, classes = sizes(data)
    budget = cell.neurons * (inputs + classes)
    draws = generators(settings, 2)
    if cell.condition in AFTER_COMPACT:
        dense = compact(data, cell.neurons, settings.epochs, settings)
        if cell.condition == CONTINUED:
            return list(dense), None
        wide = [
            fpe.expand(m, cell.width, resparsify="magnitude", generator=g) for m, g in zip(dense, draws, strict=True)
        ]
        return wide, moving(wide, steps, draws, "random") if cell.condition == FPE_MOVING else None
    hidden = cell.width * cell.neurons
    if cell.condition == LOW_RANK:
        rank = (budget - classes * hidden) // (inputs + hidden)
        if rank < 1:
            raise ImpossibleError(f"a dense second layer takes {classes * hidden} of {budget} weights")
        return seeded(lambda: low_rank(inputs, rank, hidden, classes), settings.trials, settings.seed), None
    if cell.condition in (WIDE, GRADUAL, ONE_SHOT):
        models = seeded(lambda: perceptron(inputs, classes, hidden, 2, 0), settings.trials, settings.seed)
        move = {WIDE: None, GRADUAL: gradual(budget, steps), ONE_SHOT: one_shot(budget, steps // 2)}[cell.condition]
        return models, move
    masked: Literal["first", "both"] = "both" if cell.condition in (STATIC_EVEN, RIGL_EVEN) else "first"
    models = []
    for trial, draw in enumerate(draws):
        torch.manual_seed(settings.seed * 1009 + trial)
        try:
            models.append(
                fpe.sparse(perceptron(inputs, classes, cell.neurons, 2, 0), cell.width, masked, generator=draw)
            )
        except ValueError as error:
            raise ImpossibleError(str(error)) from error
    regrow = {SET: "random", RIGL: "gradient", RIGL_EVEN: "gradient"}.get(cell.condition)
    return models, moving(models, steps, draws, regrow) if regrow else None


def low_rank(inputs: int, rank: int, hidden: int, outputs: int) -> nn.Sequential:
    """A perceptron whose first layer is a product of two."""
    first = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, hidden)
    return nn.Sequential(*first, nn.ReLU(), nn.Linear(hidden, outputs))


def moving(models: Sequence[nn.Module], steps: int, draws: Sequence[torch.Generator], regrow: str) -> Move:
    """What :class:`fpe.Rewiring` does, for a stack: RigL's schedule, ended after :data:`MOVING` of the steps.

    Args:
        models: The networks; their layers say which masks are possible.
        steps: Steps of the training.
        draws: Source of random regrowth, one for each network.
        regrow: ``"random"`` or ``"gradient"``.
    """
    layers = {f"{n}.weight": m for n, m in models[0].named_modules() if isinstance(m, ExpandedLinear)}
    end = round(MOVING * steps)

    def move(step: int, stack: Stack, gradients: dict[str, Tensor]) -> dict[str, Tensor] | None:
        if step % EVERY or step >= end:
            return None
        share = FRACTION * (1 + math.cos(math.pi * step / end)) / 2
        moved = {}
        for name, layer in layers.items():
            kept, size = stack.masks[name], stack.parameters[name].detach().abs()
            growth = gradients[name].abs()
            if regrow == "random":
                growth = torch.stack([torch.rand(kept.shape[1:], generator=draw) for draw in draws]).to(kept.device)
            each = zip(size, kept, growth, strict=True)
            moved[name] = torch.stack([next_mask(layer, s, k, g, share) for s, k, g in each])
        return moved

    return move


def gradual(budget: int, steps: int) -> Move:
    """Magnitude pruning on the cubic schedule of Zhu and Gupta (2017), down to so many weights."""
    end = max(1, round(MOVING * steps))

    def move(step: int, stack: Stack, gradients: dict[str, Tensor]) -> dict[str, Tensor] | None:
        if step > end or (step % EVERY and step != end):
            return None
        whole = sum(weight[0].numel() for weight in stack.weights.values())
        return largest(stack, budget + round((whole - budget) * (1 - step / end) ** 3))

    return move


def one_shot(budget: int, when: int) -> Move:
    """Magnitude pruning to so many weights, once."""

    def move(step: int, stack: Stack, gradients: dict[str, Tensor]) -> dict[str, Tensor] | None:
        return largest(stack, budget) if step == when else None

    return move


def largest(stack: Stack, count: int) -> dict[str, Tensor]:
    """Masks of each network's largest weights, in one ranking over its matrices."""
    weights = stack.weights
    size = torch.cat([weight.detach().abs().flatten(1) for weight in weights.values()], 1)
    kept = torch.zeros_like(size, dtype=torch.bool).scatter_(1, size.topk(count, 1).indices, True)
    parts = kept.split([weight[0].numel() for weight in weights.values()], 1)
    return {name: part.view_as(weight) for (name, weight), part in zip(weights.items(), parts, strict=True)}


def over_fpe(results: Results) -> pd.DataFrame:
    """The rows beside FPE's of the same size and the same epochs, trial by trial; ``points`` over it.

    Column added: ``total``, the epochs of the compact network included. Networks are compared at equal ``total``.
    """
    frame = results.frame
    frame = frame.assign(total=frame["before"] + frame["epochs"])
    key = ["neurons", "width", "total", "trial"]
    reached = frame[frame["condition"] == FPE].set_index(key)["test_accuracy"].rename("fpe")
    joined = frame.join(reached, on=key)
    return joined.assign(points=joined["test_accuracy"] - joined["fpe"])


def table(results: Results, shown: Sequence[Cell]) -> Table:
    """A row for each cell."""
    frame = over_fpe(results)
    rows = []
    for cell in shown:
        own = frame[(frame[list(asdict(cell))] == pd.Series(asdict(cell))).all(axis=1)]
        if len(own):
            rows.append(
                (
                    cell.condition,
                    f"{cell.neurons}",
                    f"{cell.width}",
                    f"{own['before'].iloc[0]} + {cell.epochs}",
                    f"{own['nonzeros'].iloc[0]}",
                    interval(own["validation_accuracy"]),
                    interval(own["test_accuracy"]),
                )
            )
    columns = ("method", "neurons", "width", "epochs", "non-zeros", "validation %", "test %")
    return Table(f"Networks of as many weights ({_about(results)})", columns, rows)


def _about(results: Results) -> str:
    return f"{results.settings['data']}, {_trials(results.frame)}, nothing chosen on the test; ± is a 95 % interval"


def _trials(frame: pd.DataFrame) -> str:
    """The fewest and the most trials of a cell."""
    counts = frame.groupby(["condition", "neurons", "width", "epochs"])["trial"].nunique()
    return f"{' to '.join(f'{count}' for count in sorted({counts.min(), counts.max()}))} trials"


def by_size(results: Results) -> Table:
    """All methods at :data:`TOTAL` epochs: accuracy at the first size, points over FPE at every one."""
    frame = over_fpe(results)
    frame = frame[frame["total"] == TOTAL]
    sizes_of = sorted({(int(n), int(w)) for n, w in zip(frame["neurons"], frame["width"], strict=True)})
    methods = frame.groupby(["neurons", "width"])["condition"].nunique()
    most = max(sizes_of, key=lambda size: (methods[size], size == (Cell.neurons, Cell.width)))
    rows = []
    for method in NAMES:
        own = frame[frame["condition"] == method]
        main = own[(own["neurons"] == most[0]) & (own["width"] == most[1])]
        if not len(main):
            continue
        line = [method, f"{main['nonzeros'].iloc[0]}", interval(main["validation_accuracy"])]
        line.append(interval(main["test_accuracy"]))
        for neurons, width in sizes_of:
            at = own[(own["neurons"] == neurons) & (own["width"] == width)]
            line.append("0" if method == FPE and len(at) else interval(at["points"].dropna(), 1, "+"))
        rows.append(tuple(line))
    there = f"{most[0]} neurons, width {most[1]}"
    columns = ("method", f"weights at {there}", "validation %", "test %", *(f"{n} x {w}" for n, w in sizes_of))
    return Table(f"Points over FPE at neurons x width, {TOTAL} epochs in all ({_about(results)})", columns, rows)


def paired(several: Sequence[Results]) -> Table:
    """Differences between methods other than FPE at :data:`TOTAL` epochs, trial by trial."""
    frames = {str(results.settings["data"]): over_fpe(results) for results in several}
    frames = {data: frame[frame["total"] == TOTAL] for data, frame in frames.items()}
    sizes_of = sorted({size for frame in frames.values() for size in frame.groupby(["neurons", "width"]).groups})
    rows = []
    for data, frame in frames.items():
        reached = frame.pivot_table("test_accuracy", ["neurons", "width", "trial"], "condition")
        for ours, theirs in PAIRED:
            points = (reached[ours] - reached[theirs]).dropna()
            at = (points[[size == key[:2] for key in points.index]] for size in sizes_of)
            rows.append((data, f"{ours} - {theirs}", *(interval(own, 1, "+") for own in at)))
    columns = ("data", "comparison", *(f"{n} x {w}" for n, w in sizes_of))
    title = f"Differences in points at neurons x width, trial by trial, {TOTAL} epochs in all"
    return Table(
        f"{title} ({_trials(pd.concat(frames.values()))}, nothing chosen on the test; ± is a 95 % interval)",
        columns,
        rows,
    )


def by_epochs(results: Results) -> Table:
    """Test accuracy by the epochs that are left to train, where a compact network stands trained and where not."""
    frame = results.frame
    frame = frame[(frame["neurons"] == 8) & (frame["width"] == 2)]
    counts = sorted(set(frame["epochs"]))
    rows = []
    for method in NAMES:
        own = frame[frame["condition"] == method]
        if own["epochs"].nunique() > 1:
            at = (interval(own[own["epochs"] == count]["test_accuracy"]) for count in counts)
            rows.append((method, f"{own['before'].iloc[0]}", *at))
    columns = ("method", "epochs before", *(f"after {count} more" for count in counts))
    return Table(f"8 neurons, width 2: test % by epochs of training ({_about(results)})", columns, rows)


LOOKS = {
    CONTINUED: ("#4a4f57", "dense, trained on"),
    FPE: ("#2a7de1", FPE),
    FPE_MOVING: ("#0c8599", FPE_MOVING),
    STATIC: ("#2f9e44", STATIC),
    RIGL: ("#e8590c", RIGL),
    GRADUAL: ("#9c36b5", GRADUAL),
    WIDE: ("#8a8f98", "wide dense: twice the weights"),
}


def epochs_figure(results: Results) -> Figure:
    """Test accuracy by epochs: those after a compact network that is there anyway, and all of them."""
    made, axes = figure(8.4, 3.8, 2)
    frame = results.frame
    frame = frame[(frame["neurons"] == 8) & (frame["width"] == 2)]
    frame = frame.assign(total=frame["before"] + frame["epochs"])
    for axis, by in zip(axes, ("epochs", "total"), strict=True):
        for method, (colour, label) in LOOKS.items():
            style = "-" if method in AFTER_COMPACT else "--"
            line(axis, frame[frame["condition"] == method], by, colour, label, "test_accuracy", style)
        doubling(axis)
    axes[0].set(xlabel="epochs, the compact network's not counted", ylabel="test accuracy, %")
    axes[0].set_title("A compact network is there")
    axes[1].set(xlabel="epochs in all", title="From the start")
    axes[0].legend(frameon=False, fontsize=8)
    return made


CIFAR100 = "rivals-cifar100quarter_lite2_512"
TEXT = "rivals-wordnet100_minilm_384"
"""Committed rows; a file's name says its data."""

SWEEP: Sweep = Sweep(
    "rivals",
    "Compare FPE with sparse training, pruning and low rank at as many weights.",
    "rivals",
    Settings,
    cells,
    run_cell,
    table,
    [Cell(name, 4, epochs=1) for name in (CONTINUED, FPE, FPE_MOVING, STATIC_EVEN, RIGL_EVEN, GRADUAL, LOW_RANK)],
    {"trials": 2, "epochs": 1, "batch": 16, "data": "digits"},
    tables={
        "rivals-cifar100": lambda: by_size(committed(CIFAR100)),
        "rivals-cifar100-epochs": lambda: by_epochs(committed(CIFAR100)),
        "rivals-text": lambda: by_size(committed(TEXT)),
        "rivals-paired": lambda: paired([committed(TEXT), committed(CIFAR100)]),
        "rivals-text-epochs": lambda: by_epochs(committed(TEXT)),
    },
    figures={
        "rivals-epochs": lambda: epochs_figure(committed(TEXT)),
        "rivals-epochs-cifar100": lambda: epochs_figure(committed(CIFAR100)),
    },
)
STUDIES = (SWEEP,)
