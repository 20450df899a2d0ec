"""Pairs whose output is as wide as their input: adapters inside a frozen network, and sparse autoencoders.

An adapter adds ``up(relu(down(x)))`` to a hidden layer of a frozen network (Houlsby et al. 2019). The network was
trained on the first half of the classes; adapter and a new head learn the second half. A sparse autoencoder writes
features as a sum of few directions; its code is penalised by its sum, each neuron by the length of its direction.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import linear, relu

import fpe

from ..results import Results
from ..table import Table
from . import conditions
from .conditions import CONTINUED, WIDE
from .drawing import COLOURS, figure
from .intervals import interval
from .mlp import perceptron
from .protocol import Data, Training
from .scarce import part_of
from .stack import Stack, own_epochs_of, seeded
from .study import committed
from .sweep import Sweep
from .trials import Settings, generators, load_held_out, train

ADAPTER, AUTOENCODER = "adapter", "autoencoder"
PARTITION, RANKING, FRESH = "random partition", "random magnitude", "fresh random partition"

HIDDEN = 128
"""Width of the frozen network's hidden layers."""

DIRECTIONS = 64
"""Inputs and outputs of the autoencoder: first principal components."""

SPARSITIES = (0.3, 1.0, 3.0)
"""Strengths of the penalty on the code, from most neurons active to few; all of them are reported."""

SHOWN = {
    PARTITION: "partition",
    RANKING: "ranking",
    FRESH: "partition, new weights",
    WIDE: "wide dense, new weights",
    CONTINUED: CONTINUED,
}


@dataclass(frozen=True)
class BottleneckSettings(Settings):
    """Settings of this study."""

    batch: int = 128
    lr: float = 3e-3


@dataclass(frozen=True)
class Cell:
    """One configuration (alpha = 2): what happens at the split, the task, and the neurons before it.

    Attributes:
        sparsity: Strength of the penalty on an autoencoder's code.
    """

    condition: str
    task: str
    neurons: int
    sparsity: float = 0.0


def cells() -> list[Cell]:
    """Adapters of few neurons, and autoencoders with fewer neurons than directions and with more."""
    sizes = [(ADAPTER, 8, 0.0), (ADAPTER, 64, 0.0)]
    sizes += [(AUTOENCODER, neurons, sparsity) for neurons in (32, 256) for sparsity in SPARSITIES]
    return [Cell(name, *size) for size in sizes for name in (CONTINUED, PARTITION, RANKING, FRESH, WIDE)]


