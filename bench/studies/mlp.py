"""A setting of a multi-layer perceptron on real data: dense epochs, the split, more epochs; all trials at once."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn

import fpe

from . import conditions, sweep
from .protocol import Data, Training
from .stack import Stack, classification_loss, epochs_of, seeded, train_all
from .sweep import ImpossibleError
from .vision import default_choices, load


@dataclass(frozen=True)
class Settings(sweep.Settings):
    """Settings of perceptrons, as many epochs as published.

    Attributes:
        data: Name of a data set or path of an ``.npz``; by default what is installed.
        batch: Samples to a step.
        lr: Adam's step size.
    """

    data: str = field(default_factory=lambda: default_choices().data)
    batch: int = 512
    lr: float = 1e-3


@dataclass(frozen=True)
class TenTrials(Settings):
    """Settings where trials differ much from one another, or conditions by little."""

    trials: int = 10


@dataclass(frozen=True)
class Cell:
    """One configuration of a study.

    Attributes:
        condition: What happens at the split, see :mod:`.conditions`.
        neurons: Width of the hidden layers before the split.
        alpha: Children per neuron.
        split: Share of all epochs that come before the split.
        layers: Linear layers; with more than two, a LayerNorm follows each hidden one.
        around: Width of further hidden layers in front of and behind the expanded pair; 0 for none.
        rewire: Regrowth of a rewiring that runs after the split, ``"random"`` or ``"gradient"``; empty for none.
    """

    condition: str
    neurons: int
    alpha: int = 2
    split: float = 0.5
    layers: int = 2
    around: int = 0
    rewire: str = ""


def run_cell(cell: Cell, settings: Settings) -> list[dict[str, Any]]:
    """Trains all trials of a cell; a row for each.

    Trials differ in their initial weights and masks and see the samples in the same order.

    Raises:
        ImpossibleError: The data's sizes do not admit the cell's masks. Nothing has been trained then.
    """
    data = load_once(settings.data, settings.device)
    check_possible(cell, data)
    total = 2 * settings.epochs
    before = round(total * cell.split)
    dense = trained(settings, cell.neurons, cell.layers, cell.around, before)
    pairs = pairs_to_expand(dense[0], cell)
    generators = [torch.Generator().manual_seed(settings.seed * 1009 + trial) for trial in range(settings.trials)]
    torch.manual_seed(settings.seed)  # fresh weights are drawn from PyTorch's own generator
    built = [conditions.build(cell.condition, m, cell.alpha, g, pairs) for m, g in zip(dense, generators, strict=True)]
    models: list[nn.Module] = [model.to(settings.device) for model in built]
    weights = [fpe.nonzeros(model) for model in models]
    epochs = 0 if cell.condition == conditions.DENSE else total - before
    if conditions.from_scratch(cell.condition):
        epochs = total
    order = torch.Generator().manual_seed(settings.seed + 1)
    if cell.rewire:
        for model, generator in zip(models, generators, strict=True):
            order.manual_seed(settings.seed + 1)
            batches = epochs_of(data, epochs, settings.batch, order)
            train_rewired(model, batches, settings.lr, cell.rewire, generator)
    stack = Stack(models)
    if not cell.rewire:
        training = Training(epochs, settings.batch, settings.lr)
        stack.train(epochs_of(data, epochs, settings.batch, order), training, classification_loss)
    accuracy = stack.accuracy(data.x_test, data.y_test)
    rows = []
    for trial, model in enumerate(stack.models()):
        first, second = (conditions.linear_of(model, name).weight.detach() for name in pairs[0])
        rows.append(
            {
                **asdict(cell),
                "trial": trial,
                "test_accuracy": round(accuracy[trial], 4),
                "cosine_similarity": float(fpe.metrics.mean_cosine_similarity(first)),
                "feature_capacity": float(fpe.metrics.feature_capacity(first).sum()),
                "neurons_after": first.shape[0],
                "nonzeros": weights[trial],
                "first_nonzeros": int((first != 0).sum()),
                "second_nonzeros": int((second != 0).sum()),
            }
        )
    return rows


def check_possible(cell: Cell, data: Data) -> None:
    """Raises unless the cell's masks fit networks of the data's sizes: before one is trained for minutes.

    Raises:
        ImpossibleError: They do not.
    """
    model = perceptron(data.x.shape[1], int(data.y.max()) + 1, cell.neurons, cell.layers, cell.around)
    try:
        conditions.build(cell.condition, model, cell.alpha, torch.Generator(), pairs_to_expand(model, cell))
    except ValueError as error:
        raise ImpossibleError(str(error)) from error


def train_rewired(
    model: nn.Module,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    lr: float,
    regrow: str,
    generator: torch.Generator,
) -> None:
    """Trains one expanded network, layer by layer as a user would, while :class:`fpe.Rewiring` moves its edges."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    rewiring = fpe.Rewiring(model, optimizer, regrow=regrow, generator=generator)  # type: ignore[arg-type]
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        rewiring.step()


def perceptron(inputs: int, outputs: int, neurons: int, layers: int, around: int) -> nn.Sequential:
    """A dense network: ReLU after every hidden layer, and a LayerNorm where there are more than one of a width."""
    hidden = [around, neurons, around] if around else [neurons] * (layers - 1)
    widths = [inputs, *hidden, outputs]
    modules: list[nn.Module] = []
    for i in range(1, len(widths)):
        modules.append(nn.Linear(widths[i - 1], widths[i]))
        if i < len(widths) - 1:
            modules += [nn.LayerNorm(widths[i]), nn.ReLU()] if layers > 2 else [nn.ReLU()]
    return nn.Sequential(*modules)


def pairs_to_expand(model: nn.Module, cell: Cell) -> conditions.Pairs:
    """All pairs of a network, or the one in the middle."""
    if not cell.around:
        return conditions.pairs_of(model)
    names = [name for name, module in model.named_children() if isinstance(module, nn.Linear)]
    return [(names[1], names[2])]


@lru_cache(maxsize=2)
def load_once(data: str, device: str = "cpu") -> Data:
    """A data set, kept in memory."""
    return load(data).to(device)


@lru_cache(maxsize=16)
def trained(settings: Settings, neurons: int, layers: int, around: int, epochs: int) -> list[nn.Module]:
    """The dense networks that cells of one shape begin from, on the CPU."""
    data = load_once(settings.data, settings.device)
    inputs, classes = data.x.shape[1], int(data.y.max()) + 1
    models = seeded(lambda: perceptron(inputs, classes, neurons, layers, around), settings.trials, settings.seed)
    batches = epochs_of(data, epochs, settings.batch, torch.Generator().manual_seed(settings.seed))
    training = Training(epochs, settings.batch, settings.lr)
    return [model.cpu() for model in train_all(models, batches, training, settings.device).models()]
