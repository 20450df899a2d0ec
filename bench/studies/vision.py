"""The paper's protocol on real data (section 3): one hidden layer, dense epochs, the split, as many more.

The control trains the dense network for all epochs. Relative improvement is
``(accuracy - accuracy of the control) / accuracy of the control``, averaged over trials.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from matplotlib.figure import Figure
from torch import nn

import fpe

from ..cli.options import alpha_option, common, data_option, epochs_option, output_option, trials_option
from ..cli.output import NOTHING_WRITTEN, finish, stopping
from ..results import Results
from ..table import Table
from .data import FASHION_MNIST, load_breast_cancer, load_digits, load_fashion_mnist, load_features
from .drawing import COLOURS, figure, strip
from .intervals import interval
from .protocol import Data, Training, describe, described, fit, run_trials
from .recipes import missing
from .study import OwnCommand

CONDITIONS: dict[str, dict[str, Any]] = {
    "dense-continued": {},
    "random": {"resparsify": "magnitude"},
    "gram": {"split": "gram", "resparsify": "magnitude"},
    "block 4x16": {"structure": "block", "block": (4, 16), "resparsify": "input"},
}
"""Ways to expand, by name: options of :func:`fpe.expand`; the control has none and stays dense."""


@dataclass(frozen=True)
class Choices:
    """Settings of the study.

    Attributes:
        data: ``"fashion-mnist"``, ``"digits"``, ``"breast-cancer"`` or the path of an ``.npz`` of features.
        neurons: Hidden neurons before the split.
        alpha: Children per neuron.
        trials: Networks trained.
        epochs: Epochs before and again after the split (published: 25).
        batch: Samples to a step.
        lr: Adam's step size.
    """

    data: str = "fashion-mnist"
    neurons: int = 4
    alpha: int = 2
    trials: int = 3
    epochs: int = 25
    batch: int = 512
    lr: float = 1e-3


def default_choices(data: str | None = None) -> Choices:
    """Settings for a data set; without one, Fashion-MNIST where it is installed, else scikit-learn's digits."""
    data = data or ("fashion-mnist" if FASHION_MNIST.is_dir() else "digits")
    small = data in ("digits", "breast-cancer")
    return Choices(data, epochs=100, batch=128, lr=1e-2) if small else Choices(data)


def load(name: str) -> Data:
    """Loads a data set by name or path.

    Raises:
        FileNotFoundError: There is no such data.
        ValueError: The file holds something else.
    """
    if name == "fashion-mnist":
        if not FASHION_MNIST.is_dir():
            raise FileNotFoundError(missing(name))
        return load_fashion_mnist()
    if name == "breast-cancer":
        return load_breast_cancer()
    if name == "digits":
        return load_digits()
    if not Path(name).is_file():
        raise FileNotFoundError(missing(name))
    return load_features(Path(name))


def run_trial(choices: Choices, trial: int, seed: int, device: str = "cpu") -> list[dict[str, Any]]:
    """Trains one dense network and its continuations; a row for each condition."""
    data = load(choices.data).to(device)
    generator = torch.Generator().manual_seed(seed * 1009 + trial)
    torch.manual_seed(seed * 1009 + trial)
    features, classes = data.x.shape[1], int(data.y.max()) + 1
    dense = nn.Sequential(nn.Linear(features, choices.neurons), nn.ReLU(), nn.Linear(choices.neurons, classes))
    training = Training(choices.epochs, choices.batch, choices.lr)
    fit(dense.to(device), data, training, choices.epochs, generator)
    rows = [{"trial": trial, "condition": "dense", **describe(dense, data)}]
    for condition, options in CONDITIONS.items():
        model = fpe.expansion.replace_modules(dense, {})
        if options:
            model = fpe.expand(dense, choices.alpha, generator=generator, **options)
        fit(model, data, training, choices.epochs, generator)
        rows.append({"trial": trial, "condition": condition, **describe(model, data)})
    return rows


def run(choices: Choices, seed: int = 0, device: str = "cpu", quiet: bool = False) -> Results:
    """Runs all trials."""
    load(choices.data)
    jobs = [{"choices": choices, "trial": t, "seed": seed, "device": device} for t in range(choices.trials)]
    trials = run_trials(run_trial, jobs, f"{Path(choices.data).stem} study", quiet)
    return Results("vision", {**asdict(choices), "seed": seed}, [row for rows in trials for row in rows])


def table(results: Results) -> Table:
    """Accuracy on real data, points over the dense network that trained as long, and relative improvement."""
    frame = results.frame
    control = frame[frame["condition"] == "dense-continued"].set_index("trial")["test_accuracy"]
    rows = []
    for condition, group in frame.groupby("condition", sort=False):
        accuracy = group.set_index("trial")["test_accuracy"]
        gain = accuracy - control
        over = [interval(gain, 1, "+"), interval(gain / control * 100, 1, "+")]
        rows.append(
            (
                str(condition),
                interval(accuracy),
                *(["-", "-"] if str(condition).startswith("dense") else over),
                *described(group),
            )
        )
    settings = results.settings
    title = (
        f"{settings['data']}, {settings['neurons']} neurons, alpha = {settings['alpha']}, {settings['epochs']} + "
        f"{settings['epochs']} epochs, {settings['trials']} trials; ± is a 95 % interval"
    )
    columns = ("condition", "test %", "points", "improvement over dense %", "cosine", "neurons", "non-zeros")
    return Table(title, columns, rows)


def accuracy_figure(results: Results) -> Figure:
    """Every trial's accuracy on real data."""
    frame = results.frame
    conditions = list(dict.fromkeys(frame["condition"]))
    made, (axis,) = figure(6.4, 3.2)
    control = frame[frame["condition"] == "dense-continued"]["test_accuracy"].mean()
    axis.axhline(control, color="#adb5bd", linestyle=":", linewidth=1.2)
    for x, condition in enumerate(conditions):
        strip(axis, x, frame[frame["condition"] == condition]["test_accuracy"], COLOURS[condition])
    axis.set_xticks(range(len(conditions)), conditions)
    axis.margins(y=0.12)
    axis.set(ylabel="test accuracy, %", title=f"Real data: {Path(results.settings['data']).stem}")
    return made


@click.command("vision")
@data_option
@click.option("--neurons", type=click.IntRange(1), help="Hidden neurons before the split.")
@alpha_option(default=None)
@trials_option(Choices.trials)
@epochs_option()
@output_option()
@common
def vision_command(output: Path, seed: int, device: str, form: str | None, **given: Any) -> None:
    """Classify real data with one hidden layer, dense and expanded."""
    chosen = {name: value for name, value in given.items() if value is not None}
    choices = replace(default_choices(chosen.get("data")), **chosen)
    try:
        with stopping(NOTHING_WRITTEN):
            results = run(choices, seed, device, quiet=bool(form))
    except FileNotFoundError as error:
        raise click.BadParameter(str(error), param_hint="'--data'") from error
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    finish(results, output / "vision.jsonl", table(results), form)


STUDIES = (OwnCommand("vision", vision_command),)
