"""Where are neurons scarce? The gain of a split over classes, inputs and neurons, at as many samples everywhere.

Classes are a seeded part of a data set's, inputs its first principal components.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fpe
from fpe.kernels.model import INFERENCE, Candidate, layer_candidates, seconds_of
from fpe.kernels.roofs import roof_named
from fpe.kernels.structures import RANDOM

from ..costs import memory
from ..costs.ledger import Kept
from ..costs.verdict import Layer
from ..results import Results
from ..table import Table
from . import conditions
from .conditions import CONTINUED, WIDE
from .drawing import figure
from .intervals import interval, mean_and_half
from .protocol import Data
from .study import committed
from .sweep import ImpossibleError, Sweep
from .trials import Settings, compact, generators, load_held_out, measured, train

RANKING, INPUT, PARTITION = "random magnitude", "random input", "random partition"
"""The paper's policy, the default for classifiers, and one for wide outputs: see :mod:`.conditions`."""


@dataclass(frozen=True)
class ScarceSettings(Settings):
    """Settings of this study: few samples, so smaller and larger steps.

    Attributes:
        samples: Training samples of every cell.
    """

    samples: int = 4000
    batch: int = 128
    lr: float = 3e-3


@dataclass(frozen=True)
class Cell:
    """One configuration (alpha = 2): the policy or none, and the sizes of the problem and of the network."""

    condition: str
    classes: int
    inputs: int
    neurons: int


def cells() -> list[Cell]:
    """A grid of sizes, and heads of a thousand classes; a data set leaves out what it lacks."""
    sizes = [(c, d, h) for d in (512, 32, 128) for c in (10, 100) for h in (4, 16)]
    sizes += [(100, 256, 4), (100, 256, 16), (100, 100, 4), (100, 100, 16), (1000, 384, 8), (1000, 384, 32)]
    return [Cell(name, *size) for size in sizes for name in (CONTINUED, RANKING, PARTITION, INPUT, WIDE)]


@lru_cache(maxsize=2)
def part_of(name: str, classes: int, inputs: int, samples: int, device: str) -> Data:
    """A part of a data set's classes, its first principal components, and so many of its training samples.

    Raises:
        ImpossibleError: The data set is smaller.
    """
    data = load_held_out(name, device)
    known = int(data.y.max()) + 1
    if classes > known or inputs > data.x.shape[1]:
        raise ImpossibleError(f"expected {classes} classes and {inputs} inputs, got {known} and {data.x.shape[1]}")
    chosen = torch.randperm(known, generator=torch.Generator().manual_seed(0))[:classes].to(device)
    number = torch.full((known,), -1, device=device).scatter_(0, chosen, torch.arange(classes, device=device))

    def among(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        here = number[y] >= 0
        return x[here], number[y[here]]

    pairs = (data.x, data.y), (data.x_test, data.y_test), (data.x_validation, data.y_validation)
    (x, y), test, validation = (among(*pair) for pair in pairs)
    x, y = x[:samples], y[:samples]
    middle = x.mean(0)
    axes = torch.linalg.svd(x - middle, full_matrices=False).Vh[:inputs]
    scale = ((x - middle) @ axes.T).std(0).pow(2).mean().sqrt()

    def projected(x: Tensor) -> Tensor:
        return (x - middle) @ axes.T / scale

    return Data(projected(x), y, projected(test[0]), test[1], projected(validation[0]), validation[1])


def run_cell(cell: Cell, settings: ScarceSettings) -> list[dict[str, Any]]:
    """Trains all trials of a cell; a row for each.

    Raises:
        ImpossibleError: The data set is smaller, or the policy cannot pay.
    """
    data = part_of(settings.data, cell.classes, cell.inputs, settings.samples, settings.device)
    before = 0 if conditions.from_scratch(cell.condition) else settings.epochs
    dense = compact(data, cell.neurons, before, settings)
    torch.manual_seed(settings.seed)  # new weights are drawn from PyTorch's own generator
    each = zip(dense, generators(settings, 2), strict=True)
    try:
        models = [conditions.build(cell.condition, model, 2, draw, conditions.pairs_of(model)) for model, draw in each]
    except ValueError as error:
        raise ImpossibleError(str(error)) from error
    stack = train(models, data, 2 * settings.epochs - before, settings, 1)
    return [{**asdict(cell), "trial": trial, **row} for trial, row in enumerate(measured(stack, data))]


def gains(results: Results) -> pd.DataFrame:
    """The splits beside the dense network of the same sizes, trial by trial; ``points`` over it."""
    frame, key = results.frame, ["classes", "inputs", "neurons", "trial"]
    dense = frame[frame["condition"] == CONTINUED].set_index(key)["test_accuracy"].rename("dense")
    joined = frame.join(dense, on=key)
    return joined.assign(points=joined["test_accuracy"] - joined["dense"])


def table(results: Results, shown: Sequence[Cell]) -> Table:
    """A row for each classes and inputs, by the classes to an input; points by width and policy."""
    frame = gains(results)
    widths = sorted(set(frame["neurons"]))
    rows = []
    for (classes, inputs), group in frame.groupby(["classes", "inputs"]):
        cells_of = [f"{classes}", f"{inputs}", f"{classes / inputs:.2g}"]
        for neurons in widths:
            own = group[group["neurons"] == neurons]
            by = dict(tuple(own.groupby("condition")))
            cells_of.append(interval(by[CONTINUED]["test_accuracy"]) if CONTINUED in by else "-")
            for name in (RANKING, INPUT, PARTITION, WIDE):
                cells_of.append(interval(by[name]["points"], 1, "+") if name in by else "-")
        rows.append(tuple(cells_of))
    s = results.settings
    columns = ["classes", "inputs", "classes/inputs"]
    for neurons in widths:
        columns += [f"{neurons}: dense %", "ranking", "input", "partition", "wide dense"]
    title = f"Points over the dense network by size ({s['data']}, {s['samples']} samples, {s['trials']} trials, test"
    return Table(f"{title}, nothing chosen on it; ± is a 95 % interval)", tuple(columns), rows)


def scarcity(results: Results) -> Figure:
    """Gain of the better policy by validation over the classes to a neuron, a line for each number of inputs."""
    made, (axis,) = figure(5.8, 3.6)
    frame = better(results)
    looks = (("#e8590c", 0.94), ("#2a7de1", 1.0), ("#2f9e44", 1.06))  # beside each other where they would overlap
    for (colour, beside), (inputs, rows) in zip(looks, frame.groupby("inputs"), strict=False):
        points = [
            (beside * classes / neurons, *mean_and_half(own["points"]))
            for (classes, neurons), own in rows.groupby(["classes", "neurons"])
        ]
        x, mean, half = zip(*sorted(points), strict=True)
        axis.errorbar(x, mean, half, fmt="o", color=colour, label=f"{inputs} inputs", capsize=2, markersize=5)
    axis.axhline(0, color="#212529", linewidth=1, linestyle="--")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="classes to a neuron", ylabel="points over the dense network")
    axis.legend(frameon=False, fontsize=8)
    return made


