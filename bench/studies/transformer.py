"""Small transformers, of text and of images: does FPE carry over to their MLPs and to the values of their attention?

Two pairs of linear layers in a block can be expanded. ``fc1`` and ``fc2`` are its MLP. ``value`` and ``out``, the
values and the output projection of its attention, are a pair as well: attention mixes places and treats the channels of
a head alike. So the channels of the values are neurons without an activation.

The text is the Python language reference, as every Python ships it for ``help()`` (``pydoc_data.topics``), character by
character. An image is sixteen patches. Models are split early and chosen by their validation loss.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fpe

from ..results import Results
from ..table import Table
from . import conditions, sweep
from .conditions import CONTINUED, WIDE
from .drawing import COLOURS, figure
from .intervals import interval, mean_and_half
from .protocol import Data, Training
from .stack import Batches, Stack, classification_loss, seeded
from .study import committed
from .sweep import Sweep
from .trials import generators, load_held_out

TEXT = "text"
"""The data set that is not one of :mod:`.vision`'s."""

CONTEXT = 32
"""Characters that the model of text sees."""

CHARACTERS = 128
"""ASCII; others are read as a question mark."""

PATCHES = 4
"""Patches to a side of an image."""

SAMPLES, LOOKED_AT = 10_000, 2000
"""Images to train on and for validation, at most."""

HEADS = 2
SPLIT = 0.2
"""Share of the steps before the split."""

CHECKS = 10
"""Evenly spaced looks at the validation loss; the test is of the best."""

STEPS = 100
"""Steps that this study calls an epoch."""

SIZES = {"narrow": (16, 8), "usual": (128, 32)}
"""Neurons of an MLP, and channels of the values over all heads, by name; the stream has 32."""

MLP, ATTENTION, BOTH = "mlp", "attention", "both"
PARTITION, RANKING, FRESH = "random partition", "random magnitude", "fresh random partition"
"""Policies, named as in :mod:`.conditions`; the last begins with new weights."""


@dataclass(frozen=True)
class Settings(sweep.Settings):
    """Settings of this study, whose epochs are hundreds of steps; those that are 0 are chosen by the data.

    Attributes:
        data: ``"text"``, or images by the name of a data set.
        epochs: Before and after the split together.
        tokens: Characters or patches to a step.
        lr: Adam's step size; it falls to nothing over the second half of the steps.
        width: Width of the residual stream.
        depth: Blocks.
    """

    data: str = TEXT
    epochs: int = 0
    tokens: int = 512
    lr: float = 0.0
    width: int = 32
    depth: int = 2

    def __post_init__(self) -> None:
        epochs, lr = (20, 1e-2) if self.data == TEXT else (40, 3e-3)
        for name, value in (("epochs", epochs), ("lr", lr)):
            if not getattr(self, name):
                object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Cell:
    """One configuration (alpha = 2): what happens at the split, to which pairs, in models of which size."""

    condition: str
    expanded: str = BOTH
    size: str = "narrow"


def cells() -> list[Cell]:
    """Both policies on either kind of pair, on both; the masks with new weights; and the ceiling, wide and dense."""
    named = [(CONTINUED, BOTH), (PARTITION, BOTH), (WIDE, BOTH), (FRESH, BOTH)]
    named += [(policy, where) for where in (MLP, ATTENTION) for policy in (PARTITION, RANKING)]
    return [Cell(condition, where, size) for size in SIZES for condition, where in named]


