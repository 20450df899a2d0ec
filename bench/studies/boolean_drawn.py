"""What is shown of the Boolean case study: its command, its tables beside the paper's figures, and its figures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure

from ..cli.options import common, epochs_option, output_option, trials_option
from ..cli.output import GOES_ON, NOTHING_WRITTEN, finish, stopping
from ..results import Results
from ..table import Table
from . import boolean, published
from .boolean import CONDITIONS, BooleanStudy
from .conditions import CONTINUED
from .drawing import COLOURS, figure, save, strip
from .intervals import interval
from .protocol import described
from .study import OwnCommand, committed


@click.command("boolean")
@trials_option(boolean.Choices.trials)
@epochs_option(boolean.Choices.epochs)
@click.option("--quick", is_flag=True, help="A few steps of two small trials: to see that it runs.")
@click.option("--sensitivity", is_flag=True, help="Move each unpublished choice in turn instead (hours).")
@output_option()
@common
def boolean_command(
    trials: int | None,
    epochs: int | None,
    quick: bool,
    sensitivity: bool,
    output: Path,
    seed: int,
    device: str,
    form: str | None,
) -> None:
    """Learn a DNF of 8 clauses with 8 neurons: dense, random split, clause split.

    The published accuracies are 78.7 %, 88.7 % and 99.4 %.
    """
    given: dict[str, Any] = {
        name: value for name, value in (("trials", trials), ("epochs", epochs)) if value is not None
    }
    choices = replace(boolean.QUICK if quick else boolean.Choices(), **given)
    end = "-quick" if quick else ""
    if sensitivity:
        path = output / f"boolean-sensitivity{end}.jsonl"
        with stopping(GOES_ON):
            try:
                results = boolean.run_sensitivity(choices, path, seed, device, quiet=bool(form))
            except ValueError as error:
                raise click.ClickException(str(error)) from error
        finish(results, path, sensitivity_table(results), form)
        return
    with stopping(NOTHING_WRITTEN):
        done = boolean.run(choices, seed, device, quiet=bool(form))
    done.curves.write(output / f"boolean-curves{end}.jsonl")
    for name, made in figures(done).items():
        save(made, output / f"boolean-{name}{end}.svg")
    finish(done.results, output / f"boolean{end}.jsonl", table(done.results), form)


def table(results: Results) -> Table:
    """The case study beside the paper's figures."""
    rows = []
    for condition, group in results.frame.groupby("condition", sort=False):
        paper = published.BOOLEAN.get(str(condition))
        rows.append(
            (
                str(condition),
                "-" if paper is None else f"{paper:.1f}",
                interval(group["test_accuracy"]),
                "-" if str(condition) in ("dense", CONTINUED) else interval(_gain(results, str(condition)), 1, "+"),
                f"{group['clause_capacity'].mean():.3f}",
                *described(group),
            )
        )
    settings = results.settings
    title = f"Boolean case study, {settings['epochs']} + {settings['epochs']} epochs, {settings['trials']} trials"
    columns = ("condition", "paper %", "test %", "points", "capacity/clause", "cosine", "neurons", "non-zeros")
    return Table(f"{title}, test; ± is a 95 % interval", columns, rows)


def _gain(results: Results, condition: str) -> pd.Series:
    """Points of test accuracy over the network that trained on unchanged, trial by trial."""
    by = results.frame.pivot_table("test_accuracy", "trial", "condition")
    return by[condition] - by[CONTINUED]


def sensitivity_table(results: Results) -> Table:
    """Test accuracy as each unpublished choice moves."""
    rows = []
    for change, group in results.frame.groupby("change", sort=False):
        by = group.pivot_table("test_accuracy", "trial", "condition")
        gained = (interval(by[c] - by[CONTINUED], 1, "+") for c in ("random", "clause"))
        rows.append((str(change), *(interval(by[c]) for c in CONDITIONS), *gained))
    columns = ("change", *(f"{condition} %" for condition in CONDITIONS), "random, points", "clause, points")
    title = f"Boolean case study: one choice moved at a time ({results.settings['trials']} trials, test"
    return Table(f"{title}; ± is a 95 % interval; points over dense-continued)", columns, rows)


NEAREST = 5
"""Networks that are shown beside the paper's."""


def nearest(case: Results, sensitivity: Results) -> Table:
    """The single networks of all settings whose three accuracies are nearest to the published, by the worst of them."""
    frame = pd.concat([case.frame.assign(change="the case study"), sensitivity.frame])
    by = frame.pivot_table("test_accuracy", ["change", "trial"], "condition")
    paper = pd.Series(published.BOOLEAN)
    worst = (by[paper.index] - paper).abs().max(axis=1).sort_values()
    rows = [("paper", "-", *(f"{value:.1f}" for value in paper), "-")]
    for change, trial in worst.index[:NEAREST]:
        own = by.loc[(change, trial)]
        rows.append((change, f"{trial}", *(f"{own[name]:.1f}" for name in paper.index), f"{worst[change, trial]:.1f}"))
    columns = ("change", "trial", *(f"{name} %" for name in paper.index), "farthest, points")
    return Table(f"The nearest of {len(by)} single networks, test", columns, rows)