def better(results: Results) -> pd.DataFrame:
    """Of each size the rows of the policy whose mean validation accuracy is larger."""
    frame = gains(results)
    split = frame[frame["condition"].isin((RANKING, INPUT, PARTITION))]
    size = ["classes", "inputs", "neurons"]
    mean = split.groupby([*size, "condition"])["validation_accuracy"].mean().reset_index()
    best = mean.loc[mean.groupby(size)["validation_accuracy"].idxmax(), [*size, "condition"]]
    return split.merge(best, on=[*size, "condition"])


PRICED_ON, BATCHES = "a100", (64, 1024)
"""For which GPU and how many rows the cost model is asked."""


@lru_cache
def price(classes: int, inputs: int, neurons: int, condition: str, batch: int) -> tuple[int, float]:
    """What a pair costs more than the dense one: bytes with its index, in 16 bits; and predicted nanoseconds.

    The time is that of inference as ``fpe verdict`` predicts it, both layers together.

    Args:
        classes: Outputs.
        inputs: Of the first layer.
        neurons: Before the split.
        condition: :data:`INPUT`, or wide and dense.
        batch: Rows of activations.
    """
    pair = Kept((inputs, neurons, classes), 2, RANDOM, "input")
    parent, ours = pair.parent(), pair.expanded()

    def size(model: nn.Module) -> int:
        kept = memory.columns(model)
        return kept["parameter_bytes"] + kept["index_bytes"]

    def dense(outputs: int, inputs: int) -> float:
        return seconds_of(_passes(outputs, inputs, None, batch), "parent")

    before = dense(neurons, inputs) + dense(classes, neurons)
    second = dense(classes, 2 * neurons)
    if condition == WIDE:
        return size(fpe.to_dense(ours)) - size(parent), 1e9 * (dense(2 * neurons, inputs) + second - before)
    first = seconds_of(_passes(neurons, inputs, 1 - classes / inputs, batch))
    return size(ours) - size(parent), 1e9 * (first + second - before)


def _passes(outputs: int, inputs: int, kept: float | None, batch: int) -> list[list[Candidate]]:
    sizes = Layer(outputs, inputs, 2, kept=kept).sizes(RANDOM, batch)
    return layer_candidates(INFERENCE, sizes, roof_named(PRICED_ON))


