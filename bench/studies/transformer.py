"""A small transformer on real text with its MLPs expanded: does FPE carry over to square pairs of layers?

The text is the Python language reference, as every Python ships it for ``help()`` (``pydoc_data.topics``), character
by character; the last tenth is for testing. The figure of merit is the test loss in bits per character: less is better.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

import fpe

from ..results import Results
from ..table import Table
from . import conditions, sweep
from .conditions import CONTINUED, WIDE
from .intervals import interval
from .protocol import Training
from .stack import Stack, seeded, train_all
from .sweep import Sweep
from .tables import beside_control

CONTEXT = 64
"""Characters that the model sees."""

CHARACTERS = 128
"""ASCII; others are read as a question mark."""

STEPS = 100
"""Steps that this study calls an epoch."""


@dataclass(frozen=True)
class Settings(sweep.Settings):
    """Settings of this study, whose epochs are hundreds of steps.

    Attributes:
        batch: Sequences to a step.
        lr: Adam's step size.
        width: Width of the residual stream.
        depth: Blocks.
    """

    epochs: int = 8
    batch: int = 16
    lr: float = 2e-3
    width: int = 64
    depth: int = 2


@dataclass(frozen=True)
class Cell:
    """One configuration: what happens to the MLPs at the split, and their hidden width before it (alpha = 2)."""

    condition: str
    neurons: int = 64


def cells() -> list[Cell]:
    """MLPs a quarter as wide as the stream and, as is usual, four times as wide."""
    named = (CONTINUED, "random magnitude", "random partition", "2:4 partition", "fresh random partition", WIDE)
    return [Cell(c, neurons) for neurons in (16, 256) for c in named]


class Block(nn.Module):
    """A transformer block with pre-normalisation and two heads; ``fc1`` and ``fc2`` are its MLP."""

    def __init__(self, width: int, neurons: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, neurons), nn.Linear(neurons, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, time, width]`` to the same."""
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(nn.functional.relu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    """A causal model of characters."""

    def __init__(self, width: int, depth: int, neurons: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(CHARACTERS, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, neurons) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CHARACTERS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next character, ``[batch * time, characters]`` of ``[batch, time]``."""
        x = self.embed(tokens) + self.place.weight
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).flatten(0, 1)


def pairs(depth: int) -> conditions.Pairs:
    """The MLPs' layers by name."""
    return [(f"blocks.{i}.fc1", f"blocks.{i}.fc2") for i in range(depth)]


@lru_cache(maxsize=1)
def text() -> tuple[Tensor, Tensor]:
    """Characters to train on and to test on, int64."""
    from pydoc_data.topics import topics

    whole = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    values = torch.frombuffer(bytearray(whole), dtype=torch.uint8).long()
    cut = len(values) * 9 // 10
    return values[:cut], values[cut:]


def batches(steps: int, batch: int, generator: torch.Generator, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Random windows of the training text and the characters that follow, flattened."""
    values = text()[0]
    for _ in range(steps):
        start = torch.randint(len(values) - CONTEXT - 1, (batch, 1), generator=generator)
        window = values[start + torch.arange(CONTEXT + 1)].to(device)
        yield window[:, :-1], window[:, 1:].flatten()


@torch.no_grad()
def bits_per_character(stack: Stack, device: str) -> list[float]:
    """Test loss of every network over 512 evenly spaced windows, in bits."""
    values = text()[1]
    start = torch.linspace(0, len(values) - CONTEXT - 1, 512).long()[:, None]
    window = values[start + torch.arange(CONTEXT + 1)].to(device)
    total = torch.zeros(len(stack), dtype=torch.float64)
    for part in window.split(64):
        chances = stack(part[:, :-1]).log_softmax(-1)
        index = part[:, 1:].flatten().expand(chances.shape[:-1])[..., None]
        total -= chances.gather(-1, index).double().sum((1, 2)).cpu()
    return (total / window[:, 1:].numel() / math.log(2)).tolist()


def run_cell(cell: Cell, settings: Settings) -> list[dict[str, Any]]:
    """Trains all trials of a cell; a row for each."""
    models: list[nn.Module] = []
    for trial, dense in enumerate(_dense(cell.neurons, settings)):
        generator = torch.Generator().manual_seed(settings.seed * 1009 + trial)
        models.append(conditions.build(cell.condition, dense, 2, generator, pairs(settings.depth)))
    weights = [fpe.nonzeros(model) for model in models]
    epochs = settings.epochs * (2 if conditions.from_scratch(cell.condition) else 1)
    stack = _trained(models, settings, settings.seed + 1, epochs)
    losses = bits_per_character(stack, settings.device)
    return [
        {**asdict(cell), "trial": trial, "bits_per_character": round(loss, 5), "nonzeros": count}
        for trial, (loss, count) in enumerate(zip(losses, weights, strict=True))
    ]


@lru_cache(maxsize=2)
def _dense(neurons: int, settings: Settings) -> list[nn.Module]:
    models = seeded(lambda: Transformer(settings.width, settings.depth, neurons), settings.trials, settings.seed)
    return [model.cpu() for model in _trained(models, settings, settings.seed, settings.epochs).models()]


def _trained(models: list[nn.Module], settings: Settings, seed: int, epochs: int) -> Stack:
    order = torch.Generator().manual_seed(seed)
    drawn = batches(STEPS * epochs, settings.batch, order, settings.device)
    return train_all(models, drawn, Training(settings.epochs, settings.batch, settings.lr), settings.device)


def table(results: Results, shown: Sequence[Cell]) -> Table:
    """A row for each cell, beside the model that was not expanded."""
    frame = beside_control(results, ["neurons"], "bits_per_character")
    rows = []
    for cell in shown:
        own = frame[(frame["condition"] == cell.condition) & (frame["neurons"] == cell.neurons)]
        if len(own):
            rows.append(
                (
                    cell.condition,
                    f"{cell.neurons}",
                    interval(own["bits_per_character"], 3),
                    "-" if cell.condition == CONTINUED else interval(own["points"], 4, "+"),
                    f"{own['nonzeros'].iloc[0]}",
                )
            )
    s = results.settings
    steps = STEPS * s["epochs"]
    title = f"A transformer of width {s['width']} on text, alpha = 2, {steps} + {steps} steps, {s['trials']} trials"
    columns = ("condition", "neurons", "bits per character", "change (less is better)", "non-zeros")
    return Table(f"{title}, chosen and reported on the test; ± is a 95 % interval", columns, rows)


SWEEP: Sweep = Sweep(
    "transformer",
    "Train a small transformer on the Python language reference and expand its MLPs.",
    "transformer",
    Settings,
    cells,
    run_cell,
    table,
    [Cell(condition, 8) for condition in (CONTINUED, "random magnitude")],
    {"trials": 2, "epochs": 1, "batch": 2},
    tables={"transformer": lambda: SWEEP.shown("transformer")},
)
STUDIES = (SWEEP,)
