"""The paper's case study (section 2.2.1): 8 clauses, 8 neurons, a random and a clause-aware split.

A dense network is trained, split in two ways, and trained on; a copy that trains on without a split is the
control. The paper's accuracies are dense 78.7 %, random split 88.7 %, clause split 99.4 %.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fpe

from ..results import Results
from .dnf import clause_of, make_dnf
from .protocol import Data, Training, accuracy, describe, first_layer, fit, run_trials, trials_as_they_end

CONDITIONS = ("dense", "dense-continued", "random", "clause")


@dataclass(frozen=True)
class Choices:
    """Everything the study chose, published or not.

    Published (section A.2.1): clauses, literals, neurons, alpha, batch, epochs, trials, Adam,
    an L1 penalty on the first layer and an L2 penalty on everything. The rest is not published: it was declared
    before the committed run, and ``fpe study boolean --sensitivity`` shows how the result moves with it.

    Attributes:
        clauses: Clauses of the formula (published: 8).
        literals: Literals to a clause (published: 4).
        neurons: Hidden neurons before the split (published: 8).
        alpha: Children per neuron (published: 2).
        trials: Networks trained (published: 5).
        epochs: Epochs before and again after the split (published: 1000).
        batch: Samples to a step (published: 500).
        samples: Training samples (not published).
        test_samples: Test samples (not published).
        active: Bounds on the number of active bits (not published).
        true_range: Values of a true bit (published as near 1).
        false_range: Values of a false bit (published as near 0).
        lr: Adam's step size (not published).
        l1: Strength of the L1 penalty (not published).
        l2: Strength of the L2 penalty (not published).
    """

    clauses: int = 8
    literals: int = 4
    neurons: int = 8
    alpha: int = 2
    trials: int = 5
    epochs: int = 1000
    batch: int = 500
    samples: int = 20_000
    test_samples: int = 10_000
    active: tuple[int, int] = (4, 16)
    true_range: tuple[float, float] = (0.9, 1.1)
    false_range: tuple[float, float] = (0.0, 0.1)
    lr: float = 3e-2
    l1: float = 1e-4
    l2: float = 1e-3

    @property
    def training(self) -> Training:
        """The part that the training loop reads."""
        return Training(self.epochs, self.batch, self.lr, self.l1, self.l2)


QUICK = replace(Choices(), trials=2, epochs=3, samples=2_000, test_samples=2_000)
"""Enough to see that everything runs, not to see an effect."""


def make_data(choices: Choices, generator: torch.Generator) -> Data:
    """Training and test samples of one trial."""
    x, y = make_dnf(
        choices.samples + choices.test_samples,
        choices.clauses,
        choices.literals,
        choices.active,
        choices.true_range,
        choices.false_range,
        generator,
    )
    return Data(x[: choices.samples], y[: choices.samples], x[choices.samples :], y[choices.samples :])


def run_trial(choices: Choices, trial: int, seed: int, device: str = "cpu") -> dict[str, Any]:
    """Trains one dense network and its continuations.

    Returns:
        ``rows``: the facts of each condition; ``curves``: test accuracy by epoch; ``weights``: each condition's
        first layer ``[neurons, features]``.
    """
    generator = torch.Generator().manual_seed(seed * 1009 + trial)
    data = make_data(choices, generator).to(device)
    torch.manual_seed(seed * 1009 + trial)
    features = choices.clauses * choices.literals
    dense = nn.Sequential(nn.Linear(features, choices.neurons), nn.ReLU(), nn.Linear(choices.neurons, 1)).to(device)
    curves: list[dict[str, Any]] = []
    every = max(1, choices.epochs // 50)

    def watch(condition: str, offset: int) -> Any:
        def note(epoch: int, model: nn.Module) -> None:
            if epoch % every == 0:
                test = accuracy(model, data.x_test, data.y_test)
                curves.append({"trial": trial, "condition": condition, "epoch": epoch + offset, "test_accuracy": test})

        return note

    fit(dense, data, choices.training, choices.epochs, generator, watch("dense", 0))
    groups = clause_of(choices.clauses, choices.literals)
    papers: dict[str, Any] = {"alpha": choices.alpha, "resparsify": "magnitude", "generator": generator}
    models = {
        "dense": dense,
        "dense-continued": fpe.expansion.replace_modules(dense, {}),
        "random": fpe.expand(dense, **papers),
        "clause": fpe.expand(dense, split="groups", groups=groups, **papers),
    }
    rows = []
    for condition in CONDITIONS:
        model = models[condition]
        if condition != "dense":
            fit(model, data, choices.training, choices.epochs, generator, watch(condition, choices.epochs))
        rows.append({"trial": trial, "condition": condition, **describe(model, data), **_inside(model, data, groups)})
    weights = {name: first_layer(model).cpu().numpy() for name, model in models.items()}
    return {"rows": rows, "curves": curves, "weights": weights}


@torch.no_grad()
def _inside(model: nn.Sequential, data: Data, groups: torch.Tensor) -> dict[str, Any]:
    """What explains an accuracy: capacity of a clause, neurons that never fire, output weights that were kept."""
    capacity = fpe.metrics.feature_capacity(first_layer(model), groups)
    fires = (model[:2](data.x_test) > 0).any(0)
    return {
        "clause_capacity": float(capacity.mean()),
        "dead_neurons": int((~fires).sum()),
        "output_nonzeros": fpe.nonzeros(model[2]),
    }


@dataclass(frozen=True)
class BooleanStudy:
    """Outcome of the case study.

    Attributes:
        results: A row for each trial and condition.
        curves: A row for each trial, condition and noted epoch.
        weights: First layers of trial 0 by condition, ``[neurons, features]``.
    """

    results: Results
    curves: Results
    weights: dict[str, np.ndarray]


def run(choices: Choices, seed: int = 0, device: str = "cpu", quiet: bool = False) -> BooleanStudy:
    """Runs all trials of the case study."""
    jobs = [{"choices": choices, "trial": t, "seed": seed, "device": device} for t in range(choices.trials)]
    trials = run_trials(run_trial, jobs, "Boolean study", quiet)
    rows = [row for trial in trials for row in trial["rows"]]
    curves = [row for trial in trials for row in trial["curves"]]
    settings = {**asdict(choices), "seed": seed}
    return BooleanStudy(
        Results("boolean", settings, rows), Results("boolean-curves", settings, curves), trials[0]["weights"]
    )


SENSITIVITY: tuple[dict[str, Any], ...] = (
    {},
    {"lr": 3e-3},
    {"lr": 1e-2},
    {"lr": 1e-1},
    {"l1": 0.0},
    {"l1": 1e-3},
    {"l2": 0.0},
    {"l2": 1e-4},
    {"samples": 2_000},
    {"samples": 5_000},
    {"samples": 50_000},
    {"active": (4, 12)},
    {"active": (4, 20)},
    {"active": (8, 16)},
    {"active": (8, 16), "lr": 1e-2},
    {"true_range": (1.0, 1.0), "false_range": (0.0, 0.0)},
    {"true_range": (0.8, 1.2), "false_range": (0.0, 0.2)},
)
"""What is changed of the declared choices: one unpublished thing at a time, and a pair that comes nearer the paper."""

SENSITIVITY_EPOCHS = 80
"""Epochs before and after the split there; with other sample counts, as many steps."""


def run_sensitivity(choices: Choices, path: Path, seed: int = 0, device: str = "cpu", quiet: bool = False) -> Results:
    """Moves one unpublished choice at a time, at :data:`SENSITIVITY_EPOCHS`, and reports every trial.

    Args:
        choices: What is not moved.
        path: The file; each trial's rows are added as it ends, and a run that was cut goes on.
        seed: Seed of all randomness.
        device: Where networks are trained.
        quiet: No progress bar.

    Raises:
        ValueError: The file is of other choices.
    """
    jobs, moved = [], []
    for change in SENSITIVITY:
        setting = replace(choices, **change)
        epochs = round(SENSITIVITY_EPOCHS * choices.samples / setting.samples)
        for trial in range(choices.trials):
            jobs.append({"choices": replace(setting, epochs=epochs), "trial": trial, "seed": seed, "device": device})
            moved.append({"change": ", ".join(f"{k} = {v}" for k, v in change.items()) or "none", "trial": trial})
    results = Results.resume(path, "boolean-sensitivity", {**asdict(choices), "seed": seed})

    def rows_of(move: dict[str, Any]) -> list[dict[str, Any]]:
        return [row for row in results.rows if move.items() <= row.items()]

    todo = [i for i, move in enumerate(moved) if len(rows_of(move)) < len(CONDITIONS)]
    ended = trials_as_they_end(run_trial, [jobs[i] for i in todo], "sensitivity", quiet, len(jobs) - len(todo))
    for number, trial in ended:
        results.append(path, *({**moved[todo[number]], **row} for row in trial["rows"]))
    results.rows[:] = [row for move in moved for row in rows_of(move)]  # in the order of the plan, whoever was first
    results.write(path)
    return results
