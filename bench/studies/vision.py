"""The paper's protocol on real data (section 3): one hidden layer, dense epochs, the split, as many more.

The control trains the dense network for all epochs. Relative improvement is
``(accuracy - accuracy of the control) / accuracy of the control``, averaged over trials.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fpe

from ..results import Results
from .data import FASHION_MNIST, load_digits, load_fashion_mnist, load_features
from .protocol import Data, Training, describe, fit, run_trials

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
        data: ``"fashion-mnist"``, ``"digits"`` or the path of an ``.npz`` of features.
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
    return Choices(data, epochs=100, batch=128, lr=1e-2) if data == "digits" else Choices(data)


def load(name: str) -> Data:
    """Loads a data set by name or path.

    Raises:
        FileNotFoundError: There is no such data.
        ValueError: The file holds something else.
    """
    if name == "fashion-mnist":
        return load_fashion_mnist()
    return load_digits() if name == "digits" else load_features(Path(name))


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