class Adapted(nn.Module):
    """A frozen network of two hidden layers with an adapter behind the first one and a new head.

    Args:
        frozen: Linear layers and activations, as :func:`.mlp.perceptron` makes them.
        neurons: Of the adapter.
        classes: Of the head.
    """

    def __init__(self, frozen: nn.Sequential, neurons: int, classes: int) -> None:
        super().__init__()
        for name, layer in (("first", frozen[0]), ("second", frozen[2])):
            assert isinstance(layer, nn.Linear)
            self.register_buffer(f"{name}_weight", layer.weight.detach().clone())
            self.register_buffer(f"{name}_bias", layer.bias.detach().clone())
        self.down, self.up = nn.Linear(HIDDEN, neurons), nn.Linear(neurons, HIDDEN)
        self.head = nn.Linear(HIDDEN, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = relu(linear(x, self.first_weight, self.first_bias))  # type: ignore[arg-type]
        x = x + self.up(relu(self.down(x)))
        return self.head(relu(linear(x, self.second_weight, self.second_bias)))  # type: ignore[arg-type]


class Autoencoder(nn.Module):
    """Writes its input as a sum of directions, each of which counts in the code by its length.

    So nothing is won by a small code of long directions.
    """

    def __init__(self, inputs: int, neurons: int) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(inputs, neurons), nn.Linear(neurons, inputs)

    def forward(self, x: Tensor) -> Tensor:
        """What was read, then the code by the lengths of its directions: ``[samples, inputs + neurons]``."""
        code = relu(self.encode(x))
        return torch.cat([self.decode(code), code * self.decode.weight.norm(dim=0)], -1)


PAIRS: dict[str, conditions.Pairs] = {ADAPTER: [("down", "up")], AUTOENCODER: [("encode", "decode")]}


def run_cell(cell: Cell, settings: BottleneckSettings) -> list[dict[str, Any]]:
    """Trains all trials of a cell; a row for each."""
    data = data_of(cell.task, settings)
    before = 0 if conditions.from_scratch(cell.condition) else settings.epochs
    models = _dense(replace(cell, condition=CONTINUED), before, settings)
    torch.manual_seed(settings.seed)  # new weights are drawn from PyTorch's own generator
    each = zip(models, generators(settings, 2), strict=True)
    built = [conditions.build(cell.condition, model, 2, draw, PAIRS[cell.task]) for model, draw in each]
    weights = [fpe.nonzeros(model) for model in built]
    stack = _trained(cell, built, 2 * settings.epochs - before, settings, 1)
    scores = [score(cell.task, stack, x, y) for x, y in _aside(data)]
    return [
        {
            **asdict(cell),
            "trial": trial,
            "validation_score": round(scores[0][0][trial], 4),
            "test_score": round(scores[1][0][trial], 4),
            "active": round(scores[1][1][trial], 3),
            "nonzeros": weights[trial],
        }
        for trial in range(settings.trials)
    ]


def _aside(data: Data) -> tuple[tuple[Tensor, Tensor], ...]:
    return (data.x_validation, data.y_validation), (data.x_test, data.y_test)


@lru_cache(maxsize=4)
def data_of(task: str, settings: Settings) -> Data:
    """The classes that an adapter learns, numbered from 0; or of all samples the first principal components."""
    if task == ADAPTER:
        return halves(settings)[1]
    whole = load_held_out(settings.data, settings.device)
    inputs = min(DIRECTIONS, whole.x.shape[1])
    data = part_of(settings.data, int(whole.y.max()) + 1, inputs, len(whole.x), settings.device)
    return Data(data.x, data.x, data.x_test, data.x_test, data.x_validation, data.x_validation)


def halves(settings: Settings) -> tuple[Data, Data]:
    """The samples of the first half of the classes and those of the second, each numbered from 0."""
    data = load_held_out(settings.data, settings.device)
    middle = (int(data.y.max()) + 1) // 2

    def part(second: bool) -> Data:
        pairs = (data.x, data.y), (data.x_test, data.y_test), (data.x_validation, data.y_validation)
        own = ((x[(y >= middle) == second], y[(y >= middle) == second] - second * middle) for x, y in pairs)
        return Data(*(tensor for pair in own for tensor in pair))

    return part(False), part(True)


@lru_cache(maxsize=1)
def frozen(settings: Settings) -> list[nn.Sequential]:
    """Networks that were trained on the first half of the classes, one for each trial."""
    base = halves(settings)[0]
    classes = int(base.y.max()) + 1

    def made() -> nn.Module:
        head = perceptron(HIDDEN, classes, HIDDEN, 2, 0)
        return nn.Sequential(nn.Linear(base.x.shape[1], HIDDEN), nn.ReLU(), *head)

    models = train(seeded(made, settings.trials, settings.seed), base, settings.epochs, settings, 3).models()
    return [model.cpu() for model in models]  # type: ignore[misc]


@lru_cache(maxsize=2)
def _dense(cell: Cell, epochs: int, settings: Settings) -> list[nn.Module]:
    """Dense models after so many epochs, on the CPU."""
    data = data_of(cell.task, settings)
    if cell.task == AUTOENCODER:
        models = seeded(lambda: Autoencoder(data.x.shape[1], cell.neurons), settings.trials, settings.seed)
    else:
        below, classes = iter(frozen(settings)), int(data.y.max()) + 1
        models = seeded(lambda: Adapted(next(below), cell.neurons, classes), settings.trials, settings.seed)
    return [model.cpu() for model in _trained(cell, models, epochs, settings, 0).models()] if epochs else models


def _trained(cell: Cell, models: Sequence[nn.Module], epochs: int, settings: Settings, stage: int) -> Stack:
    data = data_of(cell.task, settings)
    if cell.task == ADAPTER:
        return train(models, data, epochs, settings, stage)
    stack = Stack([model.to(settings.device) for model in models])
    batches = own_epochs_of(data, epochs, settings.batch, generators(settings, stage))
    loss = partial(sparse_loss, sparsity=cell.sparsity)
    stack.train(batches, Training(epochs, settings.batch, settings.lr), loss, own=True)
    return stack


def sparse_loss(outputs: Tensor, x: Tensor, sparsity: float) -> Tensor:
    """Squared error and ``sparsity`` times the sum of the code: averaged over samples, summed over networks."""
    read, code = outputs.split([x.shape[-1], outputs.shape[-1] - x.shape[-1]], -1)
    return ((read - x).square().sum(-1) + sparsity * code.sum(-1)).mean(1).sum()


@torch.no_grad()
def score(task: str, stack: Stack, x: Tensor, y: Tensor) -> tuple[list[float], list[float]]:
    """Accuracy or the variance that is explained, in percent; and how many neurons of a code are active."""
    if task == ADAPTER:
        return stack.accuracy(x, y), [0.0] * len(stack)
    read, code = stack(x).split([x.shape[1], stack(x[:1]).shape[-1] - x.shape[1]], -1)
    left = (read - x).square().sum((1, 2)) / (x - x.mean(0)).square().sum()
    return (100 * (1 - left)).tolist(), (code > 0).sum(-1).float().mean(1).tolist()


def gains(results: Results) -> pd.DataFrame:
    """The rows beside the dense model of the same size, trial by trial; ``points`` over it."""
    frame, key = results.frame, ["task", "neurons", "sparsity", "trial"]
    dense = frame[frame["condition"] == CONTINUED].set_index(key)["test_score"].rename("dense")
    joined = frame.join(dense, on=key)
    return joined.assign(points=joined["test_score"] - joined["dense"])


def table(results: Results, shown: Sequence[Cell]) -> Table:
    """A row for each cell."""
    frame = gains(results)
    rows = []
    for cell in shown:
        own = frame[(frame[list(asdict(cell))] == pd.Series(asdict(cell))).all(axis=1)]
        if len(own):
            rows.append(
                (
                    cell.task,
                    f"{cell.neurons}",
                    f"{cell.sparsity:g}" if cell.sparsity else "-",
                    SHOWN[cell.condition],
                    f"{own['nonzeros'].iloc[0]}",
                    interval(own["validation_score"]),
                    interval(own["test_score"]),
                    "-" if cell.condition == CONTINUED else interval(own["points"], 2, "+"),
                    "-" if cell.task == ADAPTER else interval(own["active"]),
                )
            )
    s = results.settings
    about = f"{s['data']}, alpha = 2, {s['epochs']} + {s['epochs']} epochs, {s['trials']} trials"
    columns = ("task", "neurons", "sparsity", "policy", "weights", "validation %", "test %", "points", "active neurons")
    title = f"Adapters: accuracy; autoencoders: variance explained ({about}, test, nothing chosen on it"
    return Table(f"{title}; ± is a 95 % interval)", columns, rows)


def frontier(results: Results) -> Figure:
    """Variance that an autoencoder explains by the neurons that are active, a line over the penalties' strengths."""
    frame = results.frame
    frame = frame[frame["task"] == AUTOENCODER]
    sizes = sorted(frame["neurons"].unique())
    made, axes = figure(4.2 * len(sizes), 3.6, len(sizes))
    for axis, neurons in zip(axes, sizes, strict=True):
        for condition in (CONTINUED, PARTITION, RANKING, FRESH, WIDE):
            own = frame[(frame["neurons"] == neurons) & (frame["condition"] == condition)]
            means = own.groupby("sparsity")[["active", "test_score"]].mean()
            axis.plot(
                means["active"],
                means["test_score"],
                "o-",
                color=COLOURS[condition],
                linewidth=1.6,
                label=SHOWN[condition],
            )
        axis.set(xlabel="active neurons", title=f"{neurons} neurons, {DIRECTIONS} inputs")
    axes[0].set_ylabel("variance explained, %")
    axes[0].legend(frameon=False, fontsize=8)
    return made


TEXT = "bottleneck-wordnet100_minilm_384"
"""Committed rows."""

SWEEP: Sweep = Sweep(
    "bottleneck",
    "Expand adapters inside a frozen network, and sparse autoencoders.",
    "bottleneck",
    BottleneckSettings,
    cells,
    run_cell,
    table,
    [Cell(name, *size) for size in ((ADAPTER, 4), (AUTOENCODER, 4, 1.0)) for name in (CONTINUED, PARTITION, WIDE)],
    {"trials": 2, "epochs": 1, "data": "digits"},
    tables={"bottleneck": lambda: SWEEP.shown(TEXT)},
    figures={"bottleneck": lambda: frontier(committed(TEXT))},
)
STUDIES = (SWEEP,)