def figures(study: BooleanStudy) -> dict[str, Figure]:
    """All figures of the case study, by name."""
    return {
        "curves": curves(study.curves),
        "accuracy": accuracy(study.results),
        "gram": gram_matrices(study),
        "weights": weight_maps(study),
    }


def curves(results: Results) -> Figure:
    """Test accuracy by epoch: mean and range over trials, the split marked."""
    made, (axis,) = figure(5.6, 3.6)
    split, ends = results.settings["epochs"], []
    for condition, rows in results.frame.groupby("condition", sort=False):
        by_epoch = rows.groupby("epoch")["test_accuracy"]
        middle = by_epoch.mean()
        colour = COLOURS[str(condition)]
        axis.fill_between(middle.index, by_epoch.min(), by_epoch.max(), color=colour, alpha=0.15, linewidth=0)
        axis.plot(middle.index, middle, color=colour, linewidth=2)
        ends.append((middle.iloc[-1], middle.index[-1], str(condition), colour))
    gap = 0.06 * (axis.get_ylim()[1] - axis.get_ylim()[0])
    below: dict[int, float] = {}
    for height, epoch, condition, colour in sorted(ends):  # names of lines that end together stand one above the other
        place = max(height, below.get(epoch, height - gap) + gap)
        below[epoch] = place
        axis.annotate(
            condition,
            (epoch, place),
            (6, 0) if epoch > split else (-6, 9),  # what goes on after the split has its line there
            textcoords="offset points",
            ha="left" if epoch > split else "right",
            color=colour,
            va="center",
            fontweight="bold",
        )
    axis.axvline(split, color="#adb5bd", linestyle=":", linewidth=1.2)
    axis.annotate("split", (split, axis.get_ylim()[0]), (4, 4), textcoords="offset points", color="#868e96")
    trials = results.frame["trial"].nunique()
    about = f"epoch (line: mean, band: all of {trials} trials)"
    axis.set(xlabel=about, ylabel="test accuracy, %", title="The same weights, more neurons")
    axis.set_xticks(np.linspace(0, 2 * split, 5))
    axis.margins(x=0)
    return made


def accuracy(results: Results) -> Figure:
    """Every trial's accuracy beside the published mean."""
    made, (axis,) = figure(5.2, 3.2)
    frame = results.frame
    for x, condition in enumerate(CONDITIONS):
        values = frame[frame["condition"] == condition]["test_accuracy"]
        strip(axis, x, values, COLOURS[condition])
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
    made, axes = figure(2.8 * len(shown), 3.1, len(shown))
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
    made.colorbar(image, ax=list(axes), shrink=0.8, label="product of two columns")
    return made


def weight_maps(study: BooleanStudy) -> Figure:
    """First-layer weights, neuron by input: grey is no edge."""
    shown = [name for name in ("dense-continued", "random", "clause") if name in study.weights]
    made, axes = figure(2.8 * len(shown), 2.4, len(shown))
    scale = max(float(np.quantile(np.abs(study.weights[name]), 0.995)) for name in shown) or 1.0
    literals = study.results.settings["literals"]
    colours = colormaps["RdBu_r"].with_extremes(bad="#868e96")
    for axis, name in zip(axes, shown, strict=True):
        weights = np.where(study.weights[name] == 0, np.nan, study.weights[name])
        image = axis.imshow(weights, cmap=colours, vmin=-scale, vmax=scale, aspect="auto", interpolation="nearest")
        for edge in range(literals, weights.shape[1], literals):
            axis.axvline(edge - 0.5, color="#dee2e6", linewidth=0.5)
        axis.set(title=name, xticks=[], yticks=[], xlabel="input, clause by clause", ylabel="neuron")
    made.colorbar(image, ax=list(axes), shrink=0.8, label="weight")
    return made


STUDIES = (
    OwnCommand(
        "boolean",
        boolean_command,
        tables={
            "boolean": lambda: table(committed("boolean")),
            "boolean-sensitivity": lambda: sensitivity_table(committed("boolean-sensitivity")),
            "boolean-nearest": lambda: nearest(committed("boolean"), committed("boolean-sensitivity")),
        },
        figures={
            "boolean-curves": lambda: curves(committed("boolean-curves")),
            "boolean-accuracy": lambda: accuracy(committed("boolean")),
        },
    ),
)