class Attention(nn.Module):
    """Attention of :data:`HEADS` heads, for values of any multiple of the channels that it was made with.

    An expanded layer has its children plane by plane: first the first child of every neuron, then the second ones. So
    channels are read as ``[copies, heads, channels of a head]``, and every copy is mixed by its own head.

    Args:
        width: Of the stream.
        values: Channels of the values, over all heads.
        causal: Whether a place sees none after it.
    """

    def __init__(self, width: int, values: int, causal: bool) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, values), nn.Linear(values, width)
        self.channels, self.causal = values // HEADS, causal

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, time, width]`` to the same."""
        q, k = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if self.causal:
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        values = self.value(x).unflatten(-1, (-1, HEADS, self.channels)).movedim(-2, 1)  # [batch, heads, time, ...]
        mixed = (scores.softmax(-1) @ values.flatten(-2)).view(values.shape)
        return self.out(mixed.movedim(1, -2).flatten(2))


class Block(nn.Module):
    """A transformer block with pre-normalisation."""

    def __init__(self, width: int, neurons: int, values: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, values, causal)
        self.fc1, self.fc2 = nn.Linear(width, neurons), nn.Linear(neurons, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, time, width]`` to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(nn.functional.relu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    """A causal model of characters, or a classifier of patches by the mean of the places.

    Args:
        settings: Width and depth.
        size: One of :data:`SIZES`.
        inputs: Numbers to a patch; none where a place is a character.
        places: Of a sequence.
        classes: Outputs.
    """

    def __init__(self, settings: Settings, size: str, inputs: int | None, places: int, classes: int) -> None:
        super().__init__()
        width, causal = settings.width, inputs is None
        self.embed = nn.Embedding(CHARACTERS, width) if inputs is None else nn.Linear(inputs, width)
        self.place = nn.Embedding(places, width)
        self.blocks = nn.ModuleList(Block(width, *SIZES[size], causal) for _ in range(settings.depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        """Logits: of the next characters ``[batch * time, classes]`` of ``[batch, time]``, or of images."""
        x = self.embed(x) + self.place.weight
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x).flatten(0, 1) if self.causal else self.head(x.mean(1))


def pairs(depth: int, expanded: str) -> conditions.Pairs:
    """The pairs to expand, by name."""
    mlps = [(f"blocks.{i}.fc1", f"blocks.{i}.fc2") for i in range(depth)]
    values = [(f"blocks.{i}.attention.value", f"blocks.{i}.attention.out") for i in range(depth)]
    return {MLP: mlps, ATTENTION: values, BOTH: mlps + values}[expanded]


@lru_cache(maxsize=1)
def sequences(name: str, device: str = "cpu") -> Data:
    """Windows of characters with those that follow, or images as patches; validation samples set aside.

    Of the text every paragraph is read once, for topics repeat one another; the last tenth is for testing and the one
    before it for validation, both by evenly spaced windows.
    """
    if name == TEXT:
        from pydoc_data.topics import topics

        paragraphs = dict.fromkeys("\n\n".join(topics[key] for key in sorted(topics)).split("\n\n"))
        whole = "\n\n".join(paragraphs).encode("ascii", "replace")
        values = torch.frombuffer(bytearray(whole), dtype=torch.uint8).long().to(device)
        parts = values.tensor_split([len(values) * 8 // 10, len(values) * 9 // 10])
        windows, validation, test = (part.unfold(0, CONTEXT + 1, 1) for part in parts)
        validation, test = (w[torch.linspace(0, len(w) - 1, n).long()] for w, n in ((validation, 256), (test, 2048)))
        drawn = (part for w in (windows, test, validation) for part in (w[:, :-1], w[:, 1:]))
        return Data(*drawn)
    data = load_held_out(name, device)
    kept = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(0))[:SAMPLES].to(device)
    x, x_test, x_validation = (in_patches(x) for x in (data.x[kept], data.x_test, data.x_validation[:LOOKED_AT]))
    return Data(x, data.y[kept], x_test, data.y_test, x_validation, data.y_validation[:LOOKED_AT])


def in_patches(images: Tensor) -> Tensor:
    """Square images ``[samples, pixels]`` as ``[samples, PATCHES ** 2, pixels of a patch]``."""
    side = math.isqrt(images.shape[1]) // PATCHES
    return images.view(-1, PATCHES, side, PATCHES, side).transpose(2, 3).reshape(len(images), PATCHES**2, side**2)


def model_of(settings: Settings, size: str) -> Transformer:
    """A dense model for the study's data."""
    data = sequences(settings.data, settings.device)
    inputs = None if settings.data == TEXT else data.x.shape[2]
    classes = CHARACTERS if inputs is None else int(data.y.max()) + 1
    return Transformer(settings, size, inputs, data.x.shape[1], classes)