def priced(results: Results) -> pd.DataFrame:
    """Rows where the input side paid and those of wide dense networks beside them, with what each costs more.

    Columns added: ``kib``; ``ns`` and the larger batch's ``ns_large``; points for one of the first two, ``per_kib`` and
    ``per_ns``.
    """
    frame = gains(results)
    size = ["classes", "inputs", "neurons"]
    sizes = frame[frame["condition"] == INPUT][size].drop_duplicates()
    frame = frame[frame["condition"].isin((INPUT, WIDE))].merge(sizes, on=size)
    few, many = (
        [price(*row, batch) for row in frame[[*size, "condition"]].itertuples(index=False)] for batch in BATCHES
    )
    frame = frame.assign(kib=[b / 1024 for b, _ in few], ns=[ns for _, ns in few], ns_large=[ns for _, ns in many])
    return frame.assign(per_kib=frame["points"] / frame["kib"], per_ns=frame["points"] / frame["ns"])


def price_table(results: Results) -> Table:
    """A row for each size: what a point costs in bytes and in time, expanded and wide dense."""
    rows = []
    for (classes, inputs, neurons), group in priced(results).groupby(["classes", "inputs", "neurons"]):
        row = [f"{classes / neurons:g}", f"{classes / inputs:.2g}", f"{neurons}"]
        for condition in (INPUT, WIDE):
            own = group[group["condition"] == condition]
            row += [interval(own["points"], 1, "+"), f"{own['kib'].iloc[0]:.2f}", interval(own["per_kib"], 1)]
            row += [f"{own['ns'].iloc[0]:.1f}, {own['ns_large'].iloc[0]:.0f}"]
        rows.append(tuple(row))
    s, roof = results.settings, roof_named(PRICED_ON)
    each = ("points", "KiB more", "points per KiB", f"ns more, {BATCHES[0]}, {BATCHES[1]} rows")
    columns = ("classes/neurons", "classes/inputs", "neurons", *each, *(f"wide: {name}" for name in each))
    title = f"What a point costs ({s['data']}, {s['trials']} trials, test; ± is a 95 % interval; 16 bits; "
    return Table(f"{title}times {roof.basis})", columns, rows)


def price_figure(results: Results) -> Figure:
    """Points, points per KiB and points per nanosecond over classes to a neuron and to an input."""
    made, axes = figure(8.4, 3.8, 3)
    frame = priced(results)
    shown = (
        ("points", "points", ".1f"),
        ("per_kib", "points per KiB more", ".2g"),
        ("per_ns", f"points per ns more, {BATCHES[0]} rows", ".2g"),
    )
    for axis, (column, title, form) in zip(axes, shown, strict=True):
        for (classes, inputs, neurons), group in frame.groupby(["classes", "inputs", "neurons"]):
            for condition, colour, above in ((INPUT, "#2a7de1", 4), (WIDE, "#8a8f98", -10)):
                mean = group[group["condition"] == condition][column].mean()
                at = (classes / neurons, classes / inputs)
                axis.annotate(
                    f"{mean:{form}}", at, (0, above), textcoords="offset points", ha="center", color=colour, fontsize=8
                )
            axis.plot(*at, "o", color="#212529", markersize=3)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        for one in (axis.xaxis, axis.yaxis):
            one.set_major_formatter(lambda value, _: str(Fraction(value)))
        axis.margins(0.16)
        axis.set(xlabel="classes to a neuron", title=title)
    axes[0].set_ylabel("classes to an input")
    axes[0].plot([], [], "o", color="#2a7de1", label="expanded")
    axes[0].plot([], [], "o", color="#8a8f98", label="wide dense")
    axes[0].legend(frameon=False, fontsize=8)
    return made


CIFAR100 = "scarce-cifar100_lite2_512"
WORDNET = "scarce-wordnet1000_minilm_384"
"""Committed rows."""

SWEEP: Sweep = Sweep(
    "scarce",
    "Map the gain of a split over classes, inputs and neurons at as many samples.",
    "scarce",
    ScarceSettings,
    cells,
    run_cell,
    table,
    [Cell(name, 10, 32, 4) for name in (CONTINUED, RANKING, PARTITION)],
    {"trials": 2, "epochs": 1, "data": "digits"},
    tables={
        "scarce": lambda: SWEEP.shown(CIFAR100),
        "scarce-heads": lambda: SWEEP.shown(WORDNET),
        "scarce-price": lambda: price_table(committed(CIFAR100)),
    },
    figures={
        "scarce": lambda: scarcity(committed(CIFAR100)),
        "scarce-price": lambda: price_figure(committed(CIFAR100)),
    },
)
STUDIES = (SWEEP,)