def run_cell(cell: Cell, settings: Settings) -> list[dict[str, Any]]:
    """Trains all trials of a cell; a row for each."""
    data, steps = sequences(settings.data, settings.device), STEPS * settings.epochs
    dense, draws = _dense(cell.size, settings), generators(settings, 2)
    torch.manual_seed(settings.seed)  # fresh weights are drawn from PyTorch's own generator
    models = [
        conditions.build(cell.condition, model, 2, draw, pairs(settings.depth, cell.expanded))
        for model, draw in zip(dense, draws, strict=True)
    ]
    weights = [fpe.nonzeros(model) for model in models]
    before = 0 if conditions.from_scratch(cell.condition) else round(SPLIT * steps)
    watch = Watch(data, max(1, (steps - before) // CHECKS))
    stack = _trained(models, settings, before, steps, 1, watch)
    loss, right = measured(watch.restored(stack), data.x_test, data.y_test)
    return [
        {
            **asdict(cell),
            "trial": trial,
            "validation_bits": round(float(watch.least[trial]), 5),
            "best_step": int(watch.at[trial]),
            "test_bits": round(loss[trial], 5),
            "test_accuracy": round(right[trial], 4),
            "nonzeros": weights[trial],
            "curve": [round(float(bits[trial]), 4) for bits in watch.curve],
        }
        for trial in range(settings.trials)
    ]


@lru_cache(maxsize=2)
def _dense(size: str, settings: Settings) -> list[nn.Module]:
    models = seeded(lambda: model_of(settings, size), settings.trials, settings.seed)
    before = round(SPLIT * STEPS * settings.epochs)
    return [model.cpu() for model in _trained(models, settings, 0, before, 0).models()]


@dataclass
class Watch:
    """Looks at the validation loss :data:`CHECKS` times a training and keeps every network's best weights.

    Attributes:
        data: Whose validation samples.
        every: Steps between two looks.
        curve: Bits of every network at each look.
        least: The fewest.
        at: After how many steps of the training.
    """

    data: Data
    every: int
    curve: list[Tensor] = field(default_factory=list)
    least: Tensor = field(default_factory=lambda: torch.tensor(torch.inf))
    at: Tensor = field(default_factory=lambda: torch.tensor(0))
    _best: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, step: int, stack: Stack, gradients: dict[str, Tensor]) -> None:
        """A look, where it is time for one. It moves no masks."""
        if step % self.every:
            return
        bits = torch.tensor(measured(stack, self.data.x_validation, self.data.y_validation)[0])
        better = bits < self.least
        self.curve.append(bits)
        self.least, self.at = torch.where(better, bits, self.least), torch.where(better, step, self.at)
        for name, parameter in stack.parameters.items():
            kept = self._best.setdefault(name, parameter.detach().clone())
            kept[better] = parameter[better]

    @torch.no_grad()
    def restored(self, stack: Stack) -> Stack:
        """The stack with every network as it was at its best."""
        for name, parameter in stack.parameters.items():
            parameter.copy_(self._best[name])
        return stack


def _trained(
    models: Sequence[nn.Module], settings: Settings, first: int, last: int, stage: int, watch: Watch | None = None
) -> Stack:
    """Trains from one step of the schedule to another, each model on samples of its own."""
    data, total = sequences(settings.data, settings.device), STEPS * settings.epochs
    batch = max(1, settings.tokens // data.x.shape[1])
    stack = Stack([model.to(settings.device) for model in models])
    stack.train(
        samples_of(data, last - first, batch, generators(settings, stage)),
        Training(settings.epochs, batch, settings.lr),
        classification_loss,
        own=True,
        move=watch,
        rate=lambda step: min(1.0, 2 * (1 - (first + step - 1) / total)),
    )
    return stack


def samples_of(data: Data, steps: int, batch: int, generators: Sequence[torch.Generator]) -> Batches:
    """Random samples of its own for each network; the targets of a sequence's places follow one another."""
    for _ in range(steps):
        drawn = torch.stack([torch.randint(len(data.x), (batch,), generator=one) for one in generators])
        yield data.x[drawn], data.y[drawn].flatten(1)


@torch.no_grad()
def measured(stack: Stack, x: Tensor, y: Tensor) -> tuple[list[float], list[float]]:
    """Of every network the bits to a prediction, and the share of right ones in percent."""
    bits, right = (torch.zeros(len(stack), dtype=torch.float64) for _ in range(2))
    for inputs, targets in zip(x.split(512), y.split(512), strict=True):
        chances, wanted = stack(inputs).log_softmax(-1), targets.flatten()
        index = wanted.expand(chances.shape[:-1])[..., None]
        bits -= chances.gather(-1, index).double().sum((1, 2)).cpu() / math.log(2)
        right += (chances.argmax(-1) == wanted).double().sum(1).cpu()
    return (bits / y.numel()).tolist(), (right / y.numel() * 100).tolist()


NAMED = {PARTITION: "partition", RANKING: "ranking", FRESH: "partition, new weights", WIDE: "wide dense, new weights"}


def beside(results: Results) -> pd.DataFrame:
    """The rows beside the dense model of the same size, trial by trial; ``bits`` and ``points`` over it."""
    frame = results.frame
    return over(frame, frame[frame["condition"] == CONTINUED], ["size", "trial"])


def over(frame: pd.DataFrame, dense: pd.DataFrame, key: list[str]) -> pd.DataFrame:
    """The rows beside those of a dense model with the same ``key``; ``bits`` and ``points`` over it."""
    joined = frame.join(dense.set_index(key)[["test_bits", "test_accuracy"]].add_prefix("dense_"), on=key)
    return joined.assign(
        bits=joined["test_bits"] - joined["dense_test_bits"],
        points=joined["test_accuracy"] - joined["dense_test_accuracy"],
    )


def table(results: Results, shown: Sequence[Cell]) -> Table:
    """A row for each cell, beside the dense model that trained as long."""
    frame = beside(results)
    rows = []
    for cell in shown:
        own = frame[(frame[list(asdict(cell))] == pd.Series(asdict(cell))).all(axis=1)]
        if not len(own):
            continue
        control = cell.condition == CONTINUED
        rows.append(
            (
                cell.size,
                "-" if control else cell.expanded,
                CONTINUED if control else NAMED[cell.condition],
                f"{own['nonzeros'].iloc[0]}",
                interval(own["validation_bits"], 3),
                interval(own["test_bits"], 3),
                "-" if control else interval(own["bits"], 4, "+"),
                interval(own["test_accuracy"], 2),
                "-" if control else interval(own["points"], 2, "+"),
            )
        )
    s = results.settings
    title = (
        f"Transformers of width {s['width']} ({s['data']}, alpha = 2, split after {SPLIT:.0%} of {STEPS * s['epochs']} "
        f"steps, {s['trials']} trials, stopped by validation loss, test; ± is a 95 % interval)"
    )
    columns = ("size", "expanded", "policy", "weights", "validation bits", "test bits", "change (less is better)")
    return Table(title, (*columns, "test accuracy %", "points"), rows)


def curves(several: Sequence[Results]) -> Figure:
    """Validation loss by steps: the dense model, both kinds of pairs expanded, and the ceiling."""
    made, axes = figure(8.4, 3.6, len(several))
    for axis, results in zip(axes, several, strict=True):
        frame, steps = results.frame, STEPS * results.settings["epochs"]
        for size, style in zip(SIZES, ("--", "-"), strict=True):
            for condition in (CONTINUED, PARTITION, FRESH, WIDE):
                own = frame[(frame["condition"] == condition) & (frame["expanded"] == BOTH) & (frame["size"] == size)]
                if own.empty:
                    continue
                before = 0 if conditions.from_scratch(condition) else round(SPLIT * steps)
                every = max(1, (steps - before) // CHECKS)
                points = [mean_and_half(bits)[0] for bits in zip(*own["curve"], strict=True)]
                at = [before + every * (i + 1) for i in range(len(points))]
                label = f"{NAMED.get(condition, condition)}, {size}"
                axis.plot(at, points, style, color=COLOURS[condition], linewidth=1.6, label=label)
        axis.set(xlabel="steps", ylabel="validation loss, bits", title=results.settings["data"])
    axes[0].legend(frameon=False, fontsize=8)
    return made


FILES = ("transformer-text", "transformer-fashion-mnist")
LONG = "transformer-text-6000-steps"
"""Committed rows; the last ones with ``--epochs 60``."""

SWEEP: Sweep = Sweep(
    "transformer",
    "Expand the MLPs and the attention of small transformers, of text or (--data fashion-mnist) of images.",
    "transformer",
    Settings,
    cells,
    run_cell,
    table,
    [Cell(condition, BOTH) for condition in (CONTINUED, PARTITION, WIDE)],
    {"trials": 2, "epochs": 1, "tokens": 64},
    epochs_help="Epochs of training: hundreds of steps, before the split and after it together.",
    tables={name: lambda name=name: SWEEP.shown(name) for name in (*FILES, LONG)},  # type: ignore[misc]
    figures={"transformer": lambda: curves([committed(name) for name in FILES])},
)
STUDIES = (SWEEP,)
